"""The one exception users meet, and what helps to say in it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DS4Error(ValueError):
    """Bad input: a one-line message that names the file, tensor or option and says what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that an unknown one may have been meant for, if one is like it."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.52)  # "temp" is 0.53 like "temperature"
    return near[0] if near else None


def suggestion(name: str, known: Iterable[str]) -> str:
    """`nearest` as the end of a message, or nothing."""
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else ""
