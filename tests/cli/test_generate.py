"""`ds4jax generate`."""

import json
import sys

import pytest

from ds4jax.cli import console
from tests.cli.conftest import CALL, TOOLS

SHORT = ("--max-tokens", 12, "--seed", 4)


def test_text(cli, random_gguf, lm):
    result = cli("generate", random_gguf, "the cat", *SHORT)
    wanted = lm.generate("the cat", max_tokens=12, seed=4)
    assert result.code == 0
    assert result.out == wanted.text + "\n"
    device, summary = result.err.splitlines()
    assert device.startswith("ds4jax: ")
    assert summary.startswith(f"prefill {wanted.prompt_tokens} tokens (") and "seed 4" in summary
    quiet = cli("generate", random_gguf, "the cat", *SHORT, "--quiet", "--echo")
    assert (quiet.out, quiet.err) == ("the cat" + result.out, "")


def test_json(cli, random_gguf, lm):
    result = cli("generate", random_gguf, "the cat", *SHORT, "--json", "--logprobs", 2, "-t", 0)
    (record,) = result.json
    wanted = lm.generate("the cat", max_tokens=12, seed=4, logprobs=2, temperature=0)
    assert record["tokens"] == wanted.tokens and record["text"] == wanted.text
    assert record["finish_reason"] == wanted.finish_reason
    assert (record["seed"], record["prompt_tokens"]) == (4, wanted.prompt_tokens)
    assert record["logprobs"] == pytest.approx(wanted.logprobs)
    assert record["reasoning"] == "" and record["tool_calls"] == []
    assert record["timings"]["total_s"] >= record["timings"]["first_s"] > 0
    for token, logprob, best in zip(record["tokens"], record["logprobs"], record["top_logprobs"], strict=True):
        assert [b["token"] for b in best][0] == token  # greedy
        assert best[0]["logprob"] == pytest.approx(logprob, abs=1e-5)
        assert best[1]["text"] == lm.tokenizer.decode([best[1]["token"]])


def test_prompt_from_file_and_stdin(cli, random_gguf, tmp_path):
    wanted = cli("generate", random_gguf, "the cat", *SHORT).out
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"the cat\r\n")  # the newline at the end is not the prompt's
    assert cli("generate", random_gguf, "--file", file, *SHORT).out == wanted
    assert cli("generate", random_gguf, *SHORT, stdin=b"the cat\n").out == wanted
    assert cli("generate", random_gguf, "-", *SHORT, stdin=b"the cat").out == wanted
    assert cli("generate", random_gguf, *SHORT, stdin=b"the cat\n\n").out != wanted


@pytest.mark.full  # compiles for two slots
def test_lines_are_prompts(cli, random_gguf):
    alone = [cli("generate", random_gguf, p, *SHORT, "--json").json[0] for p in ("the cat", "a dog")]
    together = cli("generate", random_gguf, "--lines", *SHORT, "--json", stdin=b"the cat\n\na dog\n").json
    assert [r["tokens"] for r in together] == [r["tokens"] for r in alone]


def test_a_prompt_longer_than_the_context(cli, random_gguf):
    result = cli("generate", random_gguf, "x" * 30, "--context", 16, "--quiet")
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: the prompt has 31 tokens and the context 16") and result.err.count("\n") == 1


@pytest.mark.parametrize(
    "args, said",
    [
        (["x", "--file", "y"], "PROMPT and --file"),
        (["x", "--logprobs", 3], "--logprobs"),
        (["x", "--json", "--echo"], "--echo"),
        (["x", "--think", "--echo"], "--echo"),
        (["x", "--messages", "m.json"], "--messages"),
        (["--messages", "m.json", "--system", "s"], "--messages"),
        (["x", "--stop", ""], "--stop"),
        ([""], "empty"),
        ([], "empty"),
        (["--lines"], "empty"),
        (["--file", "no-such-file.txt"], "no-such-file.txt"),
        (["x", "--temperature", "-1"], "temperature"),
        (["x", "--temperature", "nan"], "temperature"),
        (["x", "--top-p", "0"], "top_p"),
        (["x", "--min-p", "2"], "min_p"),
        (["x", "--top-k", "-1"], "top_k"),
        (["x", "--seed", "-1"], "seed"),
        (["x", "--seed", str(2**32)], "seed"),
        (["x", "--dtype", "float8"], "float8"),
        (["x", "--device", "abacus"], "abacus"),
        (["x", "--kernels", "steam"], "steam"),
        (["x", "--context", "5000"], "2 to 4096"),
        (["x", "--mtp", "no-such-file.gguf"], "no-such-file.gguf"),
        (["x", "--tools", "no-such-file.json"], "no-such-file.json"),
    ],
)
def test_bad_options(refused, random_gguf, args, said):
    assert said in refused("generate", random_gguf, *args)


def test_bad_bytes(refused, random_gguf, tmp_path):
    assert "byte 2 is 0xff" in refused("generate", random_gguf, stdin=b"ab\xff")
    file = tmp_path / "latin.txt"
    file.write_bytes("é".encode("latin-1"))
    assert "latin.txt" in refused("generate", random_gguf, "--file", file)
    assert "is a directory" in refused("generate", random_gguf, "--file", tmp_path).lower()


def test_no_prompt_on_a_terminal(refused, random_gguf, monkeypatch):
    monkeypatch.setattr(console, "is_terminal", lambda stream: stream is sys.stdin)
    assert "no prompt" in refused("generate", random_gguf)


@pytest.mark.parametrize("text", ["{", "{}", "[]", "[1]", '[{"role": "king", "content": "x"}]', '"' * 9, "[" * 100_000])
def test_bad_json_files(refused, random_gguf, tmp_path, text):
    file = tmp_path / "bad.json"
    file.write_text(text)
    refused("generate", random_gguf, "--messages", file)
    if "king" not in text:
        assert "bad.json" in refused("generate", random_gguf, "x", "--tools", file)


def test_options_reach_the_model(cli, script, random_gguf, tmp_path):
    lm = script("fine")
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    result = cli(
        "generate", random_gguf, "hello", "--system", "be brief", "--think-max", "--tools", tools, "-n", 7, "-t", 0.5,
        "--top-k", 3, "--top-p", 0.9, "--min-p", 0.1, "--seed", 2, "--stop", "a", "--stop", "b", "--context", 64,
        "--dtype", "float32", "--device", "cpu", "--kernels", "xla", "--mtp", "side.gguf", "--no-cache-quant", "-q",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert lm.asked == [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]]
    assert lm.options == dict(
        max_tokens=7, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=2, stop=["a", "b"], logprobs=False,
        think="max", tools=TOOLS, stream=True,
    )  # fmt: skip
    assert lm.loaded == dict(
        path=str(random_gguf), context=64, dtype="float32", device="cpu", kernels="xla", mtp="side.gguf",
        cache_quant=False, verbose=False, progress=False,
    )  # fmt: skip


def test_chat_form(cli, script, random_gguf, tmp_path):
    lm = script("Let me see.</think>Sunny?" + CALL, "Hm.</think>Yes.")
    result = cli("generate", random_gguf, "Rome?", "--think", "--json", "-q")
    (record,) = result.json
    assert record["text"] == "Sunny?" and record["reasoning"] == "Let me see."
    assert record["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    messages = [{"role": "user", "content": "Rome?"}]
    (tmp_path / "m.json").write_text(json.dumps(messages))
    result = cli("generate", random_gguf, "--messages", tmp_path / "m.json", "--think", "-q")
    assert lm.asked == [messages, messages]
    assert result.out == "Yes.\n"  # no reasoning in a pipe


def test_tool_calls_are_lines(cli, script, random_gguf):
    script("Sunny?" + CALL)
    assert cli("generate", random_gguf, "x", "--chat", "-q").out == 'Sunny?\nget_weather {"city": "Rome"}\n'


def test_malformed_calls_are_noted(cli, script, random_gguf):
    script("Sunny?" + CALL[:-30])
    result = cli("generate", random_gguf, "x", "--chat", "-q")
    assert result.code == 0 and result.out.startswith("Sunny?\n")
    assert result.err.startswith("malformed tool call: ")


def test_several_texts_are_in_order(cli, script, random_gguf):
    script("second", "first\n")
    result = cli("generate", random_gguf, "--lines", "--echo", stdin=b"1\n2\n")
    assert result.out == "1first\n\n2second\n"
    assert "2 prompts: 10 prompt tokens, 12 tokens" in result.err


def test_terminals_get_colour_and_no_control_characters(cli, script, random_gguf, monkeypatch):
    monkeypatch.setattr(console, "is_terminal", lambda stream: stream is sys.stdout)
    monkeypatch.setattr(console, "_codes", lambda style, stream: (f"<{style}>", "</>"))
    script("Hm.</think>\x1b[2JOh" + CALL)
    out = cli("generate", random_gguf, "x", "--think", "-q").out.replace("</><dim>", "")
    assert out == '<dim>Hm.</>\n\n␛[2JOh\n<cyan>get_weather {"city": "Rome"}</>\n'
