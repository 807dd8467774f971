"""Large int8 layers with activations as pairs of int8: nothing is rounded but the weights."""

from __future__ import annotations

import json

import pytest
import torch
from linearize_kernels.products import is_plain
from torch import nn

from linearize import api
from linearize.cli.app import run
from linearize.evaluation.heldout import score_rows
from linearize.evaluation.tasks.prefix import Query, log_likelihoods
from linearize.generation.engine import Engine
from linearize.generation.sampling import Sampling
from linearize.generation.state import State
from linearize.model.quantized import Quantization, QuantizedLinear
from linearize.quantization import pairs
from linearize.quantization.pairs import PairedLinear, pairs_are_fast
from linearize.quantization.rounding import rounded, to_int8
from linearize.sources.fingerprint import fingerprint
from linearize.sources.source import find_source, load_model
from tests.model.recorded import Recorder

pytestmark = pytest.mark.skipif(not pairs_are_fast(), reason="the processor does not multiply int8")


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(("bias", "kept"), [(False, 0.0), (True, 0.0), (True, 1 / 16)])
def test_nothing_is_rounded_but_the_weights(tokens, bias, kept):
    """Inputs of very different size, 0 among them: each row has a scale of its own."""
    torch.manual_seed(0)
    layer = rounded(nn.Linear(64, 96, bias=bias), Quantization(kept=kept))
    x = torch.randn(2, tokens, 64) * torch.logspace(-3, 3, tokens)[:, None]
    x[0, 0] = 0
    want = layer.double()(x.double())
    got = PairedLinear(layer.float())(x)
    assert got.dtype == x.dtype and got.shape == want.shape
    assert bool(((got - want).norm(dim=-1) <= 2**-13 * want.norm(dim=-1)).all())


@torch.no_grad()
def test_large_layers_take_pairs(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96))
    model.device = torch.device("cpu")
    monkeypatch.setattr(pairs, "_LARGE", 64 * 96)
    x = torch.randn(3, 64)
    want = model(x)
    assert [type(layer) for layer in to_int8(model)] == [QuantizedLinear, PairedLinear]
    assert float((model(x) - want).norm() / want.norm()) < 0.02


@pytest.fixture(scope="module")
def checkpoint(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "model"
    api.convert(tiny_folder, folder, "window-gla", overrides=["mixer.window=16"])
    return folder


@pytest.fixture
def paired(checkpoint, monkeypatch):
    """A model in int8 whose linear layers all take pairs, as those of a large model do."""
    monkeypatch.setattr(pairs, "_LARGE", 1)
    model = load_model(find_source(str(checkpoint)), dtype="int8")
    assert isinstance(model.get_output_embeddings(), PairedLinear)
    assert not [one for one in model.modules() if is_plain(one) or type(one) is QuantizedLinear]
    return model


@pytest.fixture
def whole(checkpoint):
    return load_model(find_source(str(checkpoint)), dtype="float32")


IDS = torch.arange(5, 45)[None]


@torch.no_grad()
@pytest.mark.parametrize("recorded", [False, True])
def test_the_engine_writes_with_a_paired_head(paired, recorded):
    """Each token is the most likely one of a forward over all before it; a recorded step writes the same."""
    engine = Engine(paired, Recorder() if recorded else None)
    written = engine.generate(Sampling(24), IDS, keep=True)
    logits = paired(torch.cat([IDS, written.tokens], 1)).logits[0, IDS.shape[1] - 1 : -1]
    chosen = logits.gather(1, written.tokens[0, :, None])[:, 0]
    assert written.tokens.shape == (1, 24) and bool((logits.amax(-1) - chosen <= 1e-3 * logits.std()).all())
    further = engine.generate(Sampling(4), written.tokens[:, :0], state=written.state).tokens
    assert torch.equal(further, Engine(paired).generate(Sampling(28), IDS).tokens[:, 24:])


@torch.no_grad()
def test_a_paired_model_is_scored_as_any_other(paired, whole):
    """Continuations by prefix, and held-out rows: near the model of whole weights, and not on it."""
    context = tuple(range(5, 30))
    queries = [Query((*context, *range(40, 40 + n)), (7, *range(40, 40 + n))) for n in range(4)]
    scores = [log_likelihoods(model, queries, batch_size=2, max_length=256) for model in (paired, whole)]
    for (nats, _), (expected, _) in zip(*scores, strict=True):
        assert nats != expected and nats == pytest.approx(expected, rel=0.05)
    rows = {"input_ids": IDS, "labels": IDS}
    found = score_rows(paired, rows, teacher=whole)
    assert 0 < float(found.mean_kl.mean) < 0.05
    assert float(found.loss) == pytest.approx(float(score_rows(whole, rows).loss), rel=0.05)


def test_a_state_belongs_to_the_integers_that_it_was_written_by(paired, checkpoint, tmp_path):
    """A weight below its channel's largest leaves the scale as it was, and only the packed integers differ."""
    again, other = (load_model(find_source(str(checkpoint)), dtype="float32") for _ in range(2))
    with torch.no_grad():
        weight = other.model.layers[0].mlp.up_proj.weight
        weight[0, int(weight[0].abs().argmin())] += 3 * weight[0].abs().max() / 127
    again, other = to_int8(again), to_int8(other)
    own = fingerprint(paired)
    assert fingerprint(again) == own
    assert {name for name, value in fingerprint(other).items() if value != own[name]} == {"weights"}
    State.read(paired, IDS).save(tmp_path / "kept", paired)
    assert int(State.load(tmp_path / "kept", again).tokens) == IDS.shape[1]
    with pytest.raises(Exception, match="saved by another model or configuration"):
        State.load(tmp_path / "kept", other)


def test_commands_with_a_paired_head(checkpoint, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(pairs, "_LARGE", 1)
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))

    def told(*words):
        capfd.readouterr()
        assert run([str(word) for word in words]) == 0, capfd.readouterr().err
        return json.loads(capfd.readouterr().out)

    facts = told(
        "bench",
        checkpoint,
        "--int8",
        "--lengths",
        "32,64",
        "--batches",
        "1,2",
        "--steps",
        "2",
        "--repeats",
        "1",
        "--json",
    )
    rows = [row for row in facts["rows"] if row["system"] == "int8"]
    assert len(rows) == 8 and all(row["tokens_per_second"] > 0 for row in rows)
    weights = facts["weights_bytes"]
    assert weights["int8"] < weights["model"]
    model = to_int8(load_model(find_source(str(checkpoint)), dtype="float32"))
    integers = sum(one.packed_nbytes for one in model.modules() if isinstance(one, PairedLinear))
    assert weights["int8"] > integers > 0.1 * weights["model"]
    state = tmp_path / "kept"
    line = ("generate", checkpoint, "Once upon a time there was a", "-n", "4", "--dtype", "int8", "--json")
    saved = told(*line, "--save-state", state)
    assert saved["new_tokens"] > 0
    assert told(*line, "--load-state", state)["loaded_state"]["tokens"] == saved["saved_state"]["tokens"]
    (tmp_path / "wikitext2").mkdir()
    page = " = A dog = \n\n Once upon a time , a dog ran home .\n"
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(page * 9)
    scored = told(
        "eval", checkpoint, "--tasks", "wikitext2", "--data", tmp_path, "--dtype", "int8", "--baseline",
        "none,no_recurrence", "--json",
    )  # fmt: skip
    values = scored["metrics"][0]["values"]
    assert values["model"]["value"] == pytest.approx(values["no_recurrence"]["value"], rel=0.05)
