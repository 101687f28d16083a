"""Trains the small model "nano" within a budget of wall time.

    python -m scripts.train_nano --data DATA --out OUT --minutes 9 [--resume]

DATA holds what `scripts/nano/prepare.py` wrote: tokenizer.json, train.npz, heldout.npz. OUT receives

    nano-1.safetensors …   the weights in float16 and the experts' input statistics (see nano/pieces.py)
    log.csv, loss.svg      the losses and how they fell
    eval.csv               held-out bits per byte and recall, at intervals
    checkpoint/            an orbax checkpoint with the optimizer's state, for --resume (in --work, if given)

One dispatch runs several steps on the device, windows drawn there from the whole token array. Learning rate and phase
follow the clock, so the run ends trained out whatever a step costs. Phases change the window's length and whether
ratio-4 layers read all compressed entries (`dense`: the indexer learns which of them matter) or the indexer's choice
(`sparse`). With --qat the last part of the run trains the experts through the shipped file's 2-bit formats.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import dataclasses
import functools
import json
import math
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
from ds4jax.model.config import Config  # noqa: E402
from scripts import make_nano  # noqa: E402
from scripts.nano import muon, net, pieces, shards, windows  # noqa: E402

EVAL_LENGTH = 1024
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
    """Windows of `length` tokens until this fraction of the run has passed."""

    length: int
    dense: bool
    until: float


def parse_phases(text: str) -> list[Phase]:
    """`length:dense|sparse:share,…`; the shares are scaled to sum to one."""
    phases, total = [], 0.0
    for part in text.split(","):
        length, kind, share = part.split(":")
        if kind not in ("dense", "sparse"):
            raise SystemExit(f"--phases: {kind!r} must be dense or sparse")
        total += float(share)
        phases.append(Phase(int(length), kind == "dense", total))
    return [dataclasses.replace(p, until=p.until / total) for p in phases]


def rate(progress: float, step: int, args: argparse.Namespace) -> float:
    """Learning rate: linear warm-up in steps, constant, then linear to zero over the last `--decay` of the run."""
    down = min(1.0, (1.0 - min(progress, 1.0)) / args.cooldown)
    return args.lr * min(1.0, (step + 1) / args.warmup) * down


# --- programs ---------------------------------------------------------------------------------------------------------


def training_program(model: net.Net, opt: muon.Optimizer, phase: Phase, args: argparse.Namespace):
    """(state, tokens, sampler, knobs) → state, metrics: `--dispatch` steps of a phase. knobs: float32
    [learning rate now, change per step, bias rate]."""
    T = phase.length
    B = max(1, args.tokens_per_step // T)
    weights = net.LossWeights(args.answer_weight, args.mtp_weight, args.kl_weight, args.z_weight, args.balance_weight)

    def step(state: dict, flat, sampler, knobs):
        key, now = jax.random.split(state["key"])
        tokens, answers = windows.draw(flat, sampler, now, B, T)

        def loss_of(params):
            return net.objective(
                model, net.perturb(params, state["delta"]) | state["ids"], tokens, answers, weights, args.remat
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
            "key": key,
            "step": state["step"] + 1,
        }
        return state, metrics | {"loss": loss, "norm": norm, "lr": knobs[0]}

    def program(state, flat, sampler, knobs):
        def body(carry, _):
            state, lr = carry
            state, metrics = step(state, flat, sampler, knobs.at[0].set(lr))
            return (state, lr + knobs[1]), metrics

        (state, _), metrics = jax.lax.scan(body, (state, knobs[0]), None, length=args.dispatch)
        return state, metrics

    return jax.jit(program, donate_argnums=0)


def evaluation_program(model: net.Net):
    """(params, ids, delta, tokens [n, B, T + 2], mask) → sums per row [n, B, 6], see `net.evaluate`."""

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


def compile_training(model: net.Net, opt: muon.Optimizer, phase: Phase, args: argparse.Namespace, *shapes):
    """A phase's program; one that recomputes layers in its backward pass if it would not fit the device otherwise."""
    name = f"{'dense' if phase.dense else 'sparse'} {phase.length}"
    compiled = compile_program(name, training_program(model, opt, phase, args), *shapes)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    if scratch(compiled) > limit - (4 << 30) and not args.remat:
        say(f"{name}: more than the device's {limit / 2**30:.0f} GiB; once more, recomputing layers")
        args = argparse.Namespace(**vars(args) | {"remat": True})
        compiled = compile_program(name, training_program(model, opt, phase, args), *shapes)
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
        "key": jax.random.key_data(jax.random.key(args.seed + 1)),
        "step": jnp.zeros((), jnp.int32),
    }
    return state


def _as_flat(state: dict) -> dict[str, Any]:
    return {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}


def save_checkpoint(folder: Path, state: dict, seconds: float) -> None:
    """The whole state as an orbax checkpoint `folder`/<step>; older ones go."""
    import orbax.checkpoint as ocp

    step = int(state["step"])
    with ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
        content = {"state": _as_flat(state), "seconds": np.array([seconds])}
        manager.save(step, args=ocp.args.StandardSave(content), force=True)
        manager.wait_until_finished()
    say(f"checkpoint at step {step}")


def restore_checkpoint(folder: Path, state: dict) -> tuple[dict, float]:
    """The newest checkpoint in the structure of `state`, and the seconds trained until then."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise SystemExit(f"--resume: {folder} holds no checkpoint")
        like = {"state": _as_flat(state), "seconds": np.zeros(1)}
        content = manager.restore(step, args=ocp.args.StandardRestore(like))
    leaves = [jnp.asarray(content["state"][k]) for k in sorted(content["state"])]
    say(f"resumed from step {step}")
    return jax.tree.unflatten(jax.tree.structure(state), leaves), float(content["seconds"][0])


# --- the run ----------------------------------------------------------------------------------------------------------


class Evaluator:
    """Held-out bits per byte of running text and recall of needles, of the weights as trained and as shipped."""

    def __init__(self, program, heldout: dict[str, shards.Group], tokenizer: Tokenizer, args: argparse.Namespace):
        self.program, self.batch = program, args.eval_batch
        sizes = np.array([len(tokenizer.piece(i)) for i in range(tokenizer.vocab_size)], np.int64)
        T = args.eval_length
        text = windows.text_windows(heldout, T, args.eval_windows)
        self.bytes = int(sizes[text[:, 1 : T + 1]].sum())
        sets = {"text": (text, np.ones(text.shape, bool))}
        for name in sorted(n for n in heldout if n.startswith("needle_")):
            tokens, mask = windows.recall_windows(heldout[name], T, args.eval_windows // 2)
            if len(tokens) >= 8:
                sets[name] = (tokens, mask)
        rows, masks, self.parts, at = [], [], {}, 0
        for name, (tokens, mask) in sets.items():
            self.parts[name] = slice(at, at + len(tokens))
            rows.append(tokens)
            masks.append(mask)
            at += len(tokens)
        tokens, mask = np.concatenate(rows), np.concatenate(masks)
        pad = args.eval_rows - len(tokens)
        if pad < 0:
            raise SystemExit(f"evaluation has {len(tokens)} rows, more than {args.eval_rows}; lower --eval-windows")
        shape = (-1, self.batch, T + 2)
        self.tokens = jnp.asarray(np.pad(tokens, ((0, pad), (0, 0))).reshape(shape))
        self.mask = jnp.asarray(np.pad(mask, ((0, pad), (0, 0))).reshape(shape))

    def __call__(self, state: dict, delta: dict) -> dict[str, float]:
        sums = np.asarray(self.program(state["params"], state["ids"], delta, self.tokens, self.mask))
        sums = sums.reshape(-1, 6).astype(np.float64)
        out = {}
        for name, rows in self.parts.items():
            nll, right, count, _, right2, count2 = sums[rows].sum(axis=0)
            if name == "text":
                out["bits_per_byte"] = nll / math.log(2) / self.bytes
                out["next_accuracy"], out["mtp_accuracy"] = right / count, right2 / max(count2, 1)
            else:
                out[name] = right / max(count, 1)
        return out


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
    left.set(xlabel="million tokens", ylabel="training loss, nats a token", ylim=(1.0, 6.0))
    left.legend(frameon=False)
    if "kl" in rows[0]:
        right.plot(x, means("kl"), lw=0.8, color="tab:green", label="indexer's KL divergence, nats")
    for kind, marker in (("as trained", "o-"), ("through 2-bit experts", "s--")):
        at = [(float(m["tokens"]) / 1e6, float(m["bits_per_byte"])) for m in marks if m["weights"] == kind]
        if at:
            right.plot(*zip(*at, strict=True), marker, ms=3, lw=0.8, label=f"held-out bits per byte, {kind}")
    trained = [m for m in marks if m["weights"] == "as trained"]
    needles = [name for name in (trained[0] if trained else {}) if name.startswith("needle_")]
    if needles:
        share = [sum(float(m[n]) for n in needles) / len(needles) for m in trained]
        right.plot([float(m["tokens"]) / 1e6 for m in trained], share, "^-", ms=3, lw=0.8, color="tab:red",
                   label="held-out recall, share of answers' tokens")  # fmt: skip
    right.set(xlabel="million tokens", ylim=(0, 2.4))
    right.legend(frameon=False)
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
    if args.shortcuts:
        net.use_shortcuts()
    work: Path = args.work or out
    jax.config.update("jax_compilation_cache_dir", str(args.cache or work / "xla-cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)
    say(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")

    tokenizer = Tokenizer.from_json(args.data / "tokenizer.json")
    config = pieces.with_vocabulary(Config.from_json(args.config), len(tokenizer), tokenizer.bos_id, tokenizer.eos_id)
    phases = parse_phases(args.phases)
    nets = {dense: net.Net(config, dtype=jnp.dtype(args.dtype), dense=dense) for dense in (False, True)}
    opt = muon.optimizer(config, muon=not args.no_muon, adam_lr=args.adam_lr, decay=args.weight_decay, clip=args.clip)

    # compile everything while the data are read and the first phase runs
    size = windows.capacity(args.data / "train.npz")
    state_shapes = jax.eval_shape(lambda: fresh_state(nets[False], opt, args))
    flat_shape, sampler_shape = jax.ShapeDtypeStruct((size,), jnp.uint16), windows.shape_of_sampler()
    knobs_shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    pool = concurrent.futures.ThreadPoolExecutor(4)
    programs = []
    for phase in phases:
        programs.append(
            pool.submit(
                compile_training,
                nets[phase.dense],
                opt,
                phase,
                args,
                state_shapes,
                flat_shape,
                sampler_shape,
                knobs_shape,
            )
        )
        if phase is phases[0]:
            time.sleep(0.2)  # the first program is traced first
    rows = (args.eval_rows // args.eval_batch, args.eval_batch, args.eval_length + 2)
    eval_program = pool.submit(
        compile_program, "evaluation", evaluation_program(nets[False]), state_shapes["params"], state_shapes["ids"],
        state_shapes["delta"], jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, jnp.bool_),
    )  # fmt: skip
    # input statistics of the experts, on windows of training text
    T_stats = min(args.eval_length, phases[-1].length)
    B_stats = max(1, min(16, args.tokens_per_step // T_stats))

    def measure(weights, flat, sampler, key):
        return net.importance(nets[False], weights, windows.draw(flat, sampler, key, B_stats, T_stats)[0])

    key_shape = jax.ShapeDtypeStruct((2,), jnp.uint32)
    measuring = pool.submit(
        compile_program, "statistics", jax.jit(measure), state_shapes["params"] | state_shapes["ids"], flat_shape,
        sampler_shape, key_shape,
    )  # fmt: skip
    experts = {p: s for p, s in state_shapes["params"].items() if ".ffn.experts." in p}
    if args.qat:  # find out now, not at the end, if an encoder fails
        counts = {net.expert_inputs(p): jax.ShapeDtypeStruct(s.shape[::2], jnp.float32) for p, s in experts.items()}
        encoder = pool.submit(compile_program, "encoders", jax.jit(net.quantization_error), experts, counts)

    groups = shards.read(args.data / "train.npz")
    heldout = shards.read(args.data / "heldout.npz")
    host_flat, begins = windows.flatten(groups, size)
    flat = jnp.asarray(host_flat)
    mix = windows.MIX | (json.loads(args.mix) if args.mix else {})
    samplers = [jax.device_put(windows.sampler(groups, begins, p.length, mix)) for p in phases]
    stats_sampler = jax.device_put(windows.sampler(groups, begins, T_stats, mix))
    say(f"{sum(len(g.tokens) for g in groups.values()) / 1e6:.1f} M training tokens")

    state = jax.jit(functools.partial(fresh_state, nets[False], opt, args))()
    count = sum(w.size for w in state["params"].values())
    say(f"{count / 1e6:.2f} M parameters")
    before = 0.0
    if args.resume:
        state, before = restore_checkpoint(work / "checkpoint", state)
    step = int(state["step"])
    log, evals = Log(out / "log.csv", args.resume), Log(out / "eval.csv", args.resume)
    no_delta = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state_shapes["delta"])

    def statistics(state) -> dict:
        total = None
        for i in range(args.importance_batches):
            key = jax.random.key_data(jax.random.key(1000 + i))
            one = measuring.result()(state["params"] | state["ids"], flat, stats_sampler, key)
            total = one if total is None else jax.tree.map(jnp.add, total, one)
        return jax.tree.map(lambda a: a / args.importance_batches, total)

    def encode(state) -> dict:
        return encoder.result()({p: state["params"][p] for p in no_delta}, stats)

    def ready(*programs) -> bool:
        """Whether these can run now; a run of so many steps waits for them, one against the clock does not."""
        return bool(args.steps) or all(p.done() for p in programs)

    first = programs[0].result()
    begin = elapsed()
    end = args.minutes * 60 - args.reserve if not args.steps else math.inf
    # progress counts the seconds of training alone, in all runs together
    budget = before + max(1.0, end - begin)

    def progress(ahead: float = 0.0) -> float:
        if args.steps:
            return step / args.steps
        return min(1.0, (before + elapsed() - begin + ahead) / budget)

    evaluator = Evaluator(eval_program.result(), heldout, tokenizer, args)
    tokens_seen = step * args.tokens_per_step
    at, stats, dispatch_seconds, last_eval, last_save = 0, None, 1.0, elapsed(), elapsed()
    compiled, pending, result, next_encoding = first, None, {}, 0
    marks = [elapsed(), step]

    def report(metrics, step_then: int, tokens_then: int, phase_at: int) -> None:
        rows = {k: np.asarray(v) for k, v in metrics.items()}
        now = elapsed()
        speed = (step_then - marks[1]) * args.tokens_per_step / max(1e-9, now - marks[0])
        marks[:] = [now, step_then]
        row = {
            "step": step_then, "seconds": round(before + now, 1), "tokens": tokens_then,
            "tokens_per_second": float(speed), "phase": phase_at,
        }  # fmt: skip
        row |= {k: float(np.mean(v)) for k, v in rows.items()}
        if not np.isfinite(rows["norm"]).all():
            say(f"step {step_then}: {int((~np.isfinite(rows['norm'])).sum())} steps without a finite gradient left out")
        log.write(row)
        if (step_then // args.dispatch) % max(1, args.log_every // args.dispatch) == 0:
            parts = " ".join(f"{k} {row[k]:.3f}" for k in ("ce", "mtp", "kl", "imbalance", "norm") if k in row)
            say(f"step {step_then} {parts} lr {row['lr']:.1e} {speed / 1e3:.0f} k tokens/s, {100 * progress():.0f} %")

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
            save_checkpoint(work / "checkpoint", state, before + elapsed() - begin)

    say("training")
    stop = args.leave_after * 60 if args.leave_after else math.inf
    while progress() < 1.0 and elapsed() < stop:
        here = progress()
        while at + 1 < len(phases) and here >= phases[at].until and ready(programs[at + 1]):
            at += 1
            compiled = programs[at].result()
            say(f"step {step}: windows of {phases[at].length} tokens, {'dense' if phases[at].dense else 'sparse'}")
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
        state, metrics = compiled(state, flat, samplers[at], knobs)
        step += args.dispatch
        tokens_seen += args.dispatch * max(1, args.tokens_per_step // phases[at].length) * phases[at].length
        # one dispatch stays in flight while the one before is read
        if pending is not None:
            clock = marks[0]
            report(*pending)
            dispatch_seconds = 0.5 * dispatch_seconds + 0.5 * (marks[0] - clock)
        pending = (metrics, step, tokens_seen, at)
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
    add("--resume", action="store_true", help="go on from the checkpoint; --minutes counts this run alone")
    add("--seed", type=int, default=0)
    add("--dtype", default="bfloat16")
    add("--phases", default="1024:dense:0.45,2048:sparse:0.35,4096:sparse:0.2", help="length:dense|sparse:share,…")
    add("--tokens-per-step", type=int, default=32768)
    add("--dispatch", type=int, default=10, help="steps per dispatch")
    add("--lr", type=float, default=6e-3)
    add("--adam-lr", type=float, default=0.5, help="Adam's learning rate as a share of --lr")
    add("--no-muon", action="store_true", help="Adam for everything")
    add("--warmup", type=int, default=200, help="steps")
    add("--cooldown", type=float, default=0.6, help="share of the run over which the learning rate falls to zero")
    add("--weight-decay", type=float, default=0.1)
    add("--clip", type=float, default=1.0)
    add("--answer-weight", type=float, default=net.LossWeights.answer)
    add("--mtp-weight", type=float, default=net.LossWeights.mtp)
    add("--kl-weight", type=float, default=net.LossWeights.kl)
    add("--z-weight", type=float, default=net.LossWeights.z)
    add("--balance-weight", type=float, default=net.LossWeights.balance)
    add("--bias-rate", type=float, default=1e-3, help="step of the routers' selection biases")
    add("--mix", help='JSON: {"group": share, …} changes to the mix of groups')
    add("--qat", type=float, default=0.25, help="last share of the run trained through the 2-bit formats; 0: none")
    add("--qat-every", type=int, default=20, help="steps between encodings")
    add("--importance-batches", type=int, default=4)
    add("--remat", action="store_true", help="recompute layers in the backward pass: less memory, a third slower")
    add("--no-shortcuts", dest="shortcuts", action="store_false", help="the model's own Sinkhorn and selection")
    add("--eval-seconds", type=float, default=60.0)
    add("--eval-length", type=int, default=EVAL_LENGTH)
    add("--eval-windows", type=int, default=128)
    add("--eval-batch", type=int, default=16)
    add("--eval-rows", type=int, default=512)
    add("--save-seconds", type=float, default=180.0)
    add("--no-checkpoints", dest="checkpoints", action="store_false")
    add("--cache", type=Path, help="folder of compiled programs; default WORK/xla-cache")
    add("--log-every", type=int, default=100, help="steps")
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse())
