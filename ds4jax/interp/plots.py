"""Figures by matplotlib, as SVG or PNG files, and one self-contained HTML page for several of them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ds4jax.errors import DS4Error

INK, ACCENT, MUTED = "#20262e", "#c2410c", "#8a94a3"
PALETTE = ("#0f5e9c", "#c2410c", "#2f7d4f", "#7a4fa3", "#b58900", "#5c6773")


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise DS4Error("figures need matplotlib: pip install 'ds4jax[plots]'") from None
    from matplotlib import figure

    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    matplotlib.rcParams["svg.hashsalt"] = "ds4jax"  # the same figure is the same file
    return figure


def new(width: float = 7.0, height: float = 3.6, rows: int = 1, columns: int = 1):
    """A figure without a window, and its axes."""
    figure = _pyplot().Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns)
    for a in np.ravel(axes):
        a.spines[["top", "right"]].set_visible(False)
        a.tick_params(colors=INK, labelsize=8)
    return figure, axes


def save(figure, path) -> Path:
    """Write .svg or .png."""
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise DS4Error(f"{path}: name it .svg or .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=160, metadata=metadata)
    return path


def words(tokenizer, tokens: Sequence[int], limit: int = 14) -> list[str]:
    """Tokens as short labels, spaces and breaks made visible."""
    if tokenizer is None:
        return [str(t) for t in tokens]
    texts = [tokenizer.decode([int(t)]) for t in tokens]
    marks = str.maketrans({"\n": "⏎", " ": "·", "｜": "|", "$": r"\$"})  # and what the figures' fonts lack
    shown = [t.translate(marks) for t in texts]
    return [t if len(t) <= limit else t[: limit - 1] + "…" for t in shown]


def heatmap(
    values: np.ndarray, *, x: Sequence[str] | None = None, y: Sequence[str] | None = None, xlabel: str = "",
    ylabel: str = "", title: str = "", cells: np.ndarray | None = None, diverging: bool = False, bar: str = "",
):  # fmt: skip
    """values [rows, columns] as colours, the first row at the bottom; `cells`: text in each field."""
    values = np.asarray(values, np.float64)
    height, width = values.shape
    wide = max(5.0, (0.62 if cells is not None else 0.28) * width + 2.2)
    figure, axes = new(min(wide, 24), max(2.4, 0.3 * height + 1.4))
    finite = values[np.isfinite(values)]
    span = float(np.abs(finite).max()) if finite.size else 1.0
    limits = dict(vmin=-span, vmax=span, cmap="RdBu_r") if diverging else dict(cmap="YlGnBu")
    image = axes.imshow(values, aspect="auto", origin="lower", interpolation="nearest", **limits)
    if cells is not None:
        middle = (np.nanmin(finite) + np.nanmax(finite)) / 2 if finite.size else 0
        for (i, j), text in np.ndenumerate(cells):
            dark = abs(values[i, j]) > 0.6 * span if diverging else values[i, j] > middle
            axes.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if dark else INK)
    for labels, axis in ((x, axes.xaxis), (y, axes.yaxis)):
        if labels is not None:
            step = max(1, len(labels) // 64)
            axis.set_ticks(range(0, len(labels), step), list(labels)[::step])
    if x is not None:
        axes.tick_params(axis="x", rotation=90, labelsize=7)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.set_title(title, fontsize=10, color=INK)
    figure.colorbar(image, ax=axes, pad=0.01).set_label(bar, fontsize=8)
    return figure


def bars(values: Sequence[float], labels: Sequence[str], *, title: str = "", xlabel: str = ""):
    """Horizontal bars, the first at the top."""
    figure, axes = new(7.0, max(2.0, 0.2 * len(values) + 1.0))
    order = np.arange(len(values))[::-1]
    axes.barh(order, values, color=[PALETTE[0] if v >= 0 else ACCENT for v in values])
    axes.set_yticks(order, labels, fontsize=7)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_title(title, fontsize=10, color=INK)
    return figure


def sweep(result):
    """A `Sweep`'s measures over the scale: the mean over prompts as a line, each prompt as a dot."""
    names = result.names
    figure, axes = new(3.4 * len(names), 3.0, 1, len(names))
    for k, (a, name) in enumerate(zip(np.ravel(axes), names, strict=True)):
        a.scatter([r["scale"] for r in result.rows], [r[name] for r in result.rows], s=9, color=MUTED, alpha=0.5)
        a.plot(result.scales, result.means(name), color=PALETTE[k % len(PALETTE)], marker="o", markersize=4)
        a.axvline(0, color=MUTED, linewidth=0.8, linestyle=":")
        a.set_xlabel("scale", fontsize=9)
        a.set_title(name, fontsize=10, color=INK)
    return figure


class Page:
    """One HTML file that needs nothing else."""

    def __init__(self, title: str):
        self.title = title
        self.parts: list[str] = []

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def figure(self, figure, caption: str = "") -> None:
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        data = base64.b64encode(svg.getvalue()).decode()
        self.parts.append(
            f'<figure><img alt="{html.escape(caption, quote=True)}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def table(self, rows: Sequence[Sequence[Any]]) -> None:
        head, *body = rows
        cells = lambda row, tag: "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in row)  # noqa: E731
        lines = "".join(f"<tr>{cells(r, 'td')}</tr>" for r in body)
        self.parts.append(f"<table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{lines}</tbody></table>")

    def save(self, path) -> Path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        body = "\n".join(self.parts)
        path.write_text(_PAGE.replace("{title}", html.escape(self.title)).replace("{body}", body), encoding="utf-8")
        return path


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #20262e; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; white-space: pre-wrap; }
figure { margin: 1rem 0; overflow-x: auto; } img { max-width: 100%; } figcaption { color: #5c6773; font-size: .9rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid #d9dee5; padding: .25rem .6rem; text-align: left; vertical-align: top; }
td { white-space: pre-wrap; overflow-wrap: anywhere; }
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""
