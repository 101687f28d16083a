"""Seeing a job: a progress display, status.json, history.csv, Prometheus text, and at the end a table and a plot."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import http.server
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ds4jax.errors import DS4Error
from ds4jax.jobs.loop import Stats
from ds4jax.jobs.store import write_json, write_text

SPAN = 60.0  # seconds over which rates are taken
STATUS_SECONDS = 2.0
HISTORY_SECONDS = 10.0
HISTORY_HEAD = "unix_time,requests,prompt_tokens,prefill_tokens,output_tokens,slots_used,cache_bytes\n"


@dataclasses.dataclass(frozen=True)
class View:
    """A job at one moment.

    Attributes:
      state: "running", "draining", "finished", "stopped" or "failed".
      total: records in the input, or None where it is not known.
      done: records on disk, errors included; resumed: those of earlier runs.
      rates: per second over the last minute: requests, prompt_tokens, output_tokens.
      eta: seconds, or None.
    """

    state: str
    total: int | None
    done: int
    errors: int
    resumed: int
    running: int
    waiting: int
    stats: Stats
    seconds: float
    rates: dict[str, float]
    eta: float | None

    def to_json(self) -> dict[str, Any]:
        s = self.stats
        return {
            "state": self.state, "pid": os.getpid(), "updated": round(time.time(), 3),
            "requests": {
                "total": self.total, "done": self.done, "errors": self.errors, "resumed": self.resumed,
                "running": self.running, "waiting": self.waiting,
            },
            "tokens": {
                "prompt": s.prompt_tokens, "prefill": s.prefill_tokens, "shared": s.shared_tokens,
                "output": s.output_tokens,
            },
            "per_second": {k: round(v, 2) for k, v in self.rates.items()},
            "slots": {"used": s.slots_used, "total": s.slots},
            "cache_bytes": {"used": s.cache_bytes, "peak": s.cache_peak, "budget": s.cache_budget},
            "seconds": round(self.seconds, 1),
            "eta_seconds": None if self.eta is None else round(self.eta),
        }  # fmt: skip

    def prometheus(self) -> str:
        """Prometheus' text format (version 0.0.4)."""
        s = self.stats
        rows = [
            ("requests_done_total", "counter", "Records written, errors included.", self.done),
            ("requests_failed_total", "counter", "Error records written.", self.errors),
            ("requests_running", "gauge", "Records being generated.", self.running),
            ("requests_waiting", "gauge", "Records read and waiting for a slot.", self.waiting),
            ("prompt_tokens_total", "counter", "Prompt tokens of admitted requests.", s.prompt_tokens),
            ("prefill_tokens_total", "counter", "Prompt tokens computed.", s.prefill_tokens),
            ("shared_tokens_total", "counter", "Prompt tokens taken from shared prefixes.", s.shared_tokens),
            ("output_tokens_total", "counter", "Tokens generated.", s.output_tokens),
            ("slots", "gauge", "Sequences that can decode together.", s.slots),
            ("slots_used", "gauge", "Sequences being decoded or prefilled.", s.slots_used),
            ("cache_used_bytes", "gauge", "Cache bytes held by sequences.", s.cache_bytes),
            ("cache_budget_bytes", "gauge", "Cache bytes there are.", s.cache_budget),
        ]
        if self.total is not None:
            rows.append(("requests", "gauge", "Records in the input.", self.total))
        out = []
        for name, kind, text, value in rows:
            full = f"ds4jax_batch_{name}"
            out.append(f"# HELP {full} {text}\n# TYPE {full} {kind}\n{full} {value}\n")
        return "".join(out)


class Rates:
    """Increase per second over the last `SPAN` seconds."""

    def __init__(self):
        self.points: collections.deque[tuple[float, tuple[int, ...]]] = collections.deque()

    def add(self, now: float, values: tuple[int, ...]) -> None:
        if self.points and now - self.points[-1][0] < 0.25:
            return
        self.points.append((now, values))
        while len(self.points) > 2 and now - self.points[1][0] > SPAN:
            self.points.popleft()

    def per_second(self) -> list[float] | None:
        if len(self.points) < 2 or self.points[-1][0] == self.points[0][0]:
            return None
        (t0, a), (t1, b) = self.points[0], self.points[-1]
        return [(y - x) / (t1 - t0) for x, y in zip(a, b, strict=True)]


class Watch:
    """Shows `View`s: everything that is not the job itself. What goes wrong here never stops the job.

    Args:
      folder: where status.json and history.csv go.
      display: show a progress display on stderr.
      port: serve Prometheus text there, or None.
    """

    def __init__(self, folder: Path, *, display: bool, port: int | None = None):
        self.folder, self.rates, self.start = folder, Rates(), time.monotonic()
        self._status = self._history = -1e9
        self._display = Display() if display else None
        self._latest: View | None = None
        self._server = _serve(port, lambda: self._latest) if port is not None else None
        self.port = self._server.server_address[1] if self._server else None

    def view(
        self, state: str, total: int | None, done: int, errors: int, resumed: int, running: int, waiting: int,
        stats: Stats,
    ) -> View:  # fmt: skip
        now = time.monotonic()
        self.rates.add(now, (done, stats.prompt_tokens, stats.output_tokens))
        speed = self.rates.per_second() or [0.0, 0.0, 0.0]
        eta = (total - done) / speed[0] if total is not None and speed[0] > 0 else None
        rates = dict(zip(("requests", "prompt_tokens", "output_tokens"), speed, strict=True))
        return View(
            state,
            total,
            done,
            errors,
            resumed,
            running,
            waiting,
            dataclasses.replace(stats),
            now - self.start,
            rates,
            eta,
        )

    def show(self, view: View, *, last: bool = False) -> None:
        self._latest = view
        now = time.monotonic()
        if last or now - self._status >= STATUS_SECONDS:
            self._status = now
            with contextlib.suppress(DS4Error):
                write_json(self.folder / "status.json", view.to_json(), durable=False)
        if last or now - self._history >= HISTORY_SECONDS:
            self._history = now
            self._note(view)
        if self._display:
            self._display.show(view)

    def _note(self, view: View) -> None:
        s, path = view.stats, self.folder / "history.csv"
        row = (
            f"{time.time():.3f},{view.done},{s.prompt_tokens},{s.prefill_tokens},{s.output_tokens},{s.slots_used},"
            f"{s.cache_bytes}\n"
        )
        with contextlib.suppress(OSError), open(path, "a") as f:
            f.write(row if f.tell() else HISTORY_HEAD + row)

    def close(self) -> None:
        if self._display:
            self._display.close()
        if self._server:
            self._server.shutdown()
            self._server.server_close()


def _serve(port: int, latest) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            view = latest()
            found = self.path.split("?")[0] in ("/", "/metrics")
            body = (view.prometheus() if view else "").encode() if found else b"only /metrics is here\n"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    try:
        server = http.server.ThreadingHTTPServer(("", port), Handler)
    except OSError as e:
        raise DS4Error(
            f"port {port}: cannot be opened: {e.strerror or e}; choose another with --metrics-port"
        ) from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class Display:
    """The progress display on a terminal."""

    def __init__(self):
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(file=sys.stderr), refresh_per_second=4, transient=True)
        self._live.start()

    def show(self, view: View) -> None:
        self._live.update(_panel(view))

    def close(self) -> None:
        self._live.stop()


def _panel(view: View):
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    s = view.stats
    grid = Table.grid(padding=(0, 3))
    total = "?" if view.total is None else f"{view.total:,}"
    grid.add_row("requests", f"{view.done:,} of {total}", f"{view.errors:,} errors", f"{view.rates['requests']:.2f}/s")
    grid.add_row(
        "tokens in", f"{s.prompt_tokens:,}", f"{s.shared_tokens:,} shared", f"{view.rates['prompt_tokens']:.1f}/s"
    )
    grid.add_row("tokens out", f"{s.output_tokens:,}", "", f"{view.rates['output_tokens']:.1f}/s")
    held = f"{size(s.cache_bytes)} of {size(s.cache_budget)}"
    grid.add_row("slots", f"{s.slots_used} of {s.slots}", f"{view.waiting:,} waiting", f"cache {held}")
    left = (
        "finishing what has begun (Ctrl-C again: stop now)" if view.state == "draining" else f"ETA {duration(view.eta)}"
    )
    bar = ProgressBar(total=view.total or 1, completed=view.done if view.total else 0, width=60)
    return Group(bar, grid, Text(f"{duration(view.seconds)} · {left}", style="dim"))


def size(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days} d {h:02d}:{m:02d} h" if days else f"{h}:{m:02d}:{s:02d}"


# --- at the end


def summary(view: View) -> list[tuple[str, str]]:
    """The final table."""
    s, seconds = view.stats, max(view.seconds, 1e-9)
    rows = [
        ("state", view.state),
        ("requests", f"{view.done:,}" + (f" of {view.total:,}" if view.total is not None else "")),
        ("errors", f"{view.errors:,}"),
    ]
    if view.resumed:
        rows.append(("from earlier runs", f"{view.resumed:,}"))
    rows += [
        ("time", duration(view.seconds)),
        ("tokens in", f"{s.prompt_tokens:,} ({s.prompt_tokens / seconds:,.1f}/s)"),
        ("  prefilled", f"{s.prefill_tokens:,}"),
        ("  shared", f"{s.shared_tokens:,}"),
        ("tokens out", f"{s.output_tokens:,} ({s.output_tokens / seconds:,.1f}/s)"),
        ("cache", f"peak {size(s.cache_peak)} of {size(s.cache_budget)}"),
    ]
    return rows


def finish(folder: Path, view: View) -> None:
    """Write summary.json and throughput.svg."""
    write_json(folder / "summary.json", view.to_json())
    write_text(folder / "throughput.svg", plot(list(history(folder / "history.csv"))))


def history(path: Path) -> Iterator[list[float]]:
    """Rows of history.csv as numbers; torn ones are left out."""
    width = HISTORY_HEAD.count(",") + 1
    with contextlib.suppress(OSError), open(path) as f:
        for line in f:
            with contextlib.suppress(ValueError):
                row = [float(x) for x in line.split(",")]
                if len(row) == width and line.endswith("\n"):
                    yield row


def plot(rows: Sequence[Sequence[float]]) -> str:
    """Tokens per second over time, in and out, as SVG. Runs of a job that was interrupted stand side by side."""
    W, H, left, bottom, top = 720, 300, 70, 40, 30
    series: dict[str, list[list[tuple[float, float]]]] = {"in": [[]], "out": [[]]}
    at, before = 0.0, None
    for row in rows:
        if before is not None and row[0] > before[0]:
            dt = row[0] - before[0]
            deltas = {"in": row[2] - before[2], "out": row[4] - before[4]}
            if min(deltas.values()) < 0:  # counters begin anew in each run
                for lines in series.values():
                    lines.append([])
            else:
                at += dt
                for name, lines in series.items():
                    lines[-1].append((at, deltas[name] / dt))
        before = row
    end = max(at, 1e-9)
    peak = max([y for lines in series.values() for line in lines for _, y in line], default=0) or 1.0
    x = lambda t: left + (W - left - 20) * t / end  # noqa: E731
    y = lambda v: H - bottom - (H - bottom - top) * v / peak  # noqa: E731
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" width="{W}" height="{H}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{W}" height="{H}" fill="white"/>',
    ]
    for i in range(5):
        v = peak * i / 4
        out.append(f'<line x1="{left}" x2="{W - 20}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:,.0f}</text>')
        t = end * i / 4
        anchor = "start" if i == 0 else "end" if i == 4 else "middle"
        out.append(f'<text x="{x(t):.1f}" y="{H - bottom + 18}" text-anchor="{anchor}">{duration(t)}</text>')
    colours = {"in": "#888888", "out": "#1f6fb4"}
    for i, (name, lines) in enumerate(series.items()):
        for line in lines:
            points = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in line)
            out.append(f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="1.5"/>')
        out.append(f'<text x="{left + 110 * i}" y="18" fill="{colours[name]}">tokens/s {name}</text>')
    return "\n".join([*out, "</svg>", ""])
