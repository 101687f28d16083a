"""Trains the small model "nano" within a budget of wall time.

    python -m scripts.train_nano --data DATA --out OUT --minutes 22 [--init ds4jax/assets/nano.gguf] [--resume]

DATA holds what `scripts/nano/prepare.py` wrote: tokenizer.json and the running text of train.npz and heldout.npz. All
else is written while training runs, by other processes (see nano/stream.py). OUT receives

    nano-1.safetensors …   the weights in float16 and the experts' input statistics (see nano/pieces.py)
    log.csv, loss.svg      the losses and how they fell
    eval.csv               held-out bits per byte and tasks, at intervals
    checkpoint/            an orbax checkpoint with the optimizer's state, for --resume (in --work, if given)

One dispatch runs several steps on the device. Learning rate and phase follow the clock, so the run ends trained out
whatever a step costs. Phases change the windows' lengths, one or several in turns, and whether ratio-4 layers read all
compressed entries (`dense`: the indexer learns which of them matter) or the indexer's choice (`sparse`). With --qat the
last part of the run trains the experts through the shipped file's 2-bit formats.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

START = time.monotonic()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from ds4jax.chat.tokenizer import Tokenizer  # noqa: E402
from ds4jax.errors import DS4Error  # noqa: E402
from ds4jax.model.config import Config  # noqa: E402
from ds4jax.quant.api import set_kernels  # noqa: E402
from scripts import make_nano  # noqa: E402
from scripts.nano import muon, net, pieces, shards, stream, tasks, windows  # noqa: E402

EVAL_LENGTH = 1024
EVAL_ITEMS = {
    "sums": ("sums", {"think": True}, False),
    "dates": ("dates", {"think": True}, False),
    "register": ("register", {}, False),
    "tools": ("tools", {}, False),
    "recall_256": ("recall", {"tokens": 256, "far": 0.6, "questions": 1}, False),
    "recall_1k": ("recall", {"tokens": 930, "far": 0.6, "questions": 1}, False),
    "recall_4k": ("recall", {"tokens": 3800, "far": 0.6, "questions": 1}, True),
}
"""What the run is judged by as it goes, in teacher-forced passes: task, its options, and whether windows are long."""
COMPILER_OPTIONS = {
    # matmuls this small gain little from Triton's autotuning, which would cost minutes of compile time
    "gpu": {"xla_gpu_enable_triton_gemm": False},
}


def elapsed() -> float:
    return time.monotonic() - START


def say(text: str) -> None:
    print(f"[{elapsed():6.1f}] {text}", flush=True)


@dataclasses.dataclass(frozen=True)
class Phase:
    """Dispatches of windows of these lengths in turns until this fraction of the run has passed."""

    lengths: tuple[int, ...]
    dense: bool
    until: float

    @property
    def kind(self) -> str:
        return "dense" if self.dense else "sparse"


def parse_phases(text: str) -> list[Phase]:
    """`length[+length…]:dense|sparse:share,…`; the shares are scaled to sum to one."""
    phases, total = [], 0.0
    for part in text.split(","):
        lengths, kind, share = part.split(":")
        if kind not in ("dense", "sparse"):
            raise SystemExit(f"--phases: {kind!r} must be dense or sparse")
        total += float(share)
        phases.append(Phase(tuple(map(int, lengths.split("+"))), kind == "dense", total))
    return [dataclasses.replace(p, until=p.until / total) for p in phases]


def rate(progress: float, step: int, args: argparse.Namespace) -> float:
    """Learning rate: linear warm-up in steps, constant, then linear to zero over the last `--decay` of the run."""
    down = min(1.0, (1.0 - min(progress, 1.0)) / args.cooldown)
    return args.lr * min(1.0, (step + 1) / args.warmup) * down


# --- programs ---------------------------------------------------------------------------------------------------------


def batch(T: int, args: argparse.Namespace) -> int:
    """Windows of T tokens in a step."""
    return max(1, args.tokens_per_step // T)


def training_program(model: net.Net, opt: muon.Optimizer, args: argparse.Namespace):
    """(state, chunk, knobs) → state, metrics: `--dispatch` steps on the rows of a chunk. knobs: float32
    [learning rate now, change per step, bias rate]."""
    weights = net.LossWeights(args.mtp_weight, args.distil, args.kl_weight, args.z_weight, args.balance_weight)

    def step(state: dict, rows, knobs):
        tokens, emphasis = windows.unpack(rows, args.class_weights)

        def loss_of(params):
            return net.objective(
                model, net.perturb(params, state["delta"]) | state["ids"], tokens, emphasis, weights, args.remat
            )

        (loss, (metrics, loads)), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
        params, opt_state, norm = opt.update(grads, state["opt"], state["params"], knobs[0])
        params = net.balance_bias(params, loads, knobs[2])
        # a step whose gradient is not finite changes nothing
        good = jnp.isfinite(norm)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)  # noqa: E731
        state = state | {
            "params": keep(params, state["params"]),
            "opt": keep(opt_state, state["opt"]),
            "step": state["step"] + 1,
        }
        return state, metrics | {"loss": loss, "norm": norm, "lr": knobs[0]}

    def program(state, chunk, knobs):
        def body(carry, rows):
            state, lr = carry
            state, metrics = step(state, rows, knobs.at[0].set(lr))
            return (state, lr + knobs[1]), metrics

        steps = chunk.reshape(args.dispatch, -1, chunk.shape[-1])
        (state, _), metrics = jax.lax.scan(body, (state, knobs[0]), steps)
        return state, metrics

    return jax.jit(program, donate_argnums=0)


def evaluation_program(model: net.Net):
    """(params, ids, delta, tokens [n, B, T + 2], mask) → sums per row [n, B, 8], see `net.evaluate`."""

    def program(params, ids, delta, tokens, mask):
        seen = net.perturb(params, delta) | ids
        return jax.lax.map(lambda batch: net.evaluate(model, seen, *batch), (tokens, mask))

    return jax.jit(program)


TRACING = threading.Lock()  # one at a time, so that the first program is not held up by the others


def compile_program(name: str, program, *shapes):
    """Lower and compile, with the backend's options where it knows them."""
    with TRACING:
        begun = elapsed()
        lowered = program.lower(*shapes)
        traced = elapsed()
    options = COMPILER_OPTIONS.get(jax.default_backend())
    try:
        compiled = lowered.compile(compiler_options=options)
    except Exception as e:  # an option this version lacks
        if not options:
            raise
        say(f"{name}: compiling without {', '.join(options)} ({str(e).splitlines()[0][:120]})")
        compiled = lowered.compile()
    used = f", {scratch(compiled) / 2**30:.1f} GiB of scratch" if scratch(compiled) else ""
    say(f"{name}: traced in {traced - begun:.0f} s, compiled in {elapsed() - traced:.0f} s{used}")
    return compiled


def scratch(compiled) -> int:
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes if memory else 0


def compile_training(name: str, model: net.Net, opt: muon.Optimizer, args: argparse.Namespace, *shapes):
    """A phase's program; one that recomputes layers in its backward pass if it would not fit the device otherwise."""
    compiled = compile_program(name, training_program(model, opt, args), *shapes)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    if scratch(compiled) > limit - (4 << 30) and not args.remat:
        say(f"{name}: more than the device's {limit / 2**30:.0f} GiB; once more, recomputing layers")
        args = argparse.Namespace(**vars(args) | {"remat": True})
        compiled = compile_program(name, training_program(model, opt, args), *shapes)
    return compiled


# --- state ------------------------------------------------------------------------------------------------------------


def fresh_state(model: net.Net, opt: muon.Optimizer, args: argparse.Namespace) -> dict[str, Any]:
    weights = model.init(args.seed)
    ids = {p: w for p, w in weights.items() if w.dtype == jnp.int32}
    params = {p: w for p, w in weights.items() if p not in ids}
    experts = {p: jnp.zeros_like(w) for p, w in params.items() if ".ffn.experts." in p} if args.qat else {}
    state = {
        "params": params,
        "ids": ids,
        "opt": opt.init(params),
        "delta": experts,
        "step": jnp.zeros((), jnp.int32),
    }
    return state


def begin_from(state: dict, path: Path) -> dict:
    """`state` with the weights of a GGUF or a folder of pieces. Raises DS4Error where shapes differ."""
    _, arrays = pieces.read(path)
    new = {}
    for part in ("params", "ids"):
        new[part] = {}
        for name, w in state[part].items():
            if name not in arrays or arrays[name].shape != w.shape:
                found = tuple(arrays[name].shape) if name in arrays else "missing"
                raise DS4Error(f"--init {path}: {name} is {found} and must be {tuple(w.shape)} for these sizes")
            new[part][name] = jnp.asarray(arrays[name], w.dtype)
    say(f"weights of {path}")
    return state | new


def _as_flat(state: dict) -> dict[str, Any]:
    return {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}


def save_checkpoint(folder: Path, state: dict, seconds: float, position: dict[int, int]) -> None:
    """State and the streams' positions as an orbax checkpoint `folder`/<step>; older ones go."""
    import orbax.checkpoint as ocp

    step = int(state["step"])
    with ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
        read = np.array(sorted(position.items()), np.int64)
        content = {"state": _as_flat(state), "seconds": np.array([seconds]), "position": read}
        manager.save(step, args=ocp.args.StandardSave(content), force=True)
        manager.wait_until_finished()
    say(f"checkpoint at step {step}")


def restore_checkpoint(folder: Path, state: dict, lengths: int) -> tuple[dict, float, dict[int, int]]:
    """The newest checkpoint in the structure of `state`, the seconds trained until then, and the streams' positions."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise SystemExit(f"--resume: {folder} holds no checkpoint")
        like = {"state": _as_flat(state), "seconds": np.zeros(1), "position": np.zeros((lengths, 2), np.int64)}
        content = manager.restore(step, args=ocp.args.StandardRestore(like))
    leaves = [jnp.asarray(content["state"][k]) for k in sorted(content["state"])]
    say(f"resumed from step {step}")
    position = {int(T): int(i) for T, i in content["position"]}
    return jax.tree.unflatten(jax.tree.structure(state), leaves), float(content["seconds"][0]), position


# --- the run ----------------------------------------------------------------------------------------------------------


class Evaluator:
    """Held-out bits per byte of running text and tasks, of the weights as trained and as shipped.

    A task's score is the share of items whose reply (of recall: the value) is the likeliest at every token given what
    stands before it, which is what greedy writing would give; "…_nats" is the loss of its tokens. "agree_…" is how
    often the MTP layer's draft is what the model then finds likeliest.
    """

    def __init__(self, programs: dict[bool, Any], heldout: dict[str, shards.Group], tokenizer: Tokenizer, args):
        self.programs = programs
        sizes = np.array([len(tokenizer.piece(i)) for i in range(tokenizer.vocab_size)], np.int64)
        T = args.eval_length
        text = windows.text_windows(heldout, T, args.eval_windows)
        self.bytes = int(sizes[text[:, 1 : T + 1]].sum())
        sets = {False: {"text": (text, np.ones(text.shape, bool))}, True: {}}
        prose = stream.paragraphs(heldout, tokenizer)
        for name, (task, options, long) in EVAL_ITEMS.items():
            if long and True not in programs or args.shares.get(task, stream.SHARES.get(task, 0)) <= 0:
                continue
            extra = {"prose": prose} if task == "recall" else {}
            items = tasks.items(task, "heldout", f"{args.seed} eval", **options, **extra)
            some = list(itertools.islice(items, args.eval_items_long if long else args.eval_items))
            found = windows.item_windows(tokenizer, some, args.eval_long if long else T)
            if len(found[0]) >= 8:
                sets[long][name] = found
        self.rows, self.parts = {}, {}
        for long in programs:
            at, B, length = 0, eval_shape(args, long)[1], eval_shape(args, long)[2]
            for name, (tokens, _) in sets[long].items():
                self.parts[name] = long, slice(at, at + len(tokens))
                at += len(tokens)
            pad = ((0, eval_shape(args, long)[0] * B - at), (0, 0))
            if pad[0][1] < 0:
                raise SystemExit(f"evaluation has {at} windows, more than its rows; lower --eval-items")
            both = (np.concatenate([s[i] for s in sets[long].values()]) for i in range(2))
            self.rows[long] = tuple(jnp.asarray(np.pad(a, pad).reshape(-1, B, length)) for a in both)

    def __call__(self, state: dict, delta: dict) -> dict[str, float]:
        sums = {}
        for long, program in self.programs.items():
            got = np.asarray(program(state["params"], state["ids"], delta, *self.rows[long]))
            sums[long] = got.reshape(-1, len(net.SUMS)).astype(np.float64)
        out, drafts = {}, np.zeros(2)
        for name, (long, rows) in self.parts.items():
            part = dict(zip(net.SUMS, sums[long][rows].T, strict=True))
            total = {k: v.sum() for k, v in part.items()}
            if name == "text":
                out["bits_per_byte"] = total["nll"] / math.log(2) / self.bytes
                out["next_accuracy"] = total["right"] / total["count"]
                out["mtp_accuracy"] = total["right2"] / max(total["count2"], 1)
                out["agree_text"] = total["agree"] / max(total["drafts"], 1)
            else:
                out[name] = float(np.mean(part["right"] == part["count"]))
                out[f"{name}_nats"] = total["nll"] / max(total["count"], 1)
                drafts += total["agree"], total["drafts"]
        return out | {"agree_tasks": drafts[0] / max(drafts[1], 1)}


def eval_shape(args: argparse.Namespace, long: bool) -> tuple[int, int, int]:
    """Batches, windows in each, and tokens of a window in evaluation."""
    rows, B = (args.eval_items_long, args.eval_batch_long) if long else (
        args.eval_windows + args.eval_items * sum(not long for _, _, long in EVAL_ITEMS.values()), args.eval_batch
    )  # fmt: skip
    return -(-rows // B), B, (args.eval_long if long else args.eval_length) + 2


def plot(log: Path, evals: Path, out: Path) -> None:
    """Losses over tokens as an SVG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    with open(log) as f:
        rows = list(csv.DictReader(f))
    with open(evals) as f:
        marks = list(csv.DictReader(f))
    if not rows:
        return
    size = math.ceil(len(rows) / 100)  # means over so many rows keep the file small

    def means(name: str) -> list[float]:
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [sum(float(r[name]) for r in part) / len(part) for part in parts]

    x = [t / 1e6 for t in means("tokens")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for name, label in (("ce", "next token"), ("mtp", "token after next (MTP)")):
        if name in rows[0]:
            left.plot(x, means(name), lw=0.8, label=label)
    top = min(6.0, max(means("ce")[0], 2.0) * 1.2)
    left.set(xlabel="million tokens", ylabel="training loss, nats a token", ylim=(0, top))
    left.legend(frameon=False)
    if "kl" in rows[0]:
        right.plot(x, means("kl"), lw=0.8, color="tab:green", label="indexer's KL divergence, nats")
    for kind, marker in (("as trained", "o-"), ("through 2-bit experts", "s--")):
        at = [(float(m["tokens"]) / 1e6, float(m["bits_per_byte"])) for m in marks if m["weights"] == kind]
        if at:
            right.plot(*zip(*at, strict=True), marker, ms=3, lw=0.8, label=f"held-out bits per byte, {kind}")
    trained = [m for m in marks if m["weights"] == "as trained"]
    for name in EVAL_ITEMS:
        if trained and name in trained[0]:
            at = [float(m["tokens"]) / 1e6 for m in trained]
            right.plot(at, [float(m[name]) for m in trained], ".-", lw=0.6, label=f"{name}, share right")
    right.set(xlabel="million tokens", ylim=(0, 2.0))
    right.legend(frameon=False, fontsize=6, ncols=2)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


class Log:
    """A CSV file whose columns are those of its first row; --resume appends."""

    def __init__(self, path: Path, append: bool):
        self.path, self.fields = path, None
        if append and path.exists():
            with open(path) as f:
                self.fields = next(csv.reader(f), None)
        self.file = open(path, "a" if self.fields else "w", newline="")  # noqa: SIM115

    def write(self, row: dict) -> None:
        writer = csv.DictWriter(self.file, self.fields or list(row), extrasaction="ignore", restval="")
        if self.fields is None:
            self.fields = list(row)
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self.file.flush()


def train(args: argparse.Namespace) -> dict[str, Any]:
    """The whole run; returns the last evaluation."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    set_kernels("xla")  # kernels have no gradients
    if args.shortcuts:
        net.use_shortcuts()
    work: Path = args.work or out
    jax.config.update("jax_compilation_cache_dir", str(args.cache or work / "xla-cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)
    say(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")

    tokenizer = Tokenizer.from_json(args.data / "tokenizer.json")
    config = pieces.with_vocabulary(Config.from_json(args.config), len(tokenizer), tokenizer.bos_id, tokenizer.eos_id)
    if args.index_topk:
        config = dataclasses.replace(config, index_topk=args.index_topk)
    phases = parse_phases(args.phases)
    nets = {dense: net.Net(config, dtype=jnp.dtype(args.dtype), dense=dense) for dense in (False, True)}
    opt = muon.optimizer(config, muon=not args.no_muon, adam_lr=args.adam_lr, decay=args.weight_decay, clip=args.clip)
    lengths = sorted({T for p in phases for T in p.lengths})
    source = stream.Source(args.data, args.seed, stream.SHARES | args.shares, stream.LONG_SHARES | args.long_shares)

    # compile everything while the data are made and the first phase runs
    state_shapes = jax.eval_shape(lambda: fresh_state(nets[False], opt, args))
    knobs_shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    pool = concurrent.futures.ThreadPoolExecutor(6)
    programs = {}

    def compile_phase(phase: Phase) -> None:
        for T in phase.lengths:
            if (T, phase.dense) not in programs:
                chunk_shape = jax.ShapeDtypeStruct((args.dispatch * batch(T, args), T + 2), jnp.uint16)
                programs[T, phase.dense] = pool.submit(
                    compile_training, f"{phase.kind} {T}", nets[phase.dense], opt, args, state_shapes, chunk_shape,
                    knobs_shape,
                )  # fmt: skip
                time.sleep(0.2)  # traced in this order

    compile_phase(phases[0])
    eval_programs = {}
    for long in (False, True):
        if long and lengths[-1] < args.eval_long:
            continue
        rows = eval_shape(args, long)
        eval_programs[long] = pool.submit(
            compile_program, f"evaluation {rows[2] - 2}", evaluation_program(nets[False]), state_shapes["params"],
            state_shapes["ids"], state_shapes["delta"], jax.ShapeDtypeStruct(rows, jnp.int32),
            jax.ShapeDtypeStruct(rows, jnp.bool_),
        )  # fmt: skip
    for phase in phases[1:]:
        compile_phase(phase)
    # input statistics of the experts, on windows of training text
    T_stats = lengths[0]
    B_stats = max(1, min(16, batch(T_stats, args)))

    def measure(weights, rows):
        return net.importance(nets[False], weights, windows.unpack(rows)[0])

    measuring = pool.submit(
        compile_program, "statistics", jax.jit(measure), state_shapes["params"] | state_shapes["ids"],
        jax.ShapeDtypeStruct((B_stats, T_stats + 2), jnp.uint16),
    )  # fmt: skip
    experts = {p: s for p, s in state_shapes["params"].items() if ".ffn.experts." in p}
    if args.qat:  # find out now, not at the end, if an encoder fails
        counts = {net.expert_inputs(p): jax.ShapeDtypeStruct(s.shape[::2], jnp.float32) for p, s in experts.items()}
        encoder = pool.submit(compile_program, "encoders", jax.jit(net.quantization_error), experts, counts)

    heldout = shards.read(args.data / "heldout.npz")
    state = jax.jit(functools.partial(fresh_state, nets[False], opt, args))()
    count = sum(w.size for w in state["params"].values())
    say(f"{count / 1e6:.2f} M parameters")
    before, position = 0.0, {}
    if args.resume:
        state, before, position = restore_checkpoint(work / "checkpoint", state, len(lengths))
    elif args.init:
        state = begin_from(state, args.init)
    chunks = stream.Stream(source, {T: args.dispatch * batch(T, args) for T in lengths}, args.workers, position)
    step = int(state["step"])
    log, evals = Log(out / "log.csv", args.resume), Log(out / "eval.csv", args.resume)
    no_delta = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state_shapes["delta"])

    def statistics(state) -> dict:
        total, rows = None, chunks.take(T_stats)
        for i in range(args.importance_batches):
            some = np.resize(np.roll(rows, -i * B_stats, axis=0), (B_stats, T_stats + 2))
            one = measuring.result()(state["params"] | state["ids"], some)
            total = one if total is None else jax.tree.map(jnp.add, total, one)
        return jax.tree.map(lambda a: a / args.importance_batches, total)

    def encode(state) -> dict:
        return encoder.result()({p: state["params"][p] for p in no_delta}, stats)

    def ready(*programs) -> bool:
        """Whether these can run now; a run of so many steps waits for them, one against the clock does not."""
        return bool(args.steps) or all(p.done() for p in programs)

    for T in phases[0].lengths:
        programs[T, phases[0].dense].result()
    evaluator = Evaluator({long: p.result() for long, p in eval_programs.items()}, heldout, tokenizer, args)
    begin = elapsed()
    end = args.minutes * 60 - args.reserve if not args.steps else math.inf
    # progress counts the seconds of training alone, in all runs together
    budget = before + max(1.0, end - begin)

    def progress(ahead: float = 0.0) -> float:
        if args.steps:
            return step / args.steps
        return min(1.0, (before + elapsed() - begin + ahead) / budget)

    tokens_seen = step * args.tokens_per_step
    at, stats, dispatch_seconds, last_eval, last_save = 0, None, 1.0, elapsed(), elapsed()
    pending, result, next_encoding, turn, waited = None, {}, 0, 0, 0.0
    marks = [elapsed(), step]

    def report(metrics, step_then: int, tokens_then: int, phase_at: int, T: int) -> None:
        rows = {k: np.asarray(v) for k, v in metrics.items()}
        now = elapsed()
        speed = (step_then - marks[1]) * args.tokens_per_step / max(1e-9, now - marks[0])
        marks[:] = [now, step_then]
        row = {
            "step": step_then, "seconds": round(before + now, 1), "tokens": tokens_then,
            "tokens_per_second": float(speed), "phase": phase_at, "length": T,
        }  # fmt: skip
        row |= {k: float(np.mean(v)) for k, v in rows.items()}
        if not np.isfinite(rows["norm"]).all():
            say(f"step {step_then}: {int((~np.isfinite(rows['norm'])).sum())} steps without a finite gradient left out")
        log.write(row)
        if (step_then // args.dispatch) % max(1, args.log_every // args.dispatch) == 0:
            names = ("ce", "mtp", "agree", "kl", "imbalance", "norm")
            parts = " ".join(f"{k} {row[k]:.3f}" for k in names if k in row)
            say(f"step {step_then} {T} {parts} lr {row['lr']:.1e} {speed / 1e3:.0f} k tokens/s, "
                f"{100 * progress():.0f} %, waited {waited:.0f} s for data")  # fmt: skip

    def evaluate_now(final: bool = False) -> dict:
        out = {}
        kinds = [("as trained", no_delta)]
        if args.qat and (final or stats is not None):
            kinds.append(("through 2-bit experts", state["delta"]))
        for name, delta in kinds:
            scores = evaluator(state, delta)
            evals.write(
                {"step": step, "seconds": round(before + elapsed(), 1), "tokens": tokens_seen, "weights": name} | scores
            )
            say(f"step {step}, held out, {name}: " + " ".join(f"{k} {v:.3f}" for k, v in scores.items()))
            out[name] = scores
        return out

    def keep(final: bool = False) -> None:
        host = {p: np.asarray(w) for p, w in (state["params"] | state["ids"]).items()}
        numbers = {p: np.asarray(a) for p, a in (stats or {}).items()}
        notes = {"step": step, "tokens": tokens_seen, "qat": bool(stats), "final": final, "scores": result}
        pieces.save(out, config, host, numbers, notes)
        if args.checkpoints:
            save_checkpoint(work / "checkpoint", state, before + elapsed() - begin, chunks.position())

    if args.init and not step:
        result = evaluate_now()  # what it begins with
        last_eval = elapsed()
    say("training")
    stop = args.leave_after * 60 if args.leave_after else math.inf
    while progress() < 1.0 and elapsed() < stop:
        here = progress()
        while (
            at + 1 < len(phases)
            and here >= phases[at].until
            and ready(*(programs[T, phases[at + 1].dense] for T in phases[at + 1].lengths))
        ):
            at += 1
            say(f"step {step}: windows of {' and '.join(map(str, phases[at].lengths))} tokens, {phases[at].kind}")
        if args.qat and here >= 1 - args.qat and ready(encoder, measuring):
            if stats is None:
                stats = statistics(state)
                say(f"step {step}: experts through {sorted(set(net.EXPERT_FORMATS.values()))} from here")
            if step >= next_encoding:
                jax.block_until_ready(state["step"])
                clock = elapsed()
                state["delta"] = jax.block_until_ready(encode(state))
                # at most a tenth of the time goes into encoding
                per_step = dispatch_seconds / args.dispatch
                pause = max(args.qat_every, 0 if args.steps else math.ceil((elapsed() - clock) / (0.1 * per_step)))
                if next_encoding == 0:
                    say(f"encoding takes {elapsed() - clock:.2f} s, every {pause} steps")
                next_encoding = step + pause
        ahead = (step + args.dispatch) / args.steps if args.steps else progress(dispatch_seconds)
        lr, lr_end = rate(here, step, args), rate(ahead, step + args.dispatch, args)
        gamma = args.bias_rate * min(1.0, 2 * lr / args.lr)
        knobs = jnp.asarray([lr, (lr_end - lr) / args.dispatch, gamma], jnp.float32)
        T = phases[at].lengths[turn % len(phases[at].lengths)]
        turn += 1
        clock = elapsed()
        chunks.want(*phases[at].lengths)
        chunk = chunks.take(T)
        waited += elapsed() - clock
        state, metrics = programs[T, phases[at].dense].result()(state, chunk, knobs)
        step += args.dispatch
        tokens_seen += args.dispatch * batch(T, args) * T
        # one dispatch stays in flight while the one before is read
        if pending is not None:
            clock = marks[0]
            report(*pending)
            dispatch_seconds = 0.5 * dispatch_seconds + 0.5 * (marks[0] - clock)
        pending = (metrics, step, tokens_seen, at, T)
        if elapsed() - last_eval > args.eval_seconds:
            result = evaluate_now()
            last_eval = elapsed()
        if elapsed() - last_save > args.save_seconds:
            keep()
            last_save = elapsed()
    if pending is not None:
        report(*pending)
    say(f"trained for {step} steps, {tokens_seen / 1e6:.1f} M tokens")
    done = progress() >= 1.0 - 1e-9 or elapsed() < stop
    if done:
        stats = stats or statistics(state)  # the rounding that the last steps were trained for
        if args.qat:
            state["delta"] = encode(state)
    result = evaluate_now(final=done)
    keep(final=done)
    log.file.close()
    evals.file.close()
    plot(out / "log.csv", out / "eval.csv", out / "loss.svg")
    pool.shutdown(wait=True, cancel_futures=True)
    chunks.close()
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak:
        say(f"at most {peak / 2**30:.1f} GiB of device memory in use")
    if done and args.gguf:
        make_nano.make(out, args.data / "tokenizer.json", "q2", args.gguf, make_nano.LIMIT)
        say(f"{args.gguf}: {args.gguf.stat().st_size / 2**20:.2f} MiB")
    say("done" if done else "left early; go on with --resume")
    return result


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with tokenizer.json, train.npz, heldout.npz")
    add("--out", type=Path, required=True)
    add("--gguf", type=Path, help="write the file that ships here at the end, as make_nano does; not part of --minutes")
    add("--work", type=Path, help="folder for the checkpoint and compiled programs; default OUT")
    add("--config", type=Path, default=Path(__file__).resolve().parent.parent / "configs/nano.json")
    add("--minutes", type=float, default=9.0, help="wall time of the whole run, compilation and saving included")
    add("--leave-after", type=float, default=0.0, help="save and leave after so many minutes, to go on with --resume")
    add("--reserve", type=float, default=30.0, help="seconds kept for the last evaluation and saving")
    add("--steps", type=int, default=0, help="train for so many steps, whatever the time")
    add("--init", type=Path, help="begin with the weights of this GGUF or folder of pieces, of the same sizes")
    add("--resume", action="store_true", help="go on from the checkpoint; --minutes counts this run alone")
    add("--seed", type=int, default=0)
    add("--dtype", default="bfloat16")
    add("--phases", default="1024+4096:dense:0.35,1024+4096:sparse:0.65", help="length[+length]:dense|sparse:share,…")
    add("--index-topk", type=int, help="compressed entries that the indexer picks; default: the config's")
    add("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that make data")
    add("--shares", type=json.loads, default={}, help='JSON: {"group": share, …} changes to nano/stream.py\'s')
    add("--long-shares", type=json.loads, default={}, help="the same for windows above 2,048 tokens")
    add("--class-weights", type=json.loads, default=list(stream.WEIGHTS), help="JSON: loss weights of token classes")
    add("--tokens-per-step", type=int, default=32768)
    add("--dispatch", type=int, default=10, help="steps per dispatch")
    add("--lr", type=float, default=6e-3)
    add("--adam-lr", type=float, default=0.5, help="Adam's learning rate as a share of --lr")
    add("--no-muon", action="store_true", help="Adam for everything")
    add("--warmup", type=int, default=200, help="steps")
    add("--cooldown", type=float, default=0.6, help="share of the run over which the learning rate falls to zero")
    add("--weight-decay", type=float, default=0.1)
    add("--clip", type=float, default=1.0)
    add("--mtp-weight", type=float, default=net.LossWeights.mtp)
    add("--distil", type=float, default=net.LossWeights.distil, help="share of the MTP loss that is distillation")
    add("--kl-weight", type=float, default=net.LossWeights.kl)
    add("--z-weight", type=float, default=net.LossWeights.z)
    add("--balance-weight", type=float, default=net.LossWeights.balance)
    add("--bias-rate", type=float, default=1e-3, help="step of the routers' selection biases")
    add("--qat", type=float, default=0.25, help="last share of the run trained through the 2-bit formats; 0: none")
    add("--qat-every", type=int, default=20, help="steps between encodings")
    add("--importance-batches", type=int, default=4)
    add("--remat", action="store_true", help="recompute layers in the backward pass: less memory, a third slower")
    add("--no-shortcuts", dest="shortcuts", action="store_false", help="the model's own Sinkhorn and selection")
    add("--eval-seconds", type=float, default=60.0)
    add("--eval-length", type=int, default=EVAL_LENGTH)
    add("--eval-windows", type=int, default=128)
    add("--eval-batch", type=int, default=16)
    add("--eval-items", type=int, default=128, help="held-out items of each task")
    add("--eval-long", type=int, default=4096, help="tokens of long windows")
    add("--eval-items-long", type=int, default=64)
    add("--eval-batch-long", type=int, default=4)
    add("--save-seconds", type=float, default=180.0)
    add("--no-checkpoints", dest="checkpoints", action="store_false")
    add("--cache", type=Path, help="folder of compiled programs; default WORK/xla-cache")
    add("--log-every", type=int, default=100, help="steps")
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse())
