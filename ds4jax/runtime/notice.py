"""A word to whoever waits at a terminal while a program is compiled."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

AFTER = 2.0  # seconds that compiling may take unannounced
AGAIN = 60.0  # what is compiled within so many seconds of the last needs no other line


class Announced:
    """A jitted function that says so on stderr when a call has to compile and that takes long.

    Nothing is said where no terminal looks on. All else is the jitted function's.

    Args:
      run: the function.
      jit: makes the jitted function.
      wanted: asked at each compilation whether anything may be said.
    """

    _last = -1e9  # when anything that was long was last compiled, in the whole process

    def __init__(self, run: Callable, jit: Callable[[Callable], Any], wanted: Callable[[], bool] = lambda: True):
        self._wanted, self._called, self._timer = wanted, False, None

        def traced(*args, **kw):  # runs when shapes are new, and only then
            if self._called and self._timer is None and self._wanted() and sys.stderr.isatty():
                self._timer = threading.Timer(AFTER, _say)
                self._timer.daemon = True
                self._timer.start()
            return run(*args, **kw)

        traced.__name__ = traced.__qualname__ = run.__name__  # the program's, too
        self._jitted = jit(traced)

    def __call__(self, *args, **kw):
        self._called = True
        try:
            return self._jitted(*args, **kw)
        finally:
            self._called = False
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)


def _say() -> None:
    if time.monotonic() - Announced._last > AGAIN:
        print(f"ds4jax: compiling … (once{_kept()})", file=sys.stderr, flush=True)
    Announced._last = time.monotonic()


def _kept() -> str:
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        return ""
    home, path = Path.home(), Path(folder)
    return f"; kept in {Path('~') / path.relative_to(home) if path.is_relative_to(home) else path}"
