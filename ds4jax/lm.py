"""The public face: load a model, ask it for logits and text."""

from __future__ import annotations

import dataclasses
import numbers
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ds4jax import chat, runtime, weights
from ds4jax.chat.tokenizer import THINK_OPEN
from ds4jax.errors import DS4Error, suggestion
from ds4jax.interp import capture as reading
from ds4jax.interp import resolve
from ds4jax.interp.interventions import Positions
from ds4jax.interp.store import write_capture
from ds4jax.model import Config, Transformer, init_cache, match_sites
from ds4jax.quant.api import set_kernels
from ds4jax.runtime import memory
from ds4jax.runtime.edits import Edit, EditTable
from ds4jax.runtime.programs import MAX_TOP, chunk_length

NANO = Path(__file__).parent / "assets" / "nano.gguf"
MAX_SLOTS = 64
BAR_BYTES = 1 << 28  # a file that takes this long to load gets a progress bar

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Messages


@dataclasses.dataclass(frozen=True)
class Output:
    """One continuation.

    Attributes:
      text: what was written, without the ending token or stop string; for messages, the answer alone.
      tokens: the chosen tokens, the ending one included.
      finish_reason: "stop" (ending token or stop string), "length" (max_tokens), "context" (the context is full) or
        "tool_calls" (messages that end in a call).
      logprobs: natural log of each token's probability under the model, if asked for.
      top_logprobs: per token, the likeliest tokens as {token: logprob}, if asked for.
      prompt_tokens: how many tokens the prompt took.
      seed: what fixed the draws.
      reasoning: for messages, the text before </think>.
      tool_calls: for messages, the calls in OpenAI's form; `arguments` is a JSON string.
      errors: for messages, what was malformed in a tool call; such text stays in `text`.
      captured: by site the rows [n, …] of the passes that chose the tokens, or what was made of them, if asked for.
        Row i stands at position prompt_tokens - 1 + i.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    prompt_tokens: int = 0
    seed: int = 0
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    captured: dict[str, Any] | None = None

    @property
    def message(self) -> dict[str, Any]:
        """As an assistant message, to append to the conversation."""
        return {
            "role": "assistant",
            "content": self.text,
            "reasoning_content": self.reasoning,
            "tool_calls": self.tool_calls,
        }


@dataclasses.dataclass(frozen=True)
class Chunk:
    """News of one prompt while it is being continued.

    Attributes:
      index: which prompt.
      text: new text, raw: for messages it still holds </think> and DSML; `deltas` tells them apart.
      tokens: new tokens.
      deltas: for messages, new text, reasoning and pieces of tool calls (`chat.Delta`).
      output: the whole result, in the last chunk of each prompt.
    """

    index: int
    text: str
    tokens: list[int]
    deltas: list[chat.Delta]
    output: Output | None = None


def load(
    path: str | os.PathLike[str], *, context: int | None = None, dtype: str | None = None, kernels: str = "auto",
    cache_quant: bool = True, device: str | jax.Device | None = None, mtp: str | os.PathLike[str] | None = None,
    progress: bool | None = None, verbose: bool = True,
) -> LM:  # fmt: skip
    """Load a model.

    Args:
      path: a GGUF file (or the first of a split), a hub checkpoint's folder, an orbax folder that `ds4jax convert`
        wrote, or "nano", the small trained model inside the package.
      context: tokens a sequence may have, prompt and answer together; default 8192 or the model's limit.
      dtype: "float32" or "bfloat16"; default: by device.
      kernels: "auto" (kernels where the device runs them), "exact" (the same, and never one that rounds activations to
        8 bits), "pallas" (kernels or an error) or "xla" (plain JAX); for everything traced in this process from now on.
      cache_quant: simulate the rounding of the quantized cache the model was trained with.
      device: where to run; default: JAX's first device.
      mtp: a second GGUF that holds the multi-token-prediction layer.
      progress: show a progress bar, and a line while programs are compiled for long; default: a bar for large files.
        Both on terminals only.
      verbose: say in one line on stderr which device and implementation were chosen, and why.

    Raises:
      DS4Error: the file is damaged, foreign or incomplete, or it does not fit the device's memory.
    """
    if context is not None and (isinstance(context, bool) or not isinstance(context, int | np.integer)):
        raise DS4Error(f"context {context!r}: must be a whole number of tokens")
    runtime.use_compilation_cache()
    platform = runtime.choose(device=device, dtype=dtype, kernels=kernels)
    set_kernels(platform.kernels)
    if verbose:
        print(f"ds4jax: {platform}", file=sys.stderr)
    if str(path) == "nano":
        path = NANO
        if not path.exists():
            raise DS4Error(
                "the model nano is missing from this installation: install ds4jax again, or make it with "
                "scripts/train_nano.py"
            )
    elif not Path(path).expanduser().exists():
        raise DS4Error(f"{path}: no such file or folder{suggestion(str(path), ['nano'])}")
    with weights.open_checkpoint(path, mtp=mtp) as ckpt:
        config = ckpt.config
        limit = config.max_position_embeddings
        if context is not None and not 2 <= context <= limit:
            raise DS4Error(f"context {context}: this model takes 2 to {limit} tokens")
        context = context or min(8192, limit)
        memory.check_fits(config, ckpt.nbytes, platform.memory, slots=1, context=context, dtype=platform.dtype)
        tokenizer = _tokenizer(ckpt)
        bar = ckpt.nbytes > BAR_BYTES if progress is None else progress  # a bar shows on terminals only
        arrays = weights.load_arrays(ckpt, platform.device, progress=bar)
        size = ckpt.nbytes
    graphdef, state = runtime.build_model(config, arrays, dtype=platform.dtype, cache_quant=cache_quant)
    lm = LM(config, graphdef, state, tokenizer, platform=platform, context=context, weights_nbytes=size)
    lm.programs.announce = progress is not False
    return lm


def _tokenizer(ckpt: weights.Checkpoint) -> chat.Tokenizer | None:
    source, vocab = ckpt.tokenizer_source, ckpt.config.vocab_size
    if source is None or isinstance(source, Mapping) and "tokenizer.ggml.model" not in source:
        return None
    if not isinstance(source, Mapping):
        return chat.Tokenizer.from_json(source, vocab)
    tokenizer = chat.Tokenizer.from_gguf(source, str(ckpt.path))
    if len(tokenizer) > vocab:
        raise DS4Error(
            f"{ckpt.path}: the tokenizer has {len(tokenizer)} tokens and token_embd.weight {vocab} rows; convert the "
            "model again with its own tokenizer"
        )
    return tokenizer


class LM:
    """A loaded model. Make one with `ds4jax.load`.

    Attributes:
      config: sizes.
      tokenizer: None where the checkpoint has none; then prompts must be token ids.
      platform: device, dtype and implementation.
      context: tokens a sequence may have.
    """

    def __init__(
        self, config: Config, graphdef: nnx.GraphDef, state: nnx.State, tokenizer: chat.Tokenizer | None = None, *,
        platform: runtime.Platform, context: int, weights_nbytes: int = 0,
    ):  # fmt: skip
        self.config, self.tokenizer, self.platform, self.context = config, tokenizer, platform, context
        self.weights_nbytes = weights_nbytes
        unused = set()
        if tokenizer is not None:  # padding of the vocabulary has no text
            unused = tokenizer.unused_ids | set(range(len(tokenizer), config.vocab_size))
        self.programs = runtime.Programs(graphdef, state, unused)
        self._engine: runtime.Engine | None = None
        self._engine_wanted = 0
        self._run_number = 0  # of the latest generation

    @property
    def model(self) -> Transformer:
        """The Flax module, sharing these weights: for everything the methods here do not do."""
        return nnx.merge(self.programs.graphdef, self.programs.state)

    def __repr__(self) -> str:
        c = self.config
        return f"LM({c.num_hidden_layers} layers, D={c.hidden_size}, context={self.context}, {self.platform})"

    # --- teacher-forced logits

    def logits(
        self, tokens, *, steering: resolve.SteeringLike = None, interventions: resolve.InterventionsLike = None,
        prompt_len: int | None = None,
    ) -> jax.Array:  # fmt: skip
        """Logits of every position of given sequences.

        Args:
          tokens: int [T] or [B, T], numpy, JAX or lists; or one prompt as `generate` takes it (text gets its
            beginning-of-sentence token), which gives [T, V].
          steering, interventions: what is done to activations, see `generate`.
          prompt_len: how many tokens are prompt, for policies that ask; default: as the last reply's beginning shows.

        Returns:
          float32 [T, V] or [B, T, V]: row t is the prediction of token t + 1.

        Raises:
          DS4Error: no tokens, ids outside the vocabulary, or more tokens than the context.
        """
        if isinstance(tokens, str) or (isinstance(tokens, list) and tokens and isinstance(tokens[0], Mapping)):
            tokens = self._prepare(tokens, False, None)[0]
        try:
            rows = np.asarray(tokens)
        except ValueError:
            raise DS4Error("tokens must be integers shaped [T] or [B, T]; these rows have different lengths") from None
        if rows.ndim not in (1, 2) or not rows.size or not np.issubdtype(rows.dtype, np.integer):
            raise DS4Error(f"tokens must be integers shaped [T] or [B, T] with T ≥ 1, not {rows.dtype} {rows.shape}")
        if rows.min() < 0 or rows.max() >= self.config.vocab_size:
            raise DS4Error(f"tokens must be in 0 … {self.config.vocab_size - 1}; found {rows.min()} … {rows.max()}")
        batch = rows if rows.ndim == 2 else rows[None]
        B, T = batch.shape
        if T > self.context:
            raise DS4Error(f"{T} tokens do not fit the context of {self.context}: load with a larger context")
        edits, region = self._teacher_forced_edits(batch, steering, interventions, prompt_len)
        out, at = [], 0
        with jax.default_device(self.platform.device):
            # a few capacities, so that few programs are compiled
            capacity = min(self.config.max_position_embeddings, max(256, 1 << (T - 1).bit_length()))
            cache = init_cache(self.config, B, capacity, self.platform.dtype)
            while at < T:
                length = chunk_length(T - at, B)
                n = min(length, T - at)
                piece = np.zeros((B, length), np.int32)
                piece[:, :n] = batch[:, at : at + n]
                more = () if edits is None else (edits, region[:, at : at + length])
                logits, cache = self.programs.logits(cache, piece, np.full((B,), n, np.int32), *more)
                out.append(logits[:, :n])
                at += n
            joined = out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)
        return joined if rows.ndim == 2 else joined[0]

    def _teacher_forced_edits(self, batch: np.ndarray, steering, interventions, prompt_len):
        """The edits of rows [B, T] and the region of each token, padded so that any chunk can be cut from it."""
        if steering is None and not interventions:
            return None, None
        B, T = batch.shape
        every = resolve.prompt_edits(steering, interventions, [prompt_len or T] * B, self.config, given=[T] * B)
        table = self._edit_table(B)
        region = np.zeros((B, T + max(runtime.programs.CHUNKS)), np.int8)
        for b, edits in enumerate(every):
            table.set(b, edits)
            region[b, :T] = resolve.regions(self.tokenizer, batch[b].tolist(), prompt_len, edits)
        return table.edits(), region

    def _edit_table(self, slots: int) -> EditTable:
        self._know_regions()
        return EditTable(self.config, slots, self.programs.regions, self.platform.device)

    def _know_regions(self) -> None:
        """Make the tables that follow a reply, before the first intervention that may need them."""
        if self.programs.regions is None:
            self.programs.regions = resolve.region_tables(self.tokenizer, self.config.vocab_size)

    # --- activations

    def capture(
        self, prompts: Prompt | Sequence[Prompt], sites: str | Sequence[str], *, positions: Positions = None,
        reduce: reading.Reduce = None, steering: resolve.SteeringLike = None,
        interventions: resolve.InterventionsLike = None, prompt_len: int | Sequence[int | None] | None = None,
        think: bool | str = False, tools: Sequence[Mapping[str, Any]] | None = None, batch_size: int | None = None,
        out: str | os.PathLike[str] | None = None, shard_bytes: int = 256 << 20, progress: bool = False,
    ):  # fmt: skip
        """Read activations in one pass over prompts.

        Only layers up to the last that is asked for are computed, and only what is asked for leaves the device.

        Args:
          prompts: as in `generate`; or token ids [T] or [B, T].
          sites: names or globs: "layers.*.ffn_out", "layers.{3,7}.router.*"; `ds4jax.interp.sites(lm)` lists them.
          positions: an index, a slice or several of them, negative from the end; default: all.
          reduce: None for every position; "mean"; "last"; or a function of the rows [n, …] of one prompt (a JAX array),
            whose result alone leaves the device.
          steering, interventions: what is done to activations meanwhile, see `generate`; a site is read after they
            changed it.
          prompt_len: how many tokens are prompt, for policies that ask; default: as the last reply's beginning shows.
          think, tools: for messages, as in `generate`.
          batch_size: prompts in one pass; default 8.
          out: a folder to write to instead, for captures larger than memory: `ds4jax.interp.open_capture` reads it.
            Called again after an interruption it goes on where it stopped.
          shard_bytes: about how large the folder's files become, and how much memory waiting results take.
          progress: with `out`, show a progress bar on terminals.

        Returns:
          {site: NumPy array [n, …], or what `reduce` makes of it} for one prompt. For several, each value is stacked
          over the prompts where shapes agree, and is a list otherwise. With `out`, the opened folder.

        Raises:
          DS4Error: an unknown site (with the nearest names), positions outside a prompt, and as `generate`.
        """
        array = isinstance(prompts, np.ndarray | jax.Array) and np.ndim(prompts) == 2
        many, single = (list(np.asarray(prompts)), False) if array else _as_list(prompts)
        rows = [self._prepare(p, think, tools)[0] for p in many]
        if any(len(r) == 0 for r in rows):
            raise DS4Error("the prompt is empty: give at least one token")
        flags = [_tools_in_play(p, tools) for p in many]
        self._know_regions()
        plan = reading.Plan.make(
            self, rows, sites, positions=positions, reduce=reduce, steering=steering, interventions=interventions,
            prompt_len=prompt_len, tools=flags, batch_size=batch_size,
        )  # fmt: skip
        if out is not None:
            return write_capture(plan, out, shard_bytes=shard_bytes, progress=progress)
        results = reading.collect(plan)
        return results[0] if single else reading.joined(results)

    # --- generation

    def generate(
        self, prompt: Prompt | Sequence[Prompt], *, max_tokens: int = 512, temperature: float = 1.0, top_k: int = 0,
        top_p: float = 1.0, min_p: float = 0.05, seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] = (), logprobs: bool | int = False, think: bool | str = False,
        tools: Sequence[Mapping[str, Any]] | None = None, stream: bool = False,
        steering: resolve.SteeringLike = None, interventions: resolve.InterventionsLike = None,
        capture: reading.Reading | str | Sequence[str] | None = None,
    ) -> Output | list[Output] | Iterator[Chunk]:  # fmt: skip
        """Continue prompts.

        Args:
          prompt: text; or token ids; or messages (a list of {"role", "content", …} dicts); or a list of any of these.
            Text is continued as it stands, after the beginning-of-sentence token; messages are put into DeepSeek's chat
            form, and the answer is taken apart into text, reasoning and tool calls.
          max_tokens: how many tokens to write at most; the context may end it sooner.
          temperature, top_k, top_p, min_p: see `runtime.Sampling`; temperature 0 takes the likeliest token.
          seed: fixes the draws; one for all prompts or one each. A prompt with its seed gives the same text whatever
            else is in the list. Default: a fresh one, reported in the output.
          stop: text that ends the answer; it is not part of it.
          logprobs: report log-probabilities; a number n adds the n likeliest tokens at each place (at most 20).
          think: for messages, let the model reason first: True, or "max" for the longest reasoning.
          tools: for messages, the functions the model may call, in OpenAI's form.
          stream: return an iterator of `Chunk` instead.
          steering: a `Steering`, a tuple of several at once, or a list with one, a tuple or None for each prompt.
          interventions: one or several, made by `ds4jax.interp.add`, `project`, `replace`, …; before the steering.
          capture: sites to read at each chosen token, or an `interp.Reading`; see `Output.captured`.

        Returns:
          An `Output`, or a list of them in the prompts' order.

        Raises:
          DS4Error: an empty prompt, one that does not fit the context, tokens out of range, or senseless options.
        """
        prompts, single = _as_list(prompt)
        jobs = self._jobs(
            prompts, _seeds(seed, len(prompts)), max_tokens=max_tokens, temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, stop=stop, logprobs=logprobs, think=think, tools=tools, steering=steering,
            interventions=interventions, capture=capture,
        )  # fmt: skip
        engine = self._engine_for(len(jobs))
        for job in jobs:
            engine.check(job.request)  # all of them before any runs
        chunks = self._run(jobs)
        if stream:
            return chunks
        outputs: dict[int, Output] = {c.index: c.output for c in chunks if c.output is not None}
        return outputs[0] if single else [outputs[i] for i in range(len(jobs))]

    def release(self) -> None:
        """Give back the memory of `generate`'s cache; the next call makes it anew."""
        if self._engine is not None:
            self._engine.abort()
            self._engine, self._engine_wanted = None, 0
            self._run_number += 1

    def session(self) -> Session:
        """A conversation that keeps its cache between turns."""
        return Session(self)

    def _jobs(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, max_tokens: int = 512, stop: str | Sequence[str] = (),
        logprobs: bool | int = False, think: bool | str = False, tools: Sequence[Mapping[str, Any]] | None = None,
        steering: resolve.SteeringLike = None, interventions: resolve.InterventionsLike = None, capture=None, **rules,
    ) -> list[_Job]:  # fmt: skip
        """A request for each prompt and seed, and the writer of its output; see `generate`. `rules`: of `Sampling`."""
        prepared = {key: self._prepare(p, think, tools) for key, p in {id(p): p for p in prompts}.items()}
        many = [prepared[id(p)] for p in prompts]  # samples of one prompt are encoded once
        stops, top = self._stops(stop), _top(logprobs)
        edits, states = self._reply_edits(prompts, [t for t, _ in many], steering, interventions, tools)
        wanted = self._reading(capture)
        return [
            _Job(
                i,
                runtime.Request(
                    tokens, max_tokens, runtime.Sampling(seed=s, **rules), self._eos, top, edits=edits[i],
                    reply_state=states[i], sites=wanted.sites if wanted else (),
                ),
                _Writer(self.tokenizer, stops, mode, s, logprobs is not False, wanted, self.config),
            )
            for i, ((tokens, mode), s) in enumerate(zip(many, seeds, strict=True))
        ]  # fmt: skip

    def _reply_edits(
        self, prompts: Sequence[Prompt], tokens: Sequence[list[int]], steering, interventions, tools
    ) -> tuple[list[tuple[Edit, ...]], list[int]]:
        """Each prompt's edits, and where its reply begins for the region automaton."""
        if steering is None and not interventions:
            return [()] * len(tokens), [0] * len(tokens)
        self._know_regions()
        flags = [_tools_in_play(p, tools) for p in prompts]
        edits = resolve.prompt_edits(steering, interventions, [len(t) for t in tokens], self.config, flags)
        return edits, [resolve.reply_state(self.tokenizer, t) for t in tokens]

    def _reading(self, capture) -> reading.Reading | None:
        if capture is None:
            return None
        asked = reading.Reading.of(capture)
        reading.check_reduce(asked.reduce)
        return reading.Reading(tuple(s.name for s in match_sites(asked.sites, self.config)), asked.reduce)

    @property
    def _eos(self) -> list[int]:
        eos = self.config.eos_token_id if self.tokenizer is None else self.tokenizer.eos_id
        return [] if eos is None else [eos]

    def _engine_for(self, n: int) -> runtime.Engine:
        """The engine with slots for n sequences at once, as far as memory and MAX_SLOTS allow."""
        wanted = min(MAX_SLOTS, 1 << (n - 1).bit_length())
        if self._engine is None or self._engine_wanted != wanted:
            self.release()  # the old cache goes before the new is made
            self._engine_wanted = wanted
            slots = memory.most_slots(
                self.config, self.weights_nbytes, self.platform.memory, wanted=wanted, context=self.context,
                dtype=self.platform.dtype,
            )  # fmt: skip
            self._engine = runtime.Engine(
                self.programs, self.config, self.platform.dtype, slots=slots, capacity=self.context,
                device=self.platform.device,
            )  # fmt: skip
        return self._engine

    def _prepare(self, prompt: Prompt, think: bool | str, tools) -> tuple[list[int], str | None]:
        """Token ids, and the thinking mode where the prompt is messages."""
        if think not in (True, False, "max"):
            raise DS4Error(f"think {think!r}: choose True, False or 'max'")
        is_text = isinstance(prompt, str)
        if not is_text and (not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, bytes)):
            raise DS4Error(f"prompt: give text, token ids or messages, not {type(prompt).__name__}")
        is_messages = not is_text and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        if not is_messages and (tools or think):
            raise DS4Error("think and tools need messages: [{'role': 'user', 'content': …}]")
        if not is_text and not is_messages:
            return [_token(t) for t in prompt], None
        if self.tokenizer is None:
            raise DS4Error("this checkpoint has no tokenizer: give token ids")
        if is_text:
            if not prompt:
                raise DS4Error("the prompt is empty: give some text")
            bos = self.tokenizer.bos_id
            tokens = self.tokenizer.encode(prompt)
            return (tokens if bos is None or tokens[:1] == [bos] else [bos, *tokens]), None
        text = chat.encode_messages(
            prompt, thinking_mode="thinking" if think else "chat", reasoning_effort="max" if think == "max" else None,
            tools=tools,
        )  # fmt: skip
        tokens = self.tokenizer.encode(text)
        if tokens and tokens[-1] == self.tokenizer.eos_id:
            raise DS4Error(
                "the last message is the assistant's: add a user message, or set its 'wo_eos' to have it continued"
            )
        # an answer that is continued is past its reasoning
        return tokens, "thinking" if text.endswith(THINK_OPEN) else "chat"

    def _stops(self, stop: str | Sequence[str]) -> list[str]:
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, Sequence) or any(not isinstance(s, str) or not s for s in stops):
            raise DS4Error("stop: give one or more non-empty strings")
        if self.tokenizer is None and stops:
            raise DS4Error("stop strings need a tokenizer, and this checkpoint has none")
        return list(stops)

    def _run(self, jobs: list[_Job]) -> Iterator[Chunk]:
        engine = self._engine_for(len(jobs))
        self._run_number += 1
        number = self._run_number
        if engine.busy:  # an iterator was left unfinished: its prompts are dropped
            engine.abort()
        by_number = {engine.submit(job.request): job for job in jobs}
        try:
            for burst in engine.run():
                job = by_number[burst.request]
                chunk = job.writer.write(job.index, burst, len(job.request.tokens))
                if chunk.output is not None and burst.finish is None:
                    engine.cancel(burst.request)  # a stop string ended it before the engine knew
                yield chunk
                if self._run_number != number:
                    raise DS4Error("this stream is over: the model was used again before it was read to its end")
        except BaseException:
            if self._run_number == number:  # or the engine is another's by now
                engine.abort()  # donated buffers may be gone
            raise


class Session:
    """A conversation. The cache of everything before the last answer is kept, so a turn prefills only what is new."""

    def __init__(self, lm: LM):
        self.lm = lm
        self.prefix: runtime.Prefix | None = None

    def generate(
        self, messages: Messages, *, max_tokens: int = 512, temperature: float = 1.0, top_k: int = 0,
        top_p: float = 1.0, min_p: float = 0.05, seed: int | None = None, stop: str | Sequence[str] = (),
        logprobs: bool | int = False, think: bool | str = False, tools: Sequence[Mapping[str, Any]] | None = None,
        steering: resolve.SteeringLike = None, interventions: resolve.InterventionsLike = None,
        capture: reading.Reading | str | Sequence[str] | None = None,
    ) -> Iterator[Chunk]:  # fmt: skip
        """As `LM.generate(messages, stream=True)`, from the longest beginning already computed."""
        lm = self.lm
        tokens, mode = lm._prepare(messages, think, tools)
        (seed,) = _seeds(seed, 1)
        stops, top = lm._stops(stop), _top(logprobs)
        sampling = runtime.Sampling(temperature, top_k, top_p, min_p, seed)
        (edits,), (state,) = lm._reply_edits([messages], [tokens], steering, interventions, tools)
        wanted = lm._reading(capture)
        request = runtime.Request(
            tokens, max_tokens, sampling, lm._eos, top, edits=edits, reply_state=state,
            sites=wanted.sites if wanted else (),
        )  # fmt: skip
        engine = lm._engine_for(1)
        engine.check(request)
        if self.prefix is not None and len(self.prefix.tokens) >= len(tokens):
            self.prefix = None
        if len(tokens) > 1:
            self.prefix = engine.extend(self.prefix, tokens[:-1], edits)
        job = _Job(
            0, dataclasses.replace(request, prefix=self.prefix),
            _Writer(lm.tokenizer, stops, mode, seed, logprobs is not False, wanted, lm.config),
        )  # fmt: skip
        return lm._run([job])


@dataclasses.dataclass
class _Job:
    index: int
    request: runtime.Request
    writer: _Writer


class _Writer:
    """Turns one request's bursts of tokens into text, deltas and at last an Output."""

    def __init__(
        self, tokenizer, stops: list[str], mode: str | None, seed: int, logprobs: bool,
        wanted: reading.Reading | None, config: Config,
    ):  # fmt: skip
        self.captured = None if wanted is None else reading.Kept(wanted, config)
        self.stream = tokenizer.stream() if tokenizer is not None else None
        self.eos = None if tokenizer is None else tokenizer.eos_id
        self.stops = runtime.StopStrings(stops)
        self.parser = chat.StreamParser(mode) if mode else None
        self.mode, self.seed = mode, seed
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[float] | None = [] if logprobs else None
        self.top: list[dict[int, float]] = []

    def write(self, index: int, burst: runtime.Burst, prompt_tokens: int) -> Chunk:
        new, used = "", 0
        for token in burst.tokens:
            used += 1
            if self.stream is not None and token != self.eos:
                new += self.stops.push(self.stream.push(token))
                if self.stops.stopped is not None:
                    break
        finish = burst.finish
        if (finish or self.stops.stopped) and self.stream is not None:
            new += self.stops.push(self.stream.finish())
            new += self.stops.finish()
        finish = "stop" if self.stops.stopped else finish
        self.tokens += burst.tokens[:used]
        if self.captured is not None:
            self.captured.add(burst.sites, used, prompt_tokens - 1 + len(self.tokens) - used)
        if self.logprobs is not None:
            self.logprobs += burst.logprobs[:used]
            self.top += [dict(pairs) for pairs in burst.top[:used]]
        self.text += new
        deltas = self.parser.push(new) if self.parser else []
        if finish and self.parser:
            deltas += self.parser.finish()
        output = self._output(finish, prompt_tokens) if finish else None
        return Chunk(index, new, burst.tokens[:used], deltas, output)

    def _output(self, finish: str, prompt_tokens: int) -> Output:
        common = dict(
            tokens=self.tokens, logprobs=self.logprobs, top_logprobs=self.top or None, prompt_tokens=prompt_tokens,
            seed=self.seed, captured=None if self.captured is None else self.captured.finish(),
        )  # fmt: skip
        if not self.parser:
            return Output(self.text, finish_reason=finish, **common)
        message = self.parser.message(ids=True)
        calls = message["tool_calls"]
        return Output(
            message["content"], finish_reason="tool_calls" if calls and finish == "stop" else finish,
            reasoning=message["reasoning_content"], tool_calls=calls, errors=message.get("errors", []), **common,
        )  # fmt: skip


def _as_list(prompt) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether there was just one."""
    if isinstance(prompt, str):
        return [prompt], True
    if isinstance(prompt, np.ndarray | jax.Array):
        prompt = np.asarray(prompt).tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise DS4Error(f"prompt: give text, token ids, messages, or a list of them, not {type(prompt).__name__}")
    prompt = list(prompt)
    if not prompt:
        raise DS4Error("the prompt is empty: give text, token ids or messages")
    if isinstance(prompt[0], Mapping | numbers.Number):
        return [prompt], True
    return prompt, False


def _tools_in_play(prompt: Prompt, tools) -> bool:
    """Whether a tool call may be written, or was in this conversation."""
    if isinstance(prompt, str) or len(prompt) == 0 or not isinstance(prompt[0], Mapping):
        return False
    return bool(tools) or any(m.get("tools") or m.get("tool_calls") or m.get("role") == "tool" for m in prompt)


def _token(t) -> int:
    if isinstance(t, bool) or not isinstance(t, int | np.integer):
        raise DS4Error(f"prompt: token ids must be whole numbers, not {t!r}")
    return int(t)


def _top(logprobs: bool | int) -> int:
    """How many alternatives `logprobs` asks for."""
    if isinstance(logprobs, bool):
        return 0
    if not isinstance(logprobs, int | np.integer) or not 0 <= logprobs <= MAX_TOP:
        raise DS4Error(f"logprobs {logprobs!r}: True, False, or how many alternatives to report, at most {MAX_TOP}")
    return int(logprobs)


def _seeds(seed, n: int) -> list[int]:
    if seed is None:
        return [secrets.randbits(32) for _ in range(n)]
    seeds = list(seed) if isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str) else [seed] * n
    if len(seeds) != n:
        raise DS4Error(f"seed: {len(seeds)} seeds for {n} prompts; give one for all or one each")
    for s in seeds:
        if isinstance(s, bool) or not isinstance(s, int | np.integer) or not 0 <= s < 2**32:
            raise DS4Error(f"seed {s!r}: must be a whole number from 0 to {2**32 - 1}")
    return [int(s) for s in seeds]
