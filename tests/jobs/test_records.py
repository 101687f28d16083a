"""Lines in, records out."""

import json

import pytest

from ds4jax.jobs.records import BadRecord, Place, Result, parse
from tests.jobs.fake import Out

HERE = Place(7, "jobs.jsonl", 8)


def line(**fields) -> bytes:
    return json.dumps(fields).encode()


def chat(**body) -> bytes:
    body = {"messages": [{"role": "user", "content": "hi"}], **body}
    return line(custom_id="a", method="POST", url="/v1/chat/completions", body=body)


def completion(**body) -> bytes:
    return line(custom_id="a", method="POST", url="/v1/completions", body={"prompt": "hi", **body})


# --- what is understood


def test_plain_line():
    r = parse(line(id=3, prompt="hi", max_tokens=5, temperature=0, stop="x", n=2, seed=None, think=True), HERE)
    assert (r.form, r.id, r.prompts, r.n) == ("plain", 3, ["hi"], 2)
    assert r.options == {"max_tokens": 5, "temperature": 0, "stop": ["x"], "think": True}
    assert parse(line(prompt=[1, 2]), HERE).prompts == [[1, 2]]
    assert parse({"messages": [{"role": "user", "content": "x"}]}, HERE).prompts == [[{"role": "user", "content": "x"}]]
    assert parse(line(prompt="x"), HERE).id is None


def test_lines_options_come_before_the_jobs():
    r = parse(line(prompt="x", temperature=0.5), HERE, {"temperature": 1.0, "max_tokens": 9})
    assert r.options == {"temperature": 0.5, "max_tokens": 9}


def test_openai_chat_line():
    r = parse(
        chat(
            model="gpt-x", max_completion_tokens=7, top_p=0.5, n=3, stop=["a", "b"], logprobs=True, top_logprobs=2,
            tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="auto", user="me", metadata={"k": "v"},
            reasoning_effort="high", presence_penalty=0, frequency_penalty=0.0, stream=False, seed=11, logit_bias={},
        ),
        HERE,
    )  # fmt: skip
    assert (r.form, r.id, r.n) == ("chat", "a", 3)
    assert r.options == {
        "max_tokens": 7, "top_p": 0.5, "stop": ["a", "b"], "logprobs": 2, "think": True, "seed": 11,
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }  # fmt: skip


# as in OpenAI's guide to batches and in vLLM's to run_batch
EXAMPLES = """
{"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "gpt-3.5-turbo-0125", \
"messages": [{"role": "system", "content": "You are a helpful assistant."},\
{"role": "user", "content": "Hello world!"}], "max_tokens": 1000}}
{"custom_id": "request-2", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "some/Model", \
"messages": [{"role": "system", "content": "You are an unhelpful assistant."},{"role": "user", "content": "Hello!"}],\
"max_completion_tokens": 1000}}
{"custom_id": "request-3", "method": "POST", "url": "/v1/completions", "body": {"model": "gpt-3.5-turbo-instruct", \
"prompt": "Say this is a test", "max_tokens": 7, "temperature": 0, "top_p": 1, "n": 1, "stream": false, \
"logprobs": null, "stop": "\\n"}}
"""


def test_example_files():
    records = [parse(text, HERE) for text in EXAMPLES.strip().splitlines()]
    assert [r.id for r in records] == ["request-1", "request-2", "request-3"]
    assert [r.options["max_tokens"] for r in records] == [1000, 1000, 7]
    assert records[2].options == {"max_tokens": 7, "temperature": 0, "top_p": 1, "stop": ["\n"]}


@pytest.mark.parametrize(
    "body, think",
    [
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "max"}, "max"),
        ({"chat_template_kwargs": {"thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
    ],
)
def test_efforts_are_thinking_modes(body, think):
    assert parse(chat(**body), HERE).options == {"think": think}


def test_tool_choice_none_hides_the_tools():
    r = parse(chat(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="none"), HERE)
    assert r.options == {"tools": None}


@pytest.mark.parametrize(
    "given, schema",
    [
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}, {"type": "array"}),
    ],
)
def test_response_format_goes_to_the_system_message(given, schema):
    (messages,) = parse(chat(response_format=given), HERE).prompts
    assert messages[0] == {"role": "system", "content": "", "response_format": schema} and len(messages) == 2
    own = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    (messages,) = parse(chat(messages=own, response_format=given), HERE).prompts
    assert messages == [{"role": "system", "content": "s", "response_format": schema}, own[1]]
    assert parse(chat(response_format={"type": "text"}), HERE).prompts == parse(chat(), HERE).prompts


def test_openai_completions_prompts():
    assert parse(completion(), HERE).prompts == ["hi"]
    assert parse(completion(prompt=[1, 2, 3]), HERE).prompts == [[1, 2, 3]]
    assert parse(completion(prompt=["a", "b"]), HERE).prompts == ["a", "b"]
    assert parse(completion(prompt=[[1], [2, 3]], logprobs=5), HERE).options == {"logprobs": 5}


def test_capture_forms():
    for given in ("layers.0.ffn_out", ["layers.0.ffn_out"], {"sites": "layers.0.ffn_out"}):
        assert parse(line(prompt="x", capture=given), HERE).capture == {"sites": ["layers.0.ffn_out"]}
    r = parse(line(prompt="x", capture={"sites": ["a", "b"], "reduce": "mean"}), HERE)
    assert r.capture == {"sites": ["a", "b"], "reduce": "mean"}


# --- what is refused


@pytest.mark.parametrize(
    "raw, code, message",
    [
        (b"{nope", "invalid_json", "bad JSON: Expecting property name"),
        (b'{"prompt": "x"', "invalid_json", "delimiter at column 15; each line must be a whole JSON"),
        (line(id=1, ids=2, prompt="x"), "invalid_request", 'unknown field "ids" in'),  # "id" is there already
        (b'{"prompt": "x", "temperature": NaN}', "invalid_json", "NaN is no JSON"),
        (b"[" * 100_000, "invalid_json", "nested too deeply"),
        (b'["x"]', "invalid_json", "a JSON list; each line must be an object"),
        (b"null", "invalid_json", "a JSON null"),
        (b'{"prompt": "\xff\xfe"}', "invalid_encoding", "no UTF-8: byte 12 is 0xff"),
        (rb'{"prompt": "\ud800"}', "invalid_encoding", "half a surrogate pair"),
        (line(), "invalid_request", "give either prompt or messages"),
        (line(prompt="x", messages=[{}]), "invalid_request", "not both"),
        (line(prompt=""), "invalid_request", "prompt: must be non-empty text or a list of token ids, not"),
        (line(prompt=[]), "invalid_request", "prompt: must be"),
        (line(prompt=[1, "x"]), "invalid_request", "prompt: must be"),
        (line(prompt=[True]), "invalid_request", "prompt: must be"),
        (line(prompt=5), "invalid_request", "prompt: must be"),
        (line(messages=[]), "invalid_request", "messages is empty"),
        (line(messages=["x"]), "invalid_request", "messages: must be a list of objects"),
        (line(messages={"role": "user"}), "invalid_request", "messages: must be"),
        (line(id=[1], prompt="x"), "invalid_request", "id: must be a string or a whole number"),
        (line(id=True, prompt="x"), "invalid_request", "id: must be"),
        (line(prompt="x", qqq=1), "invalid_request", 'unknown field "qqq" in a plain line'),
        (line(prompt="x", temprature=1), "invalid_request", '"temprature" (did you mean "temperature"?)'),
        (line(prompt="x", temp=1, sed=2), "invalid_request", '"temp" (did you mean "temperature"?), "sed" (did'),
        (chat(max_token=1), "invalid_request", '"max_token" (did you mean "max_tokens"?) in body'),
        (line(prompt="x", a=1, b=2), "invalid_request", 'unknown fields "a", "b" in'),
        (line(prompt="x", max_tokens=0), "invalid_request", "max_tokens: must be a whole number, at least 1, not 0"),
        (line(prompt="x", max_tokens=2.5), "invalid_request", "max_tokens: must be"),
        (line(prompt="x", max_tokens=True), "invalid_request", "max_tokens: must be"),
        (line(prompt="x", temperature="hot"), "invalid_request", 'temperature: must be a number from 0, not "hot"'),
        (line(prompt="x", temperature=-1), "invalid_request", "temperature: must be"),
        (line(prompt="x", top_p=0), "invalid_request", "top_p: must be a number above 0 to 1"),
        (line(prompt="x", min_p=2), "invalid_request", "min_p: must be"),
        (line(prompt="x", seed=2**32), "invalid_request", "seed: must be"),
        (line(prompt="x", n=0), "invalid_request", "n: must be"),
        (line(prompt="x", n=1000), "invalid_request", "at most 128"),
        (line(prompt="x", stop=[""]), "invalid_request", "stop: must be"),
        (line(prompt="x", stop=["x"] * 17), "invalid_request", "stop: must be"),
        (line(prompt="x", logprobs=21), "invalid_request", "logprobs: must be"),
        (line(prompt="x", think="hard"), "invalid_request", "think: must be"),
        (line(prompt="x", think=1), "invalid_request", "think: must be"),
        (line(prompt="x", tools={}), "invalid_request", "tools: must be a list of objects"),
        (line(prompt="x", steering=3), "invalid_request", "steering: must be"),
        (line(prompt="x", capture=[]), "invalid_request", "capture: must be"),
        (line(prompt="x", capture={"sites": ["a"], "reduce": "max"}), "invalid_request", "capture.reduce: must be"),
        (line(prompt="x", capture={"sites": ["a"], "where": 1}), "invalid_request", 'unknown field "where" in capture'),
        (line(custom_id="a"), "invalid_request", "url: must be"),
        (line(custom_id="", url="/v1/completions", body={}), "invalid_request", "custom_id: must be a non-empty"),
        (line(url="/v1/completions", body={"prompt": "x"}), "invalid_request", "custom_id: must be a non-empty"),
        (line(custom_id="a", method="GET", url="/v1/completions", body={}), "invalid_request", "method: must be"),
        (line(custom_id="a", url="/v1/embeddings", body={}), "invalid_request", "url: must be"),
        (line(custom_id="a", url="/v1/completions", body=[]), "invalid_request", "body: must be an object"),
        (line(custom_id="a", url="/v1/completions", body={}, x=1), "invalid_request", 'unknown field "x" in a batch'),
        (chat(messages=[]), "invalid_request", "body.messages is empty"),
        (chat(messages=None), "invalid_request", "body.messages: must be"),
        (chat(temperature="x"), "invalid_request", "body.temperature: must be"),
        (chat(foo=1), "invalid_request", 'unknown field "foo" in body'),
        (chat(prompt="x"), "invalid_request", 'unknown field "prompt" in body'),
        (chat(top_logprobs=2), "invalid_request", "needs logprobs: true"),
        (chat(stream=True), "invalid_request", "body.stream: true is not supported"),
        (chat(presence_penalty=0.5), "invalid_request", "body.presence_penalty: 0.5 is not supported"),
        (chat(tool_choice="required"), "invalid_request", "body.tool_choice: must be"),
        (chat(reasoning_effort="huge"), "invalid_request", "body.reasoning_effort: must be one of"),
        (chat(response_format={"type": "xml"}), "invalid_request", "body.response_format: must be"),
        (chat(response_format="json"), "invalid_request", "body.response_format: must be an object"),
        (completion(prompt=[]), "invalid_request", "body.prompt: must be"),
        (completion(prompt=["a", ""]), "invalid_request", "body.prompt: must be"),
        (completion(prompt=["a"] * 129), "invalid_request", "129 prompts; at most 128"),
        (completion(echo=True), "invalid_request", "body.echo: true is not supported"),
    ],
)  # fmt: skip
def test_bad_lines(raw, code, message):
    with pytest.raises(BadRecord) as e:
        parse(raw, HERE)
    assert e.value.code == code and message in str(e.value) and "\n" not in str(e.value)


def test_errors_keep_the_id_and_the_form():
    with pytest.raises(BadRecord) as e:
        parse(line(id="q7", prompt=""), HERE)
    assert Result(HERE, None, error=e.value).to_json() == {
        "index": 7, "id": "q7", "file": "jobs.jsonl", "line": 8,
        "error": {"code": "invalid_request", "message": str(e.value)},
    }  # fmt: skip
    with pytest.raises(BadRecord) as e:
        parse(chat(foo=1), HERE)
    got = Result(HERE, None, error=e.value).to_json()
    assert (got["custom_id"], got["response"], got["line"]) == ("a", None, 8) and "foo" in got["error"]["message"]


# --- results


def test_plain_result():
    r = parse(line(id="q", prompt="x", logprobs=1), HERE)
    out = Out("ab", [97, 98], "length", [-1.0, -2.0], [{97: -1.0}, {99: -1.5}], 3, 5, reasoning="hm")
    got = Result(HERE, r, [out], timings={"total_s": 1.0}, fingerprint="fp").to_json()
    assert list(got)[0] == "index"
    assert got == {
        "index": 7, "id": "q", "text": "ab", "reasoning": "hm", "tool_calls": [], "finish_reason": "length",
        "output_tokens": 2, "tokens": [97, 98], "seed": 5, "logprobs": [-1.0, -2.0],
        "top_logprobs": [{"97": -1.0}, {"99": -1.5}], "prompt_tokens": 3, "timings": {"total_s": 1.0}, "model": "fp",
        "file": "jobs.jsonl", "line": 8,
    }  # fmt: skip


def test_samples_of_one_prompt():
    r = parse(line(id="q", prompt="x", n=2), HERE)
    got = Result(HERE, r, [Out("a", [97], prompt_tokens=3), Out("bb", [98, 98], prompt_tokens=3)]).to_json()
    assert [s["text"] for s in got["samples"]] == ["a", "bb"] and got["prompt_tokens"] == 3 and "text" not in got


def test_openai_chat_result():
    r = parse(chat(logprobs=True, top_logprobs=1), HERE)
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    out = Out("", [97], "tool_calls", [-1.0], [{98: -0.5}], 3, tool_calls=[call], reasoning="so")
    got = Result(HERE, r, [out], fingerprint="fp").to_json(chr)
    assert (got["custom_id"], got["error"], got["response"]["status_code"]) == ("a", None, 200)
    body = got["response"]["body"]
    assert body["object"] == "chat.completion" and body["system_fingerprint"] == "fp"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant", "content": None, "reasoning_content": "so", "tool_calls": [call],
    }  # fmt: skip
    assert choice["logprobs"]["content"] == [
        {"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": [{"token": "b", "logprob": -0.5, "bytes": [98]}]}
    ]


def test_openai_completion_result():
    r = parse(completion(prompt=["x", "y"], n=2, logprobs=1), HERE)
    outs = [Out(c, [ord(c)], "context", [-1.0], [{97: -1.0}], 2) for c in "abcd"]
    body = Result(HERE, r, outs).to_json(chr)["response"]["body"]
    assert [c["text"] for c in body["choices"]] == list("abcd") and [c["index"] for c in body["choices"]] == [
        0,
        1,
        2,
        3,
    ]
    assert body["usage"]["prompt_tokens"] == 4 and body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][1]["logprobs"] == {
        "tokens": ["b"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}], "text_offset": [0],
    }  # fmt: skip


def test_seeds_follow_from_job_and_place_or_are_the_lines():
    mine, none = parse(line(prompt="x", n=3, seed=2**32 - 1), HERE), parse(line(prompt="x"), HERE)
    assert mine.seeds(0) == mine.seeds(1) == [2**32 - 1, 0, 1]
    assert none.seeds(0) == none.seeds(0) != none.seeds(1)
    assert none.seeds(0) != parse(line(prompt="x"), Place(8)).seeds(0)
