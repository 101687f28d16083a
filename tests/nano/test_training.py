"""Training nano: the optimizer, windows, pieces, rounding, the shortcuts, and a small run from shards to GGUF."""

import csv
import json
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import quant, weights
from ds4jax.chat.tokenizer import train_bpe
from ds4jax.errors import DS4Error
from ds4jax.model import Config, Tap, hyper_connections
from ds4jax.model import attention as attention_module
from ds4jax.model.params import param_shapes
from scripts import eval_nano, make_nano, train_nano
from scripts.nano import muon, net, pieces, shards, stream, windows

CONFIG = {
    "hidden_size": 256, "vocab_size": 512, "num_hidden_layers": 2, "num_nextn_predict_layers": 1,
    "compress_ratios": [4, 128, 0], "hc_sinkhorn_iters": 2, "num_attention_heads": 2, "head_dim": 32,
    "qk_rope_head_dim": 16, "q_lora_rank": 32, "o_groups": 1, "o_lora_rank": 32, "sliding_window": 16,
    "index_n_heads": 2, "index_head_dim": 32, "index_topk": 4, "n_routed_experts": 3, "num_experts_per_tok": 2,
    "moe_intermediate_size": 256, "num_hash_layers": 1, "max_position_embeddings": 4096,
}  # fmt: skip
ONE_LAYER = CONFIG | {
    "num_hidden_layers": 1, "num_nextn_predict_layers": 0, "compress_ratios": [4], "num_hash_layers": 0
}  # fmt: skip


def random_weights(config: Config) -> dict[str, np.ndarray]:
    """Weights of a model's sizes by numpy alone: nothing to compile."""
    rng, out = np.random.default_rng(0), {}
    for path, (shape, kind) in param_shapes(config).items():
        if kind == "ids":
            k = config.num_experts_per_tok
            out[path] = np.argsort(rng.random((shape[0], config.n_routed_experts)))[:, :k].astype(np.int32)
        elif kind == "norm":
            out[path] = np.ones(shape, np.float32)
        else:
            std = shape[-1] ** -0.5 if kind in ("linear", "experts") else 0.05
            out[path] = rng.normal(scale=std, size=shape).astype(np.float32)
    return out


# --- the optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (3, 96, 32), (2, 32, 96)])
def test_orthogonalize(shape):
    """Singular values land near one and singular vectors stay, for square, tall and wide stacks."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    u, _, v = np.linalg.svd(x, full_matrices=False)
    y = np.asarray(jax.jit(muon.orthogonalize)(x))
    s = np.linalg.svd(y, compute_uv=False)
    assert s.min() > 0.4 and s.max() < 1.3
    # in the basis of x's singular vectors y is diagonal
    core = np.swapaxes(u, -1, -2) @ y @ np.swapaxes(v, -1, -2)
    off = core - core * np.eye(core.shape[-1])
    assert np.abs(off).max() < 0.1


def test_every_parameter_has_a_rule():
    labels = muon.groups(Config.from_dict(CONFIG))
    assert labels["layers.1.ffn.experts.w1"] == labels["layers.0.attn.wkv.weight"] == "muon"
    assert labels["layers.1.ffn.gate.bias"] == "none"
    assert {labels[p] for p in ("norm.weight", "layers.0.attn.sink", "layers.0.hc_attn.fn", "embed.weight")} == {
        "adam_plain"
    }
    assert labels["layers.0.attn.indexer.weights_proj.weight"] == labels["head.weight"] == "adam"
    assert "layers.0.ffn.gate.tid2eid" not in labels


def test_optimizer_steps_have_the_stated_size():
    """Muon's steps have a root mean square near 0.2 lr, and nothing moves what has no rule or no decay."""
    config = Config.from_dict(ONE_LAYER | {"compress_ratios": [0], "hidden_size": 64, "moe_intermediate_size": 64})
    opt = muon.optimizer(config, decay=0.0)
    rng = np.random.default_rng(1)
    params = {p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, (s, _) in param_shapes(config).items()}
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    new, _, norm = jax.jit(opt.update)(grads, opt.init(params), params, 0.01)
    step = np.asarray(new["layers.0.ffn.experts.w1"] - params["layers.0.ffn.experts.w1"])
    assert 0.7 < np.sqrt((step**2).mean()) / (0.2 * 0.01) < 1.3
    assert np.array_equal(new["layers.0.ffn.gate.bias"], params["layers.0.ffn.gate.bias"])
    total = sum(float((g**2).sum()) for p, g in grads.items() if not p.endswith("gate.bias"))
    assert float(norm) == pytest.approx(total**0.5, rel=1e-4)


# --- windows ---------------------------------------------------------------------------------------------------------


def groups():
    rng = np.random.default_rng(2)
    text = [(rng.integers(3, 500, n), []) for n in (300, 500)]
    recall = [(rng.integers(3, 500, n), [(n - 3, n - 1)]) for n in (20, 30, 200, 25, 40, 28)]
    return {"prose": shards.Group.of(text), "needle": shards.Group.of(recall)}


def test_text_windows():
    g = groups()
    rows = windows.text_windows(g, 100, 5)
    assert np.array_equal(rows[1], g["prose"].tokens[100:202]) and len(rows) == 5


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_pieces_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3 << 20)
    config = Config.from_dict(CONFIG)
    w = random_weights(config)
    importance = {"layers.1.ffn.experts.in": np.ones((3, 256), np.float32)}
    written = pieces.save(tmp_path, config, w, importance, {"step": 7})
    assert len(written) > 1 and all(p.stat().st_size < 3 << 20 for p in written)
    config2, w2, importance2, notes = pieces.load(tmp_path)
    assert config2 == config and notes == {"step": 7} and importance2.keys() == importance.keys()
    for p, a in w.items():
        assert np.array_equal(w2[p], a.astype(w2[p].dtype)), p
    assert w2["layers.0.attn.sink"].dtype == np.float32 and w2["layers.0.attn.wkv.weight"].dtype == np.float16
    written[-1].unlink()
    with pytest.raises(DS4Error, match="nano-"):
        pieces.load(tmp_path)


def test_pieces_refuse_what_is_not_finite(tmp_path):
    config = Config.from_dict(CONFIG)
    w = random_weights(config)
    w["head.weight"] = w["head.weight"] * 1e7
    with pytest.raises(DS4Error, match="head.weight"):
        pieces.save(tmp_path, config, w, {})


# --- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["IQ2_XXS", pytest.param("Q2_K", marks=pytest.mark.full)])
def test_round_trip_is_the_files_rounding(format):
    """The device's rounding, in tiles, is that of the encoder that writes the file."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 5, 256)).astype(np.float32)
    imp = rng.uniform(0.1, 2, size=(2, 256)).astype(np.float32)
    ours = np.asarray(net.round_trip(jnp.asarray(x), jnp.asarray(imp)[:, None], format, tile=4))
    theirs = np.asarray(quant.dequantize(quant.quantize(x, format, imp)))
    assert np.mean(ours == theirs) > 0.99  # rounding of a sum may turn a rare tie
    assert 0.1 < np.sqrt(np.mean((ours - x) ** 2)) < 0.5


def test_rounding_passes_gradients_straight_through():
    w, d = {"a": jnp.arange(4.0)}, {"a": jnp.full(4, 0.25)}
    value, grad = jax.value_and_grad(lambda w: jnp.sum(net.perturb(w, d)["a"] ** 2))(w)
    assert float(value) == pytest.approx(float(jnp.sum((jnp.arange(4.0) + 0.25) ** 2)))
    assert np.allclose(grad["a"], 2 * (np.arange(4) + 0.25))


# --- shortcuts and hooks ---------------------------------------------------------------------------------------------


def test_sinkhorn_by_parts():
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 4)) * 2
    t = jax.random.normal(jax.random.key(1), x.shape)
    both = [
        jax.value_and_grad(lambda x, f=f: jnp.sum(t * f(x, 3, 1e-6)))
        for f in (hyper_connections.sinkhorn, net.sinkhorn_by_parts)
    ]
    plain, parts = jax.jit(lambda x: [f(x) for f in both])(x)
    for a, b in zip(plain, parts, strict=True):
        assert np.allclose(a, b, atol=1e-5)


@pytest.fixture
def shortcuts(monkeypatch):
    """The shortcuts in force for one test."""
    monkeypatch.setattr(attention_module.Attention, "_selected", net._selected)
    monkeypatch.setattr(hyper_connections, "sinkhorn", net.sinkhorn_by_parts)


@pytest.fixture(scope="module")
def small():
    """One layer with an indexer and a router, its weights, and tokens."""
    config = Config.from_dict(ONE_LAYER)
    arrays = {p: jnp.asarray(a) for p, a in random_weights(config).items()}
    return config, net.Net(config, dtype=jnp.float32), arrays, tokens_for_tests()


def tokens_for_tests():
    return jax.random.randint(jax.random.key(5), (2, 66), 3, 500)


@pytest.mark.parametrize(
    ("config", "dense"),
    [
        (ONE_LAYER, True),
        pytest.param(CONFIG, True, marks=pytest.mark.full),
        pytest.param(CONFIG, False, marks=pytest.mark.full),
    ],
)
def test_shortcuts_change_nothing(config, dense, request):
    config, tokens = Config.from_dict(config), tokens_for_tests()
    arrays = random_weights(config)
    model = net.Net(config, dtype=jnp.float32, dense=dense)

    def losses():
        return jax.jit(lambda w, t: net.objective(model, w, t, 1 + 2.0 * (t > 400), net.LossWeights())[1][0])(
            arrays, tokens
        )

    plain = losses()
    request.getfixturevalue("shortcuts")
    quick = losses()
    mtp = {"mtp"} if config.num_nextn_predict_layers else set()
    assert plain.keys() == quick.keys() >= {"ce", "kl", "imbalance"} | mtp
    for name in plain:
        assert float(quick[name]) == pytest.approx(float(plain[name]), rel=1e-4), name


def test_recent_entries():
    """The newest visible entries, -1 where there are fewer; in force only inside `selecting`."""
    visible = jnp.arange(10) < jnp.array([0, 2, 9])[:, None]
    chosen = np.asarray(net.recent_entries(jnp.zeros((1, 3, 10)), visible[None], 4))
    assert chosen.tolist() == [[[-1] * 4, [1, 0, -1, -1], [8, 7, 6, 5]]]
    before = attention_module.select_entries
    with net.selecting(net.recent_entries):
        assert attention_module.select_entries is net.recent_entries
    assert attention_module.select_entries is before


def test_distillation_is_least_where_both_agree():
    """Its minimum over the draft's logits is the teacher's distribution, and the teacher gets no gradient."""
    teacher = jnp.asarray(np.random.default_rng(6).normal(size=(1, 3, 5)), jnp.float32)
    weight = jnp.array([[1.0, 0.0, 2.0]])
    value, (draft, taught) = jax.value_and_grad(net._distillation, argnums=(0, 1))(teacher, teacher, weight)
    assert np.allclose(draft, 0, atol=1e-6) and not np.asarray(taught).any()
    assert float(net._distillation(teacher + jnp.arange(5.0), teacher, weight)) > float(value)


def test_agreement_is_of_the_same_token(small):
    """The draft at t and the model's prediction at t + 1 are both of token t + 2."""
    config, model, arrays, tokens = small
    agree = np.asarray(jax.jit(lambda w, t: net.judge(model, w, t))(arrays, tokens)[-1])
    assert agree.shape == (2, 64) and not agree.any()  # without an MTP layer there is no draft


def test_weights_to_begin_with_must_fit(small, tmp_path):
    config, _, arrays, _ = small
    numbers = {p: np.asarray(a) for p, a in arrays.items()}
    pieces.save(tmp_path, config, numbers, {})
    state = {"params": {p: jnp.zeros(a.shape) for p, a in arrays.items()}, "ids": {}}
    begun = train_nano.begin_from(state, tmp_path)["params"]
    assert np.allclose(begun["embed.weight"], numbers["embed.weight"], atol=1e-3)
    with pytest.raises(DS4Error, match="head.weight"):
        train_nano.begin_from({"params": state["params"] | {"head.weight": jnp.zeros((2, 2))}, "ids": {}}, tmp_path)


def test_the_hook_reaches_the_model(small):
    """With the newest entries read instead of the chosen ones, late predictions change and early ones do not."""
    config, _, arrays, tokens = small
    judge = eval_nano.Judge(config, arrays, "float32")
    rows = np.asarray(tokens)
    a, b = judge(rows)[0], judge(rows, "most recent")[0]
    enough = 4 * (config.index_topk + 1) - 1  # up to here all entries are chosen either way
    assert np.allclose(a[:, :enough], b[:, :enough], atol=1e-5)
    assert np.abs(a[:, enough:] - b[:, enough:]).max() > 1e-3


def test_balance_moves_the_bias_towards_even_loads():
    w = {"layers.1.ffn.gate.bias": jnp.zeros(3), "x": jnp.ones(1)}
    new = net.balance_bias(w, {"layers.1": jnp.array([5.0, 1.0, 3.0])}, 0.1)
    assert np.allclose(new["layers.1.ffn.gate.bias"], [-0.1, 0.1, 0.0])


def test_importance_is_the_mean_square_of_what_experts_read(small):
    _, model, arrays, tokens = small
    sites = ("layers.0.ffn_in", "layers.0.router.experts")

    def both(w, t):
        tap = Tap(names=sites)
        net.run(model.bind(w), t, tap)
        return net.importance(model, w, t), [tap.store[s] for s in sites]

    got, read = jax.jit(both)(arrays, tokens)
    x, ids = (np.asarray(a).reshape(-1, a.shape[-1]) for a in read)
    mean = np.mean([x[t] ** 2 for t in range(len(x)) for _ in range(2)], axis=0)
    for e in range(3):
        mine = x[(ids == e).any(axis=1)] ** 2
        expected = (mine.sum(0) + 16 * mean) / (len(mine) + 16)
        assert np.allclose(got["layers.0.ffn.experts.in"][e], expected, rtol=1e-3, atol=1e-5)
    assert got["layers.0.ffn.experts.mid"].shape == (3, 256)
    assert net.expert_inputs("layers.0.ffn.experts.w2") == "layers.0.ffn.experts.mid"


# --- schedule and scores ---------------------------------------------------------------------------------------------


def test_phases_and_rate():
    phases = train_nano.parse_phases("128:dense:1,128+256:sparse:3")
    assert [(p.lengths, p.dense, p.until) for p in phases] == [((128,), True, 0.25), ((128, 256), False, 1.0)]
    with pytest.raises(SystemExit, match="dense or sparse"):
        train_nano.parse_phases("128:thick:1")
    args = train_nano.parse("--data d --out o --lr 1 --warmup 10 --cooldown 0.5".split())
    assert train_nano.rate(0.0, 0, args) == pytest.approx(0.1)
    assert train_nano.rate(0.4, 100, args) == 1.0
    assert train_nano.rate(0.75, 100, args) == pytest.approx(0.5)
    assert train_nano.rate(1.0, 100, args) == train_nano.rate(1.2, 100, args) == 0.0


def test_drafts_of_all_parts_make_one_share():
    """Parts of unequal size, measured in several runs, count by their drafts."""
    tasks = {"arithmetic": {"drafts": [9, 10]}, "tools": {"drafts": [0, 30]}}
    assert eval_nano.accepted({"tasks": tasks}) == {"tasks": 9 / 40, "all": 9 / 40}
    both = eval_nano.accepted({"tasks": tasks, "prose_drafts": [6, 20]})
    assert both == {"tasks": 9 / 40, "prose": 6 / 20, "all": 15 / 60}
    assert eval_nano.accepted({"tasks": {}}) == {}


def test_recall_bins():
    document = np.array([0, 7, 8, 9, 7, 8, 1, 7, 8])
    assert eval_nano.distance(document, 7, 9) == 3
    assert eval_nano.distance(document, 3, 4) == -1
    bins = eval_nano.by_distance([(10, True), (70, False), (80, True), (-1, False)])
    assert bins["0-63"] == {"recall": 1.0, "answers": 1} and bins["64-127"]["recall"] == 0.5
    assert bins["all"] == {"recall": 0.5, "answers": 4}


# --- the whole way ---------------------------------------------------------------------------------------------------


def write_data(folder):
    """Shards of a little language, its tokenizer, and the model's config."""
    rng = Random(4)
    words = "the old ship sailed over a grey sea and came home late with salt and stories for all".split()
    sentence = lambda: " ".join(rng.choices(words, k=12)).capitalize() + "."  # noqa: E731
    texts = [" ".join(sentence() for _ in range(40)) for _ in range(30)]
    tokenizer = train_bpe(texts, 512)
    tokenizer.save(folder / "tokenizer.json")

    def ids(text):
        return np.array([tokenizer.bos_id, *tokenizer.encode(text, special=False), tokenizer.eos_id])

    def needle():
        document = ids(f"The code is {rng.randrange(10)}. {sentence()} The code is 5.")
        return document, [(len(document) - 3, len(document) - 2)]

    for split, some in (("train", texts[:25]), ("heldout", texts[25:])):
        found = {
            "prose": shards.Group.of((ids(t), []) for t in some),
            "needle": shards.Group.of(needle() for _ in range(40)),
        }
        if split == "heldout":
            found["needle_256"] = shards.Group.of(needle() for _ in range(10))
        shards.write(folder / f"{split}.npz", found)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return tokenizer


@pytest.mark.full
def test_from_shards_to_a_gguf(tmp_path, monkeypatch):
    """Training lowers the loss, resumes where it stopped, and its pieces become GGUFs that score alike."""
    monkeypatch.setattr(net, "use_shortcuts", lambda: None)
    tokenizer = write_data(tmp_path)
    out = tmp_path / "out"
    common = (
        f"--data {tmp_path} --config {tmp_path}/config.json --out {out} --dispatch 5 --tokens-per-step 512 --warmup 5 "
        "--phases 64:dense:0.5,64+128:sparse:0.5 --eval-length 64 --eval-windows 8 --eval-batch 4 --eval-items 1 "
        "--log-every 5 --qat 0.4 --qat-every 5 --importance-batches 1 --mtp-weight 0.3 --workers 1"
    ).split()
    common += ["--shares", json.dumps(dict.fromkeys(stream.SHARES, 0) | {"prose": 3, "arithmetic": 1})]
    first = train_nano.train(train_nano.parse([*common, "--steps", "20"]))
    scores = first["as trained"]
    assert (
        scores["bits_per_byte"] < 3.5
        and first["through 2-bit experts"]["bits_per_byte"] < scores["bits_per_byte"] + 0.3
    )
    more = ["--steps", "40", "--resume", "--gguf", f"{tmp_path}/early.gguf"]
    again = train_nano.train(train_nano.parse([*common, *more]))
    assert again["as trained"]["bits_per_byte"] < scores["bits_per_byte"]
    with open(out / "log.csv") as f:
        rows = list(csv.DictReader(f))
    assert [int(r["step"]) for r in rows] == list(range(5, 45, 5))
    assert float(rows[-1]["ce"]) < float(rows[0]["ce"]) - 1 and {r["phase"] for r in rows} == {"0", "1"}
    assert {r["length"] for r in rows} == {"64", "128"} and 0 < float(rows[-1]["agree"]) <= 1
    assert "<svg" in (out / "loss.svg").read_text()[:2000]

    config, arrays, importance, notes = pieces.load(out)
    assert notes["step"] == 40 and notes["qat"] and len(importance) == 2 * 3
    by_type = make_nano.make(out, tmp_path / "tokenizer.json", "q2", tmp_path / "q2.gguf", 12 << 20)
    assert {"IQ2_XXS", "Q2_K", "Q8_0", "F16", "F32", "I32"} <= by_type.keys()
    assert (tmp_path / "early.gguf").read_bytes() == (tmp_path / "q2.gguf").read_bytes()
    make_nano.make(out, tmp_path / "tokenizer.json", "f16", tmp_path / "f16.gguf", 1 << 30)
    with weights.open_checkpoint(tmp_path / "f16.gguf") as ckpt:
        loaded = weights.load_arrays(ckpt, progress=False)
    assert all(np.array_equal(np.asarray(loaded[p]), a) for p, a in arrays.items() if a.dtype == np.float16)
    with pytest.raises(DS4Error, match="MiB"):
        make_nano.make(out, tmp_path / "tokenizer.json", "q2", tmp_path / "none.gguf", 1 << 20)
    assert not (tmp_path / "none.gguf").exists()

    heldout = shards.read(tmp_path / "heldout.npz")
    args = type(
        "Args",
        (),
        {
            "dtype": "float32",
            "length": 64,
            "windows": 40,
            "batch": 4,
            "needles": 5,
            "prompt": "The",
            "sample": 5,
            "parts": ("text", "distance", "sample"),
        },
    )
    measured, saved = {"f16": {}, "q2": {}}, []
    for name, out in measured.items():
        save = lambda out=out: saved.append(dict(out))  # noqa: E731
        eval_nano.measure(tmp_path / f"{name}.gguf", heldout, tokenizer, args, out, lambda text: None, save)
    assert saved[-1] == measured["q2"] and "recall" not in saved[0] and "bits_per_byte" in saved[0]
    begun = len(saved)
    eval_nano.measure(tmp_path / "q2.gguf", heldout, tokenizer, args, measured["q2"], lambda text: None, save)
    assert len(saved) == begun  # a run goes on: nothing is measured twice
    bits = {name: m["bits_per_byte"]["all"] for name, m in measured.items()}
    assert bits["f16"] == pytest.approx(again["as trained"]["bits_per_byte"], rel=0.02)
    assert bits["q2"] == pytest.approx(again["through 2-bit experts"]["bits_per_byte"], rel=0.02)
    assert measured["q2"]["sample"].startswith("The") and measured["q2"]["recall"]["indexer"]["all"]["answers"] == 5
    assert "| bits per byte, all |" in eval_nano.table(measured)
