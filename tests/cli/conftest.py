"""Running the command line in this process, with one model loaded for all tests."""

import dataclasses
import io
import json

import jax
import pytest

import ds4jax
from ds4jax.chat import StreamParser
from ds4jax.cli import app, options
from ds4jax.lm import Chunk, Output


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> list:
        return [json.loads(line, parse_constant=_no_constant) for line in self.out.splitlines()]


def _no_constant(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.fixture(scope="session", autouse=True)
def started_backend():
    """`inspect` and `convert` keep JAX on the CPU unless it has started: in this process it has."""
    jax.devices()


@pytest.fixture
def cli(capsys, monkeypatch):
    """cli(*args, stdin=bytes) runs a command line."""

    def run(*args, stdin: bytes = b"") -> Result:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code = app.run([str(a) for a in args])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(cli):
    """refused(*args) checks that a command line is bad input: exit code 2, one line on stderr, no result."""

    def run(*args, stdin: bytes = b"") -> str:
        result = cli(*args, stdin=stdin)
        assert result.code == 2, result
        assert result.out == ""
        assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
        return result.err

    return run


@pytest.fixture(scope="session")
def models():
    return {}


@pytest.fixture(autouse=True)
def load_once(monkeypatch, models):
    """Compiling takes seconds: the same options give the same model again."""
    real = ds4jax.load

    def load(path, *, progress=None, verbose=True, **options):
        key = (str(path), *sorted(options.items()))
        if key not in models:
            models[key] = real(path, progress=progress, verbose=verbose, **options)
        return models[key]

    monkeypatch.setattr(ds4jax, "load", load)


@pytest.fixture
def lm(load_once, random_gguf):
    """The model that `ds4jax … random_gguf` uses without further options."""
    return options.load(
        str(random_gguf), context=None, dtype=None, device=None, kernels="auto", mtp=None, cache_quant=True, quiet=True
    )


class Script:
    """In a model's place: notes what it is asked and answers with given texts, in pieces of three characters.

    An exception among the answers is raised after "Well, ".
    """

    tokenizer = "a tokenizer"
    platform = "a platform"
    context = 100

    def __init__(self, answers):
        self.answers, self.asked, self.options, self.loaded = list(answers), [], {}, {}
        self.prefix = None

    def session(self):
        return self

    def generate(self, prompt, **options):
        is_session = isinstance(prompt[0], dict)
        prompts = [prompt] if is_session else prompt
        self.asked += prompts
        self.options = options
        return self._chunks(prompts, options.get("think"))

    def _chunks(self, prompts, think):
        for i in reversed(range(len(prompts))):  # the last is ready first
            text = self.answers.pop(0)
            if isinstance(text, BaseException):
                yield from self._pieces(i, "Well, ", think)
                raise text
            yield from self._pieces(i, text, think)
            message = self.parser.message(ids=True)
            output = Output(
                message["content"], [1] * len(text), "stop", prompt_tokens=5, seed=9,
                reasoning=message["reasoning_content"], tool_calls=message["tool_calls"],
            )  # fmt: skip
            yield Chunk(i, "", [], self.parser.finish(), output)

    def _pieces(self, i, text, think):
        self.parser = StreamParser("thinking" if think else "chat")
        for at in range(0, len(text), 3):
            piece = text[at : at + 3]
            yield Chunk(i, piece, [1] * len(piece), self.parser.push(piece))


@pytest.fixture
def script(monkeypatch, random_gguf):
    """script(*answers) puts a `Script` in the model's place, for the command line `… random_gguf …`."""

    def make(*answers) -> Script:
        model = Script(answers)

        def load(path, **options):
            model.loaded = {"path": path} | options
            return model

        monkeypatch.setattr(ds4jax, "load", load)
        return model

    return make


CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
