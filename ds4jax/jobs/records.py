"""Input lines as requests and results as output records: the plain form and OpenAI's batch form.

OpenAI's form is that of its Batch API (platform.openai.com/docs/guides/batch): `custom_id`, `method`, `url`, `body`.
Needs no jax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds4jax.errors import DS4Error, nearest

MAX_SAMPLES = 128
MAX_STOPS = 16


class BadRecord(DS4Error):
    """One input line that cannot run. It becomes an error record; the job goes on.

    Attributes:
      code: "invalid_json", "invalid_encoding", "invalid_request", "duplicate_id" or "failed".
      form, id: of the record, as far as they could be read.
    """

    def __init__(self, message: str, code: str = "invalid_request", form: str = "plain", id: str | int | None = None):
        super().__init__(message)
        self.code, self.form, self.id = code, form, id


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a record came from.

    Attributes:
      index: its number among all records of the job, from 0; empty lines do not count.
      file: the input's name.
      line: its line (of a table: row), from 1.
    """

    index: int
    file: str = ""
    line: int = 0


@dataclasses.dataclass(frozen=True)
class Record:
    """One checked input line.

    Attributes:
      place: where it came from.
      form: "plain", "chat" or "completions"; the last two are OpenAI's.
      id: `id` or `custom_id`, returned as it came; None where a plain line has none.
      prompts: text, token ids or messages; several only in OpenAI's completions.
      n: samples of each prompt.
      options: what `LM.generate` takes, without the seed where the line has none.
      capture: sites to write at each chosen token, and how to reduce them; or None.
    """

    place: Place
    form: str
    id: str | int | None
    prompts: list[Any]
    n: int
    options: dict[str, Any]
    capture: dict[str, Any] | None = None

    def seeds(self, job_seed: int) -> list[int]:
        """One per output. Without a seed of its own, a record's draws follow from the job's seed and its index, so
        that a job that was interrupted goes on with the same text."""
        seed = self.options.get("seed")
        if seed is None:
            digest = hashlib.sha256(f"{job_seed}:{self.place.index}".encode()).digest()
            seed = int.from_bytes(digest[:4], "big")
        return [(seed + k) % 2**32 for k in range(len(self.prompts) * self.n)]


# --- reading


def parse(raw: bytes | str | Mapping[str, Any], place: Place, defaults: Mapping[str, Any] | None = None) -> Record:
    """Check one line.

    Args:
      raw: a line of JSON, or an object already read.
      defaults: options of lines that do not give them.

    Raises:
      BadRecord: says what is wrong with it.
    """
    value = raw if isinstance(raw, Mapping) else _json(raw)
    if not isinstance(value, Mapping):
        raise BadRecord(f"the line is a JSON {_kind(value)}; each line must be an object", "invalid_json")
    form = "openai" if "custom_id" in value or "body" in value else "plain"
    try:
        return (_openai if form == "openai" else _plain)(value, place, dict(defaults or {}))
    except BadRecord as e:
        e.form, e.id = form, _id_of(value, form)
        raise


def _json(raw: bytes | str) -> Any:
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
    except UnicodeDecodeError as e:
        raise BadRecord(f"no UTF-8: byte {e.start} is {raw[e.start]:#04x}", "invalid_encoding") from None
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise BadRecord("bad JSON: nested too deeply", "invalid_json") from None
    except ValueError as e:
        what = f"{e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else e
        raise BadRecord(f"bad JSON: {what}; each line must be a whole JSON object", "invalid_json") from None


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def _id_of(value: Mapping, form: str) -> str | int | None:
    id = value.get("custom_id" if form == "openai" else "id")
    return id if isinstance(id, str | int) and not isinstance(id, bool) else None


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _wrong(name: str, value: Any, rule: str) -> BadRecord:
    shown = json.dumps(value, ensure_ascii=True, default=lambda v: type(v).__name__)
    return BadRecord(f"{name}: must be {rule}, not {shown if len(shown) <= 60 else shown[:57] + '…'}")


def _whole(low: int, high: float = math.inf) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _wrong(
                name, value, f"a whole number, at least {low}" + (f" and at most {high}" if high < 1e9 else "")
            )
        return value

    return check


def _number(low: float, high: float = math.inf, above: bool = False) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if not ok or not low <= value <= high or (above and value == low):
            rule = f"a number {'above' if above else 'from'} {low:g}" + (f" to {high:g}" if high < math.inf else "")
            raise _wrong(name, value, rule)
        return value

    return check


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _stop(name: str, value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise _wrong(name, value, f"a non-empty string or at most {MAX_STOPS} of them")
    return stops


def _logprobs(name: str, value: Any) -> bool | int:
    return value if isinstance(value, bool) else _whole(0, 20)(name, value)


def _think(name: str, value: Any) -> bool | str:
    if value not in (True, False, "max") or isinstance(value, int) and not isinstance(value, bool):
        raise _wrong(name, value, 'true, false or "max"')
    return value


def _tools(name: str, value: Any) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(t, Mapping) for t in value):
        raise _wrong(name, value, "a list of objects")
    return value


def _object(name: str, value: Any) -> dict:
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "an object")
    return dict(value)


def _steering(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping | list | str):
        raise _wrong(name, value, "an object, a list or a name")
    return value


# the options of both forms, as `LM.generate` names them
_COMMON: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": _whole(1),
    "temperature": _number(0),
    "top_p": _number(0, 1, above=True),
    "top_k": _whole(0),
    "min_p": _number(0, 1),
    "seed": _whole(0, 2**32 - 1),
    "stop": _stop,
    "tools": _tools,
    "think": _think,
    "steering": _steering,
}
_PLAIN = {**_COMMON, "logprobs": _logprobs}
PLAIN_FIELDS = ("id", "prompt", "messages", "n", "capture", *_PLAIN)


def _take(value: Mapping, checks: Mapping[str, Callable], options: dict[str, Any], where: str = "") -> None:
    """Check the options in `value`; null stands for "not given"."""
    for name, check in checks.items():
        if value.get(name) is not None:
            options[name] = check(where + name, value[name])


def _no_others(value: Mapping, known, where: str) -> None:
    unknown = [str(k) for k in value if k not in known]
    if unknown:
        useful = [k for k in known if not (k in value or k in _IGNORED or k in _UNSUPPORTED)]
        meant = lambda k: f" (did you mean {json.dumps(near)}?)" if (near := nearest(k, useful)) else ""  # noqa: E731
        names = ", ".join(json.dumps(k) + meant(k) for k in unknown)
        raise BadRecord(f"unknown field{'s' if len(unknown) > 1 else ''} {names} in {where}: remove or correct")


def _messages(value: Any, where: str) -> list:
    if not isinstance(value, list) or not all(isinstance(m, Mapping) for m in value):
        raise _wrong(where, value, "a list of objects")
    if not value:
        raise BadRecord(f"{where} is empty: give at least one message")
    return value


def _tokens(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(t, int) and not isinstance(t, bool) for t in value)
    )


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _sound(value: Any) -> None:
    """Half a surrogate pair, which JSON can say and UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRecord(
            "the text holds half a surrogate pair (\\ud800 … \\udfff): remove it", "invalid_encoding"
        ) from None
    except (TypeError, ValueError, RecursionError) as e:
        raise BadRecord(f"not JSON: {e}") from None


def _plain(value: Mapping, place: Place, options: dict[str, Any]) -> Record:
    _no_others(value, PLAIN_FIELDS, "a plain line")
    _sound(value)
    id = value.get("id")
    if id is not None and (isinstance(id, bool) or not isinstance(id, str | int)):
        raise _wrong("id", id, "a string or a whole number")
    prompt, messages = value.get("prompt"), value.get("messages")
    if (prompt is None) == (messages is None):
        raise BadRecord("give either prompt or messages" + (", not both" if prompt is not None else ""))
    if messages is not None:
        prompt = _messages(messages, "messages")
    elif not _text(prompt) and not _tokens(prompt):
        raise _wrong("prompt", prompt, "non-empty text or a list of token ids")
    _take(value, _PLAIN, options)
    n = _whole(1, MAX_SAMPLES)("n", value["n"]) if value.get("n") is not None else 1
    capture = value.get("capture")
    if capture is not None:
        capture = {"sites": capture} if isinstance(capture, str | list) else _object("capture", capture)
        _no_others(capture, ("sites", "reduce"), "capture")
        sites = capture.get("sites")
        sites = [sites] if isinstance(sites, str) else sites
        if not isinstance(sites, list) or not sites or not all(_text(s) for s in sites):
            raise _wrong("capture", value["capture"], 'site names, or {"sites": …, "reduce": …}')
        if capture.get("reduce") not in (None, "mean", "last"):
            raise _wrong("capture.reduce", capture["reduce"], '"mean" or "last"')
        capture = {**capture, "sites": sites}
    return Record(place, "plain", id, [prompt], n, options, capture)


CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"


def _openai(value: Mapping, place: Place, options: dict[str, Any]) -> Record:
    _no_others(value, ("custom_id", "method", "url", "body"), "a batch line")
    _sound(value)
    id = value.get("custom_id")
    if not isinstance(id, str) or not id:
        raise _wrong("custom_id", id, "a non-empty string")
    if value.get("method", "POST") != "POST":
        raise _wrong("method", value["method"], '"POST"')
    url = value.get("url")
    if url not in (CHAT_URL, COMPLETIONS_URL):
        raise _wrong("url", url, f'"{CHAT_URL}" or "{COMPLETIONS_URL}"')
    body = value.get("body")
    if not isinstance(body, Mapping):
        raise _wrong("body", body, "an object")
    chat = url == CHAT_URL
    _no_others(body, _CHAT_FIELDS if chat else _COMPLETION_FIELDS, "body")
    _take(body, _COMMON, options, "body.")
    n = _whole(1, MAX_SAMPLES)("body.n", body["n"]) if body.get("n") is not None else 1
    for name, allowed in _UNSUPPORTED.items():
        if name in body and body[name] not in allowed:
            raise BadRecord(f"body.{name}: {json.dumps(body[name])[:60]} is not supported: leave it out")
    prompts = (_chat if chat else _completions)(body, options)
    return Record(place, "chat" if chat else "completions", id, prompts, n, options)


# fields that change nothing here, and fields of which only some values can be served
_IGNORED = ("model", "user", "metadata", "store", "service_tier", "stream_options", "safety_identifier",
            "prompt_cache_key", "parallel_tool_calls", "verbosity")  # fmt: skip
_UNSUPPORTED: dict[str, tuple] = {
    "stream": (None, False),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "modalities": (None, ["text"]),
}
_OPTIONS = tuple(k for k in _COMMON if k not in ("tools", "think"))
_COMPLETION_FIELDS = (
    *_IGNORED, *_OPTIONS, "n", "prompt", "logprobs", "stream", "presence_penalty", "frequency_penalty", "logit_bias",
    "echo", "suffix", "best_of",
)  # fmt: skip
_CHAT_FIELDS = (
    *_IGNORED, *_OPTIONS, "n", "messages", "tools", "think", "logprobs", "top_logprobs", "max_completion_tokens",
    "tool_choice", "reasoning_effort", "response_format", "chat_template_kwargs", "stream", "presence_penalty",
    "frequency_penalty", "logit_bias", "modalities",
)  # fmt: skip

# OpenAI's efforts as DeepSeek V4's thinking modes
_EFFORTS = {"none": False, "minimal": False, "low": True, "medium": True, "high": True, "xhigh": "max", "max": "max"}


def _chat(body: Mapping, options: dict[str, Any]) -> list:
    messages = _messages(body.get("messages"), "body.messages")
    if body.get("max_completion_tokens") is not None:
        options["max_tokens"] = _whole(1)("body.max_completion_tokens", body["max_completion_tokens"])
    wanted = _bool("body.logprobs", body["logprobs"]) if body.get("logprobs") is not None else False
    top = body.get("top_logprobs")
    if top is not None:
        top = _whole(0, 20)("body.top_logprobs", top)
        if not wanted:
            raise BadRecord("body.top_logprobs: needs logprobs: true")
    if wanted:
        options["logprobs"] = top or True
    effort = body.get("reasoning_effort")
    if effort is not None:
        if effort not in _EFFORTS:
            raise _wrong("body.reasoning_effort", effort, f"one of {', '.join(_EFFORTS)}")
        options["think"] = _EFFORTS[effort]
    template = body.get("chat_template_kwargs")
    if template is not None:
        _no_others(
            _object("body.chat_template_kwargs", template), ("thinking", "enable_thinking"), "chat_template_kwargs"
        )
        for value in template.values():
            options["think"] = _bool("body.chat_template_kwargs.thinking", value)
    choice = body.get("tool_choice")
    if choice == "none":
        options["tools"] = None
    elif choice not in (None, "auto"):
        raise _wrong("body.tool_choice", choice, '"auto" or "none"')
    return [_with_format(messages, body.get("response_format"))]


def _with_format(messages: list, response_format: Any) -> list:
    """OpenAI's response_format as DeepSeek's: a schema in the system message. The model is told, not forced."""
    if response_format is None:
        return messages
    kind = _object("body.response_format", response_format).get("type")
    if kind == "text":
        return messages
    if kind == "json_object":
        schema = {"type": "object"}
    elif kind == "json_schema":
        schema = _object("body.response_format.json_schema", response_format.get("json_schema")).get("schema")
        _object("body.response_format.json_schema.schema", schema)
    else:
        raise _wrong("body.response_format", response_format, "of type text, json_object or json_schema")
    first = next((i for i, m in enumerate(messages) if m.get("role") == "system"), None)
    if first is None:
        return [{"role": "system", "content": "", "response_format": schema}, *messages]
    return [m if i != first else {**m, "response_format": schema} for i, m in enumerate(messages)]


def _completions(body: Mapping, options: dict[str, Any]) -> list:
    prompt = body.get("prompt")
    if body.get("logprobs") is not None:
        options["logprobs"] = _logprobs("body.logprobs", body["logprobs"])
    if _text(prompt) or _tokens(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(_text(p) or _tokens(p) for p in prompt):
        if len(prompt) > MAX_SAMPLES:
            raise BadRecord(f"body.prompt: {len(prompt)} prompts; at most {MAX_SAMPLES} a line")
        return list(prompt)
    raise _wrong("body.prompt", prompt, "non-empty text, token ids, or a list of these")


# --- writing


@dataclasses.dataclass
class Result:
    """What became of one record.

    Attributes:
      record: the request, or None where the line could not be read.
      place: where it came from.
      outputs: one `ds4jax.Output` per sample, all samples of the first prompt first; empty for an error.
      error: what was wrong, or None.
      timings: seconds from being given to the engine ("queued" until its prefill began, "first" until the first token,
        "total").
      fingerprint: of the model.
      captured: name of the file that captured activations were written to, or None.
    """

    place: Place
    record: Record | None
    outputs: list[Any] = dataclasses.field(default_factory=list)
    error: BadRecord | None = None
    timings: dict[str, float] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""
    captured: str | None = None

    @property
    def id(self) -> str | int | None:
        return self.record.id if self.record else self.error.id if self.error else None

    @property
    def prompt_tokens(self) -> int:
        return sum(o.prompt_tokens for o in self.outputs[:: self.record.n]) if self.record else 0

    @property
    def output_tokens(self) -> int:
        return sum(len(o.tokens) for o in self.outputs)

    @property
    def activations(self) -> dict[str, Any]:
        """What the record asked to capture: {site: array}, of several samples {"sample/site": array}."""
        many = len(self.outputs) > 1
        return {f"{i}/{k}" if many else k: a for i, o in enumerate(self.outputs) for k, a in (o.captured or {}).items()}

    def to_json(self, token_text: Callable[[int], str] = str, *, plain: bool = False) -> dict[str, Any]:
        """The output or error record. `token_text` spells a token for OpenAI's logprobs; `plain` leaves that form."""
        head = {"index": self.place.index}
        tail = {"file": self.place.file, "line": self.place.line}
        if self.error is not None:
            error = {"code": self.error.code, "message": str(self.error)}
            form = self.error.form if self.record is None else self.record.form
            if form == "plain":
                return head | {"id": self.id, "error": error} | tail
            return head | {
                "id": f"batch_req_{self.place.index}", "custom_id": self.id, "response": None, "error": error,
            } | tail  # fmt: skip
        if self.record.form != "plain" and not plain:
            body = self._body(token_text)
            response = {"status_code": 200, "request_id": f"req_{self.place.index}", "body": body}
            return head | {
                "id": f"batch_req_{self.place.index}", "custom_id": self.id, "response": response, "error": None,
                "timings": self.timings,
            } | tail  # fmt: skip
        samples = [sample(o) for o in self.outputs]
        content = samples[0] if len(samples) == 1 else {"samples": samples}
        more = {} if self.captured is None else {"captured": self.captured}
        return head | {"id": self.id} | content | more | {
            "prompt_tokens": self.prompt_tokens, "timings": self.timings, "model": self.fingerprint,
        } | tail  # fmt: skip

    def _body(self, token_text: Callable[[int], str]) -> dict[str, Any]:
        chat = self.record.form == "chat"
        choice = _chat_choice if chat else _text_choice
        tokens_in, tokens_out = self.prompt_tokens, self.output_tokens
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.place.index}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": "ds4jax",
            "system_fingerprint": self.fingerprint,
            "choices": [choice(i, o, token_text) for i, o in enumerate(self.outputs)],
            "usage": {
                "prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out,
            },
        }  # fmt: skip


def sample(o) -> dict[str, Any]:
    """One output in the plain form."""
    out = {
        "text": o.text, "reasoning": o.reasoning, "tool_calls": o.tool_calls, "finish_reason": o.finish_reason,
        "output_tokens": len(o.tokens), "tokens": o.tokens, "seed": o.seed,
    }  # fmt: skip
    if o.errors:
        out["tool_call_errors"] = o.errors
    if o.logprobs is not None:
        out["logprobs"] = o.logprobs
    if o.top_logprobs:
        out["top_logprobs"] = [{str(t): p for t, p in place.items()} for place in o.top_logprobs]
    return out


def _finish(o) -> str:
    return "length" if o.finish_reason == "context" else o.finish_reason  # OpenAI has no word for a full context


def _chat_choice(i: int, o, token_text: Callable[[int], str]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": o.text or (None if o.tool_calls else "")}
    if o.reasoning:
        message["reasoning_content"] = o.reasoning
    if o.tool_calls:
        message["tool_calls"] = o.tool_calls
    logprobs = None
    if o.logprobs is not None:
        places = o.top_logprobs or [{}] * len(o.tokens)
        one = lambda t, p: {"token": token_text(t), "logprob": p, "bytes": list(token_text(t).encode())}  # noqa: E731
        logprobs = {
            "content": [
                one(t, p) | {"top_logprobs": [one(*pair) for pair in top.items()]}
                for t, p, top in zip(o.tokens, o.logprobs, places, strict=True)
            ],
            "refusal": None,
        }
    return {"index": i, "message": message, "logprobs": logprobs, "finish_reason": _finish(o), "seed": o.seed}


def _text_choice(i: int, o, token_text: Callable[[int], str]) -> dict[str, Any]:
    logprobs = None
    if o.logprobs is not None:
        words = [token_text(t) for t in o.tokens]
        offsets, at = [], 0
        for word in words:
            offsets.append(at)
            at += len(word)
        tops = [{token_text(t): p for t, p in top.items()} for top in o.top_logprobs or []]
        logprobs = {"tokens": words, "token_logprobs": o.logprobs, "top_logprobs": tops or None, "text_offset": offsets}
    return {"index": i, "text": o.text, "logprobs": logprobs, "finish_reason": _finish(o), "seed": o.seed}


def dump(value: Mapping[str, Any]) -> bytes:
    """One line of JSON, newline included. `index` stands first, so that it can be found without parsing."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace") + b"\n"


def clean(value: Any) -> Any:
    """A value from a table without the nulls that its columns put into objects."""
    if isinstance(value, Mapping):
        return {k: clean(v) for k, v in value.items() if v is not None}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [clean(v) for v in value]
    return value
