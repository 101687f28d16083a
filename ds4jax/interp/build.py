"""Directions from contrasting prompts, and sweeps over their strength."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ds4jax.errors import DS4Error
from ds4jax.interp.directions import Directions
from ds4jax.interp.steering import Steering
from ds4jax.model import match_sites

METHODS = ("mean", "pca")


def build_directions(
    lm, target: Sequence, control: Sequence, *, site: str = "layers.*.ffn_out", method: str = "mean",
    position: int | str = "last", normalize_pairs: bool = True, orthogonal: bool = True, operation: str | None = None,
    **options,
) -> Directions:  # fmt: skip
    """Unit directions from `control` to `target` prompts, one for each site.

    Args:
      lm: the model; target, control: as many prompts each (text, token ids or messages), pair by pair.
      site: a name or glob; a site of streams gives the mean over its streams.
      method: "mean" of the pairs' differences, or "pca", their first principal component (not centred, as repeng does).
      position: "last", "mean" over all, or a position, the same in every prompt.
      normalize_pairs: give each pair's difference length 1 first, so that none outweighs the others.
      orthogonal: take the component along the control prompts' mean out, so that what both have in common stays.
      operation: what the file is for; default: "add" for streams, else "project".
      options: for `lm.capture` (think, tools, batch_size).

    Returns:
      `Directions`; its info says how they were made, and for each site how well the projection on it tells target
      from control prompts: "auc", and "gap", the distance of the means in standard deviations.
    """
    target, control = list(target), list(control)
    if len(target) != len(control) or not target:
        raise DS4Error(f"{len(target)} target and {len(control)} control prompts: give pairs, as many of each")
    if method not in METHODS:
        raise DS4Error(f"method {method!r}: choose one of {', '.join(METHODS)}")
    sites = match_sites(site, lm.config)
    bad = next((s.name for s in sites if s.kind == "int32" or s.per_entry or "N" in s.shape), None)
    if bad:
        raise DS4Error(f"site {bad}: has no vector per token to build a direction from")
    how: dict[str, Any] = {"reduce": "mean"} if position == "mean" else {"reduce": "last"}
    if isinstance(position, int | np.integer):
        how["positions"] = int(position)
    elif position not in ("last", "mean"):
        raise DS4Error(f"position {position!r}: 'last', 'mean' or a number")
    a = lm.capture([*target, *control], [s.name for s in sites], **how, **options)
    n, vectors, scores = len(target), {}, {}
    streams = False
    for s in sites:
        rows = np.asarray(a[s.name], np.float32)
        if len(s.shape) == 2 and s.shape[0] == lm.config.hc_mult:
            rows, streams = rows.mean(1), True
        v = direction(rows[:n], rows[n:], method=method, normalize_pairs=normalize_pairs, orthogonal=orthogonal)
        if v is None:
            continue
        vectors[s.name] = v
        scores[s.name] = _separation(rows[:n] @ v.ravel() if rows.ndim == 2 else _along(rows[:n], v),
                                     rows[n:] @ v.ravel() if rows.ndim == 2 else _along(rows[n:], v))  # fmt: skip
    if not vectors:
        raise DS4Error("the target and control prompts give the same activations everywhere: choose other pairs")
    info = {
        "model": {"layers": lm.config.num_hidden_layers, "hidden_size": lm.config.hidden_size},
        "layers": lm.config.num_hidden_layers, "hidden_size": lm.config.hidden_size, "pairs": n, "method": method,
        "position": position, "normalize_pairs": normalize_pairs, "orthogonal_to_control_mean": orthogonal,
        "separation": scores,
    }  # fmt: skip
    return Directions(vectors, operation or ("add" if streams else "project"), info)


def _along(rows: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (rows * v).reshape(len(rows), -1).sum(-1)


def direction(
    target: np.ndarray, control: np.ndarray, *, method: str = "mean", normalize_pairs: bool = True,
    orthogonal: bool = True,
) -> np.ndarray | None:  # fmt: skip
    """A unit vector from rows [n, …] of control to those of target; None where they do not differ."""
    shape = target.shape[1:]
    t, c = (x.reshape(len(x), -1).astype(np.float64) for x in (target, control))
    d = t - c
    lengths = np.linalg.norm(d, axis=1, keepdims=True)
    noise = 1e-5 * np.maximum(np.linalg.norm(t, axis=1), np.linalg.norm(c, axis=1))[:, None]
    d, lengths = np.where(lengths > noise, d, 0), np.where(lengths > noise, lengths, 0)  # rounding is no difference
    if not (lengths > 0).any():
        return None
    if normalize_pairs:
        d = d / np.where(lengths > 0, lengths, 1)
    if method == "pca":
        v = np.linalg.svd(d, full_matrices=False)[2][0]
        v = v if (d @ v).mean() >= 0 else -v
    else:
        v = d.mean(0)
    if orthogonal:
        mean = c.mean(0)
        v = v - mean * (v @ mean) / max(mean @ mean, 1e-30)
    size = np.linalg.norm(v)
    return (v / size).astype(np.float32).reshape(shape) if size > 1e-12 else None


def _separation(target: np.ndarray, control: np.ndarray) -> dict[str, float]:
    above = (target[:, None] > control[None]).mean() + 0.5 * (target[:, None] == control[None]).mean()
    spread = np.sqrt((target.var() + control.var()) / 2)
    return {"auc": round(float(above), 4), "gap": round(float((target.mean() - control.mean()) / max(spread, 1e-9)), 3)}


# --- sweeps


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Texts and measures over strengths.

    rows: one dict for each scale and prompt: "scale", "prompt" (its number), "text", "finish_reason", "nll" (nats per
    token of the text under the model that is not steered: how strange it is to it), and the caller's measures.
    """

    prompts: list[Any]
    rows: list[dict[str, Any]]
    names: list[str]

    @property
    def scales(self) -> list[float]:
        return sorted({r["scale"] for r in self.rows})

    def means(self, name: str) -> np.ndarray:
        """The mean of a measure over the prompts, for each of `scales`."""
        return np.array([np.nanmean([r[name] for r in self.rows if r["scale"] == s]) for s in self.scales])

    def table(self) -> list[list[str]]:
        """Lines of a table: scale and the mean of each measure; the first is its header."""
        columns = {n: self.means(n) for n in self.names}
        lines = [["scale", *self.names]]
        return lines + [[f"{s:g}", *(f"{columns[n][i]:.3f}" for n in self.names)] for i, s in enumerate(self.scales)]

    def save(self, path) -> None:
        """As .json (everything), .svg or .png (a plot), or .html (plot, table, and the texts side by side)."""
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps({"prompts": self.prompts, "rows": self.rows}, ensure_ascii=False, indent=1))
            return
        from ds4jax.interp import plots

        figure = plots.sweep(self)
        if path.suffix in (".svg", ".png"):
            plots.save(figure, path)
            return
        if path.suffix != ".html":
            raise DS4Error(f"{path}: name it .json, .svg, .png or .html")
        page = plots.Page("Steering sweep")
        page.figure(figure, "Measures over the strength: means over the prompts, and each prompt's values.")
        page.table(self.table())
        for k, prompt in enumerate(self.prompts):
            page.heading(_words(prompt))
            mine = {r["scale"]: r for r in self.rows if r["prompt"] == k}
            page.table([["scale", "text"], *[[f"{s:g}", mine[s]["text"]] for s in self.scales]])
        page.save(path)


def _words(prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], Mapping):
        return str(prompt[-1].get("content", ""))
    return str(list(prompt))


def sweep(
    lm, steering: Steering, prompts: Sequence, scales: Sequence[float], *,
    measures: Mapping[str, Callable[[str], float]] | None = None, max_tokens: int = 60, temperature: float = 0.0,
    seed: int = 0, **options,
) -> Sweep:  # fmt: skip
    """Continue every prompt at every strength, all in one batch.

    Args:
      steering: what to scale; its strengths are multiplied by each of `scales`.
      measures: {name: function of the text}, over what is written.
      options: for `lm.generate` (think, tools, top_p, …).
    """
    prompts, scales = list(prompts), [float(s) for s in scales]
    if not prompts or not scales:
        raise DS4Error("sweep: give at least one prompt and one scale")
    each = {s: steering.scaled(s) for s in scales}
    pairs = [(s, k) for s in scales for k in range(len(prompts))]
    outs = lm.generate(
        [prompts[k] for _, k in pairs], max_tokens=max_tokens, temperature=temperature, seed=[seed] * len(pairs),
        steering=[each[s] if s else None for s, _ in pairs], **options,
    )  # fmt: skip
    shape = {k: options[k] for k in ("think", "tools") if k in options}
    rows = []
    for (s, k), out in zip(pairs, outs, strict=True):
        row = {"scale": s, "prompt": k, "text": out.text, "finish_reason": out.finish_reason}
        row["nll"] = _nll(lm, prompts[k], out, **shape)
        row |= {name: float(f(out.text)) for name, f in (measures or {}).items()}
        rows.append(row)
    return Sweep(prompts, rows, ["nll", *(measures or {})])


def _nll(lm, prompt, out, think: bool | str = False, tools=None) -> float:
    tokens, _ = lm._prepare(prompt, think, tools)
    whole = np.asarray(tokens + out.tokens)
    whole = whole[: lm.context]
    logits = np.asarray(lm.logits(whole))[len(tokens) - 1 : -1].astype(np.float64)
    chosen = whole[len(tokens) :]
    if not len(chosen):
        return float("nan")
    peak = logits.max(-1, keepdims=True)
    log_z = peak[:, 0] + np.log(np.exp(logits - peak).sum(-1))
    return float((log_z - logits[np.arange(len(chosen)), chosen]).mean())
