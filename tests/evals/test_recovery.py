"""The recovery experiment runs from one command, on a tiny model, and what is done is not done again."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from evals.recovery import __main__ as module
from evals.recovery import state
from evals.recovery.__main__ import SYSTEMS, TINY, Recovery, Scale, main, tokens_of
from linearize.conversion.swap import convert_model
from linearize.data.load import reserved_tokens
from linearize.recipe import load_recipe
from linearize.sources.source import find_source, load_model

HELD_OUT = "--tasks held_out --baseline none,teacher,window"
BY_POSITION = "--tasks loss_by_position --lengths 128 --baseline none,teacher,window"


@pytest.mark.check
def test_a_dry_run_from_text_to_plots(data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        module, "TINY", Scale(TINY.most, TINY.held_out, TINY.settings, (HELD_OUT, f"{BY_POSITION} --samples 1"))
    )
    given = [str(tmp_path / "out"), "--data", str(data_folder), "--dry-run", "--systems", "ours"]
    main(given)
    told = capsys.readouterr().out
    assert told.splitlines()[-1] == module.DRY
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    first, last = found["cells"]
    assert (first["budget"], first["tokens"], last["budget"]) == (0, 0, 2048)
    assert 1024 < last["tokens"] <= 2048  # rows that a prompt fills are left out
    for cell in (first, last):
        assert {"kl", "loss", "late"} <= cell["figures"]["model"].keys()  # of two reports
        assert cell["figures"]["teacher"]["kl"][0] == pytest.approx(0, abs=1e-6)
        assert cell["figures"]["teacher"]["loss"] == first["figures"]["teacher"]["loss"]  # the same rows
    assert first["figures"]["model"] == first["figures"]["window"]  # nothing was trained
    assert last["figures"]["model"] != first["figures"]["model"]
    assert "| ours | 0 |" in told and {"kl.svg", "loss.svg"} <= {p.name for p in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(module, "_linearize", lambda *words: pytest.fail(f"done before: {words}"))
    main(given)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["cells"] == found["cells"]
    with pytest.raises(SystemExit):
        main([*given, "--budgets", "0,20M"])
    assert "these budgets need" in capsys.readouterr().err


def test_systems_have_the_same_text_and_all_of_a_budget(tmp_path, monkeypatch):
    recovery = Recovery(tmp_path, tmp_path / "data", "model", Scale(), 1, ["seed=3"])
    for budget in ("0.2M", "2M", "100M"):
        held = set()
        for path in SYSTEMS.glob("*.yaml"):
            recipe = recovery.recipe(path.stem, budget)
            assert recipe.seed == 3 and recipe.mixer == load_recipe(str(path)).mixer
            spent = sum((stage.data.tokens or 0) * stage.epochs for stage in recipe.stages)
            assert spent == pytest.approx(tokens_of(budget), rel=1e-3)
            assert all((stage.data.tokens or 0) <= 6_000_000 for stage in recipe.stages)
            texts = {json.dumps([one.model_dump() for one in stage.data.mix]) for stage in recipe.stages}
            assert len(texts) == 1
            held.add((*texts, json.dumps(reserved_tokens(recipe.stages))))
        assert len(held) == 1 and len(list(SYSTEMS.glob("*.yaml"))) == 4
    assert [tokens_of(text) for text in ("0", "2048", "0.2M", "3k")] == [0, 2048, 200_000, 3000]


def test_fewer_different_tokens_are_read_more_often(tmp_path, monkeypatch):
    made = []

    def recovery(*given) -> Recovery:
        made.append(Recovery(*given))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "Recovery", recovery)
    with pytest.raises(KeyboardInterrupt):
        main([str(tmp_path), "--data", str(tmp_path), "--model", "model", "--most", "0.5M"])
    (stage,) = made[0].recipe("landmarks", "2M").stages
    assert (stage.data.tokens, stage.epochs) == (500_000, 4)


@torch.no_grad()
def test_slots_go_to_what_the_state_recalls_worst(tiny_folder):
    changes = ["mixer.window=16", "mixer.landmarks=16", "mixer.recurrence=gated_deltanet", "mixer.feature_map=identity"]
    recipe = load_recipe("window-gla", [*changes, "mixer.rope=true"])
    model = convert_model(load_model(find_source(str(tiny_folder))), recipe.mixer).eval()
    ids = torch.arange(2 * 60).view(2, 60) * 7 % 101
    cache = DynamicCache()
    with mock.patch.object(state, "DynamicCache", return_value=cache):
        state.WorstRecalled(model, beside=False)(ids)
    kept = cache.layers[0].parts["landmarks"]["number"].transpose(1, 2).sort(-1).values
    # The state is empty at the first merge, so what it recalls worst are the longest values of tokens 4 to 35.
    values: list[Tensor] = []
    attention = model.attention_layers[0]
    with attention.v_proj.register_forward_hook(lambda *args: values.append(args[-1])):
        model(ids, use_cache=False)
    lengths = values[0][:, 4:36].unflatten(-1, (attention.layer.key_value_heads, -1)).norm(dim=-1).transpose(1, 2)
    assert torch.equal(kept, lengths.topk(16).indices.sort(-1).values.int() + 5)
