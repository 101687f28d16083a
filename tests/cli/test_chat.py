"""`ds4jax chat`."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ds4jax.chat import encode_messages
from ds4jax.cli import console
from tests.cli.conftest import CALL

SHORT = ("--max-tokens", 12, "--seed", 4)


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture
def typed(cli, monkeypatch):
    """typed(model, *lines) chats from a keyboard; exceptions among the lines are raised by input()."""

    def run(*args, lines=()):
        keys = iter([*lines, EOFError()])

        def read(prompt):
            line = next(keys)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(console, "is_terminal", lambda stream: stream is sys.stdin)
        return cli("chat", *args)

    return run


def test_turns_keep_the_cache_and_what_was_said(cli, random_gguf, lm, tmp_path):
    saved = tmp_path / "talk.json"
    lines = f"Hi\nand?\n/save {saved}\n"
    result = cli("chat", random_gguf, *SHORT, stdin=lines.encode())
    assert result.code == 0, result.err
    heard = [line for line in result.err.splitlines() if line.startswith("> ")]
    assert heard == ["> Hi", "> and?", f"> /save {saved}"]
    first, second, note = [line for line in result.err.splitlines() if line not in heard][-3:]
    messages = json.loads(saved.read_text())
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    answers = [m["content"] for m in messages[1::2]]
    assert result.out == "".join(a + "\n" for a in answers)

    wanted = lm.generate([user("Hi")], max_tokens=12, seed=4)
    assert answers[0] == wanted.text
    wanted = lm.generate(messages[:3], max_tokens=12, seed=4)
    assert answers[1] == wanted.text
    kept = int(second.split()[0])
    assert "tokens kept" in second and "kept" not in first
    assert kept == len(lm.tokenizer.encode(encode_messages(messages[:1]))) - 1
    assert f"prefill {wanted.prompt_tokens - kept} tokens" in second
    assert note == f"{saved}: 4 messages"


def test_saved_conversation_goes_on(cli, script, random_gguf, tmp_path):
    saved = tmp_path / "talk.json"
    script("Hello.")
    cli("chat", random_gguf, "--system", "be brief", "-q", stdin=f"Hi\n/save {saved}\n".encode())
    messages = json.loads(saved.read_text())
    assert [m["content"] for m in messages] == ["be brief", "Hi", "Hello."]
    lm = script("Bye.")
    saved.write_text(json.dumps([*messages, user("Bye")]))
    assert cli("generate", random_gguf, "--messages", saved, "-q").out == "Bye.\n"
    assert lm.asked == [[*messages, user("Bye")]]


def test_commands(cli, script, random_gguf, tmp_path):
    file = tmp_path / "a question.txt"
    file.write_text("from a file,\nin two lines\n")
    lm = script("one", "Hm.</think>two", "three", "four", "five")
    lines = f"""first
/think max

second
/nothink
/read {file}
/system be brief
/system
fourth
/new
/etc/hosts is a file
/quit
never
"""
    result = cli("chat", random_gguf, "-q", stdin=lines.encode())
    assert (result.code, result.err) == (0, "")
    assert result.out == "one\ntwo\nthree\nbe brief\nfour\nfive\n"
    asked = [[m["content"] for m in messages] for messages in lm.asked]
    assert asked == [
        ["first"],
        ["first", "one", "second"],
        ["first", "one", "second", "two", "from a file,\nin two lines"],
        ["be brief", "first", "one", "second", "two", "from a file,\nin two lines", "three", "fourth"],
        ["be brief", "/etc/hosts is a file"],
    ]
    assert lm.asked[2][3]["reasoning_content"] == "Hm."
    assert lm.options["think"] is False and lm.options["max_tokens"] == lm.context


@pytest.mark.parametrize(
    "start, lines, thinks",
    [([], "x", [False]), (["--think"], "x", [True]), (["--think-max"], "x\n/nothink\nx", ["max", False]),
     ([], "/think\nx", [True])],
)  # fmt: skip
def test_thinking(cli, script, random_gguf, monkeypatch, start, lines, thinks):
    lm, seen = script("a</think>b", "c"), []
    generate = lm.generate
    monkeypatch.setattr(lm, "generate", lambda m, **o: seen.append(o["think"]) or generate(m, **o))
    assert cli("chat", random_gguf, "-q", *start, stdin=lines.encode()).code == 0
    assert seen == thinks


def test_help_lists_all_commands(cli, script, random_gguf):
    script()
    out = cli("chat", random_gguf, "-q", stdin=b"/help").out
    told = {line.split()[0] for line in out.splitlines()}
    commands = "/help /think /nothink /read /result /save /system /new /quit Ctrl-C Ctrl-D"
    assert told >= set(commands.split())
    assert all(name in cli("chat", "--help").out for name in told if name.startswith("/"))


@pytest.mark.parametrize(
    "line, said",
    [
        ("/wrong", "/wrong"),
        ("/read", "/read FILE"),
        ("/read no-such-file.txt", "no-such-file.txt"),
        ("/result 3", "waits for no call's result"),
        ("/save", "/save FILE"),
        ("/save .", "folder"),
        ("/save no-such-folder/x.json", "no-such-folder"),
        ("/think hard", "/think max"),
        ("\udcff", "UTF-8"),
    ],
)
def test_mistakes(refused, script, random_gguf, line, said):
    script()
    assert said in refused("chat", random_gguf, "-q", stdin=line.encode(errors="surrogateescape"))


def test_save_replaces_only_its_own_files(cli, refused, script, random_gguf, tmp_path):
    saved = tmp_path / "talk.json"
    script("one", "two")
    lines = f"1\n/save {saved}\n2\n/save {saved}\n"
    assert cli("chat", random_gguf, "-q", stdin=lines.encode()).code == 0
    assert len(json.loads(saved.read_text())) == 4
    before = saved.read_bytes()
    script()
    assert "already exists" in refused("chat", random_gguf, "-q", stdin=f"/save {saved}".encode())
    assert saved.read_bytes() == before and list(tmp_path.iterdir()) == [saved]


def test_mistakes_do_not_end_a_conversation(typed, script, random_gguf):
    lm = script("one", RuntimeError("worse"))
    result = typed(random_gguf, lines=["/wrong", KeyboardInterrupt(), "1", "/read nothing", "/quit"])
    assert result.code == 0
    assert result.out == "\none\n"
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "/wrong" in errors[0] and "nothing" in errors[1]
    assert lm.asked == [[user("1")]]


def test_ctrl_d_leaves(typed, script, random_gguf):
    script()
    assert typed(random_gguf, "-q").code == 0


def test_ctrl_c_stops_one_answer(typed, script, random_gguf):
    lm = script(KeyboardInterrupt(), "Three.")
    result = typed(random_gguf, "-q", lines=["Count.", "And?"])
    assert result.code == 0
    assert result.out.startswith("Well, \nThree.\n")
    assert "stopped" in result.err
    assert [m["content"] for m in lm.asked[1]] == ["Count.", "Well, ", "And?"]


def test_ctrl_c_before_the_first_word_takes_the_message_back(typed, script, random_gguf, monkeypatch):
    lm = script("Three.")
    generate, calls = lm.generate, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr(lm, "generate", interrupted)
    assert typed(random_gguf, "-q", lines=["Count.", "And?"]).code == 0
    assert lm.asked == [[user("And?")]]


def test_ctrl_c_on_the_real_model(typed, random_gguf, lm, monkeypatch):
    """The interruption comes while an answer is read; the session then goes on as if the rest had never been."""
    answer, stopped = console.Answer.delta, []

    def delta(self, d):
        answer(self, d)
        if not stopped:
            stopped.append(self.text)
            raise KeyboardInterrupt

    monkeypatch.setattr(console.Answer, "delta", delta)
    result = typed(random_gguf, *SHORT, lines=["Hi", "and?"])
    assert result.code == 0, result.err
    messages = [user("Hi"), {"role": "assistant", "content": stopped[0]}, user("and?")]
    wanted = lm.generate(messages, max_tokens=12, seed=4)
    assert result.out == f"{stopped[0]}\n{wanted.text}\n\n"


def test_ctrl_c_in_a_pipe_ends_it(cli, script, random_gguf):
    script(KeyboardInterrupt(), "never")
    result = cli("chat", random_gguf, "-q", stdin=b"1\n2\n")
    assert (result.code, result.out) == (130, "Well, \n")


def test_tool_calls_and_reasoning(cli, script, random_gguf, monkeypatch):
    lm = script("Hm.</think>Sunny?" + CALL, "</think>Yes.")
    result = cli("chat", random_gguf, "--think", "-q", stdin=b"Rome?\nSure?")
    assert result.out == 'Sunny?\nget_weather {"city": "Rome"}\nYes.\n'
    assert lm.asked[1][1]["tool_calls"][0]["function"]["name"] == "get_weather"
    encode_messages(lm.asked[1])  # can be said


def test_results_of_calls(cli, script, random_gguf):
    """The model goes on when the last of its calls has its result; the text between stays one conversation."""
    inner = CALL.split("tool_calls>\n")[1].split("\n</｜DSML｜tool_calls")[0]
    lm = script(CALL.replace(inner, f"{inner}\n{inner.replace('Rome', 'Oslo')}"), "Sunny, snowy.", "Yes.")
    lines = "Rome and Oslo?\n/result 30 degrees\n/result -3 degrees\nSure?\n"
    result = cli("chat", random_gguf, stdin=lines.encode())
    assert result.out == 'get_weather {"city": "Rome"}\nget_weather {"city": "Oslo"}\nSunny, snowy.\nYes.\n'
    assert result.err.count("/result TEXT gives what get_weather returned") == 2
    assert "> /result -3 degrees" in result.err.splitlines()
    given = [(m["role"], m["content"]) for m in lm.asked[1]]
    assert given == [
        ("user", "Rome and Oslo?"), ("assistant", ""), ("tool", "30 degrees"), ("tool", "-3 degrees"),
    ]  # fmt: skip
    assert [m["role"] for m in lm.asked[2]] == ["user", "assistant", "tool", "tool", "assistant", "user"]
    encode_messages(lm.asked[2])  # can be said
    script(CALL)
    result = cli("chat", random_gguf, "-q", stdin=b"x\n/result")
    assert result.code == 2 and "what did get_weather return?" in result.err


def test_a_full_context(cli, random_gguf):
    result = cli("chat", random_gguf, "--context", 8, "-q", stdin=b"a message much too long for eight tokens")
    assert result.code == 2 and "context 8" in result.err and result.err.count("\n") == 1


@pytest.mark.full  # a process of its own, which compiles
def test_real_signals_at_a_real_terminal(random_gguf, tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    saved = tmp_path / "talk.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "ds4jax", "chat", random_gguf, "-n", "4000", "-t", "0", "--min-p", "0"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    seen = b""

    def until(text, seconds=240):
        nonlocal seen
        end, os_error = time.time() + seconds, False
        while text not in seen and time.time() < end and not os_error:
            try:
                seen += os.read(ours, 4096)
            except OSError:
                os_error = True
        assert text in seen, seen

    try:
        until(b"> ")
        os.write(ours, b"Hi\n")
        until(b"Hi\r\n")
        seen = b""
        time.sleep(1)  # now it compiles, or reads a program from the cache
        process.send_signal(signal.SIGINT)
        until(b"stopped")
        until(b"> ")
        os.write(ours, f"/save {saved}\n".encode())
        until(b"messages")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)
    assert b"Traceback" not in seen
    assert isinstance(json.loads(saved.read_text()), list)
