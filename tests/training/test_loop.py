"""The training loop: a step is that of any split; evaluation, `keep`, `patience`; runs that are killed and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.conversion.swap import convert_model
from linearize.data.rows import NO_LOSS, Document, Rows, TrainingData, pack, read_data
from linearize.errors import DataError, LinearizeError, RecipeError
from linearize.jobs.stages import run_stages
from linearize.recipe import MixerSpec, Recipe, Stage, load_recipe
from linearize.runtime.interruption import Interrupted
from linearize.training import checkpoints, metrics
from linearize.training.adapters import choose_trained
from linearize.training.checkpoints import MANIFEST, Progress, is_done, newest
from linearize.training.loop import StageLoop
from tests.conftest import random_llama
from tests.training.troubles import at_step, same, trained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STAGES: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft"},
    "distill": {"objective": "distill", "temperature": 2.0},
    "distill, top 8": {"objective": "distill", "top_k": 8},
    "mixture": {"objective": {"distill": 0.7, "sft": 0.3}},
    "align, beyond the window": {"objective": "align", "beyond": 1},
    "align, the whole layer": {"objective": "align", "beyond": 0},
}
LENGTH = 24


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rows(count: int, seed: int, *, loss: bool = True) -> Rows:
    """Packed documents of 3 to 40 tokens, whose first third carries no loss."""
    draw, documents, total = random.Random(seed), [], 0  # noqa: S311
    while total < count * LENGTH:
        tokens = draw.randint(3, 40)
        documents.append(
            Document([draw.randrange(61) for _ in range(tokens)], [loss and n >= tokens // 3 for n in range(tokens)])
        )
        total += tokens
    return pack(documents, LENGTH)[slice(0, count)]


def loop_of(teacher: LlamaForCausalLM, folder: Path, held_out: Rows | None = None, **changes: Any) -> StageLoop:
    """A loop over 7 rows, 5 to a step."""
    stage = Stage.model_validate(
        {"data": {"source": "text.txt"}, "length": LENGTH, "batch_tokens": 5 * LENGTH, "train": "full", **changes}
    )
    student = convert_model(deepcopy(teacher), MixerSpec(window=6, sinks=2))
    choose_trained(student, stage.train)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():  # away from the start, where some gradients are 0
            parameter += 0.02 * torch.randn_like(parameter)
    data = TrainingData(rows(7, 0), rows(2, 1) if held_out is None else held_out, "text", 9, 0.0)
    return StageLoop(student, teacher, stage, data, folder, 0, lambda _: None)


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("step", [0, 1])  # of five rows, and of two
def test_loss_and_gradient_of_a_step_are_those_of_any_split(teacher, tmp_path, kind, step):
    found = []
    for size in (8, 1, 2, 3):
        loop = loop_of(teacher, tmp_path, micro_batch=size, **STAGES[kind])
        loop.progress.step = step
        parts, losses = loop._backward()
        assert [len(part.rows) for part in parts] == [len(x) for x in torch.arange((5, 2)[step]).split(size)]
        gradient = torch.cat([p.grad.flatten() for p in loop.model.parameters() if p.grad is not None])
        found.append((torch.stack(losses).sum(), gradient))
    (loss, gradient), *others = found
    assert float(loss) > 0 and float(gradient.norm()) > 0
    for other, slope in others:
        assert abs(float(other - loss)) <= 1e-6 * float(loss)
        assert float((slope - gradient).norm()) <= 1e-6 * float(gradient.norm())


def test_the_divisor_is_the_step_s_tokens_with_loss(teacher, tmp_path):
    loop = loop_of(teacher, tmp_path, objective="sft", micro_batch=2)
    data = loop.data.train[loop.steps.rows_of(0)]
    logits = loop.model(input_ids=data.input_ids, position_ids=data.position_ids, use_cache=False).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), data.labels[:, 1:].flatten(), ignore_index=NO_LOSS)
    torch.testing.assert_close(torch.stack(loop._backward()[1]).sum(), expected.detach(), rtol=1e-6, atol=0)


def test_held_out_losses_are_means_over_tokens(teacher, tmp_path):
    held_out = rows(3, 5)
    loop = loop_of(teacher, tmp_path, held_out, objective="align", micro_batch=2)
    found = loop.evaluate()
    given = {"input_ids": held_out.input_ids, "position_ids": held_out.position_ids, "use_cache": False}
    with torch.no_grad():
        ours, theirs = (model(**given).logits[:, :-1].flatten(0, 1) for model in (loop.model, teacher))
    labels = held_out.labels[:, 1:].flatten()
    assert found["held_out_loss"] == pytest.approx(float(F.cross_entropy(ours, labels)), rel=1e-5)
    own, other = (x[labels != NO_LOSS].log_softmax(-1) for x in (ours, theirs))
    kl = F.kl_div(own, other, log_target=True, reduction="batchmean")
    assert found["held_out_kl"] == pytest.approx(float(kl), rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("warmup", [0, 0.05, 1])
def test_every_schedule_trains_in_each_of_few_steps(teacher, tmp_path, schedule, steps, warmup):
    size = {1: 7, 2: 5}[steps] * LENGTH
    loop = loop_of(teacher, tmp_path, objective="sft", batch_tokens=size, schedule=schedule, warmup=warmup)
    logged: list[dict[str, Any]] = []
    loop.log = logged.append
    starts = []
    step = loop.train_step
    loop.train_step = lambda: (starts.append(loop.model.lm_head.weight.detach().clone()), step())[1]
    loop.train()
    assert [line["step"] for line in logged] == list(range(1, steps + 1))
    assert all(0 < line["lr"] <= loop.stage.lr for line in logged)
    after = [*starts[1:], loop.model.lm_head.weight.detach()]
    assert not any(torch.equal(a, b) for a, b in zip(starts, after, strict=True))


def test_losses_whose_sum_overflows_are_told(teacher, tmp_path, monkeypatch):
    loop = loop_of(teacher, tmp_path, objective="sft")
    parts, _ = loop._backward()
    monkeypatch.setattr(loop, "_backward", lambda: (parts, [torch.tensor(3e38)] * len(parts)))
    with pytest.raises(LinearizeError, match="the loss became inf at step 1, as the sum of its rows; there is no"):
        loop.train_step()


def test_held_out_rows_without_loss_are_refused_where_they_decide(teacher, tmp_path):
    silent = rows(2, 1, loss=False)
    for change in ({"keep": "best"}, {"patience": 1}):
        with pytest.raises(DataError, match="no held-out token carries loss"):
            loop_of(teacher, tmp_path, silent, objective="sft", **change)
    assert loop_of(teacher, tmp_path, silent, objective="sft", eval_every=1).eval_every == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["keep=best", "eval_every=0"], "keep=best: looks at held-out losses"),
        (["patience=2", "eval_every=0"], "patience=2: looks at held-out losses"),
        (["keep=best", "data.held_out=0"], "looks at held-out losses"),
        (["patience=0"], "patience"),
        (["keep=first"], "keep"),
        (["eval_every=-1"], "eval_every"),
    ],
)
def test_what_has_nothing_to_go_by_is_refused(changes, told):
    with pytest.raises(RecipeError, match=told) as refused:
        load_recipe("window-gla", [f"stages.0.{change}" for change in changes])
    assert "\n" not in str(refused.value)


def test_by_default_evaluations_read_a_tenth_at_most(teacher, tmp_path):
    steps = loop_of(teacher, tmp_path, objective="sft", epochs=20).steps  # 40 steps of 140 rows
    assert [steps.eval_every(held_out) for held_out in (0, 1, 2, 7, 14, 15)] == [0, 4, 6, 20, 40, 0]
    for change in ({"keep": "best"}, {"patience": 1}):
        assert loop_of(teacher, tmp_path, objective="sft", epochs=20, **change).steps.eval_every(50) == 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """Recipes of one stage of 6 steps that trains its mixers alone."""
    tiny, text = random_llama(tmp_path_factory.mktemp("tiny")), tmp_path_factory.mktemp("text") / "stories.txt"
    text.write_text("\n\n".join(f"There were {n} small cats and a dog." for n in range(99)))

    def make(*changes: str, **more: Any) -> Recipe:
        data = {"source": str(text), "tokens": 768, "held_out": 2}
        stage = {"objective": "sft", "data": data, "length": 32, "batch_tokens": 128, "save_every": 4, "warmup": 0}
        listed = [f"model={tiny}", "mixer.window=8", "lora=null", f"stages={json.dumps([{**stage, **more}])}"]
        return load_recipe("window-gla", [*listed, *changes])

    return make


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))


def lines(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def scripted(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> dict[int, dict[str, torch.Tensor]]:
    """Evaluations find these losses after these steps; returns the trained weights that they saw."""
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def evaluate(self: StageLoop) -> dict[str, float]:
        seen[self.progress.step] = checkpoints.whole_trained(self.model)
        seen[self.progress.step] = {name: tensor.clone() for name, tensor in seen[self.progress.step].items()}
        return {"held_out_loss": losses[self.progress.step]}

    monkeypatch.setattr(StageLoop, "evaluate", evaluate)
    return seen


def has(weights: dict[str, torch.Tensor], some: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weights[name], tensor) for name, tensor in some.items())


def test_evaluation_is_logged_and_changes_nothing(recipe, tmp_path, monkeypatch, capsys):
    common = {"objective": "distill", "hide_window": 0.5, "train": "lora"}
    adapted = "lora={rank: 2, dropout: 0.2}"
    without = trained(recipe(adapted, **common, eval_every=0), tmp_path / "without")
    capsys.readouterr()
    settings = recipe(adapted, **common, eval_every=4)
    assert same(without, trained(settings, tmp_path / "with"))
    plain, evaluated = lines(tmp_path / "without"), lines(tmp_path / "with")
    assert [line["loss"] for line in plain] == [line["loss"] for line in evaluated]
    assert not any("held_out_loss" in line for line in plain)
    assert [line["step"] for line in evaluated if "held_out_loss" in line] == [4, 6]
    last = evaluated[-1]
    assert last["held_out_loss"] > 0 and last["held_out_kl"] > 0
    assert f"held out {last['held_out_objective']:.4f}" in capsys.readouterr().err.splitlines()[-1]
    # The model that the run comes to has the last evaluation's loss.
    result = run_stages(settings, tmp_path / "with", say=lambda _: None, resume=True)
    rows = read_data(tmp_path / "with" / "stage-0.rows.safetensors").held_out
    logits = result.model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows.labels[:, 1:].flatten(), ignore_index=NO_LOSS)
    assert float(loss) == pytest.approx(last["held_out_loss"], rel=1e-4)


def test_the_best_weights_are_kept_also_by_a_run_that_is_resumed(recipe, tmp_path, monkeypatch):
    settings, work = recipe(eval_every=1, keep="best"), tmp_path / "work"
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 2.5, 6: 1.5}
    seen = scripted(monkeypatch, losses)
    said: list[str] = []
    work.mkdir()
    result = run_stages(settings, work, say=said.append)
    assert has(result.model.state_dict(), seen[2]) and not has(result.model.state_dict(), seen[6])
    assert "stage 1: kept step 2, held-out loss 1.0000" in said
    record = result.stages[-1]
    assert (record["kept_step"], record["held_out_loss"], record["steps"]) == (2, 1.0, 6)
    assert sorted(one.name for one in (work / "stage-0").iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    # A stage that is finished comes to the same.
    again = run_stages(settings, work, say=said.append, resume=True)
    assert any(line.startswith("stage 1: done before") for line in said) and again.stages == result.stages
    assert same(result.model.state_dict(), again.model.state_dict())

    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_step(patch, 5, stop)
        with pytest.raises(KeyboardInterrupt):
            trained(settings, tmp_path / "cut")
    assert newest(tmp_path / "cut" / "stage-0").name == "checkpoint-4"
    assert same(result.model.state_dict(), trained(settings, tmp_path / "cut", resume=True))
    # A checkpoint does not count without the best weights.
    (work / "stage-0" / "checkpoint-2" / "trained.safetensors").unlink()
    assert newest(work / "stage-0") is None


def test_a_stage_without_a_finite_held_out_loss_keeps_its_last_weights(recipe, tmp_path, monkeypatch):
    seen = scripted(monkeypatch, {6: float("nan")})
    assert has(trained(recipe(eval_every=6, keep="best"), tmp_path / "work"), seen[6])


@pytest.mark.parametrize("keep", ["last", "best"])
def test_patience_ends_a_stage(recipe, tmp_path, monkeypatch, keep):
    settings, work = recipe(eval_every=1, keep=keep, patience=2), tmp_path / "work"
    seen = scripted(monkeypatch, {1: 3.0, 2: 1.0, 3: 1.0, 4: 2.0})
    said: list[str] = []
    work.mkdir()
    result = run_stages(settings, work, say=said.append)
    assert "stage 1: ended after step 4, 2 evaluations without a better held-out loss" in said
    assert has(result.model.state_dict(), seen[{"last": 4, "best": 2}[keep]])
    (record,) = result.stages
    assert (record["steps"], record["stopped_after"], record["tokens"]) == (6, 4, 4 * 128)
    assert lines(work)[-1]["seconds_left"] == 0 and lines(work)[-1]["tokens"] == 4 * 128
    assert is_done(newest(work / "stage-0"))
    again = run_stages(settings, work, say=said.append, resume=True)
    assert said[-1].startswith("stage 1: done before (checkpoint-") and again.stages == result.stages
    assert same(result.model.state_dict(), again.model.state_dict())


def test_a_signal_in_the_last_step_of_a_stage_is_obeyed(recipe, tmp_path, monkeypatch):
    settings = recipe()
    settings = settings.model_copy(update={"stages": settings.stages * 2})
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="SIGTERM after step 6 of 6, which is saved"):
            trained(settings, tmp_path / "work")
    assert is_done(newest(tmp_path / "work" / "stage-0")) and not (tmp_path / "work" / "stage-1").exists()


def test_a_checkpoint_of_an_earlier_version_is_refused(recipe, tmp_path):
    settings, work = recipe(), tmp_path / "work"
    settings = settings.model_copy(update={"stages": settings.stages * 2})
    trained(settings, work)
    file = newest(work / "stage-0") / MANIFEST
    told = json.loads(file.read_text())
    earlier = {name: told[name] for name in told if name not in {*Progress.__dataclass_fields__, "done"}}
    file.write_text(json.dumps({**earlier, "skipped": 0}))
    with pytest.raises(LinearizeError, match="an earlier version of linearize wrote it; start again without") as caught:
        trained(settings, work, resume=True)
    assert "\n" not in str(caught.value)
    assert newest(work / "stage-1") is not None  # nothing was removed


class Killed(BaseException):
    pass


PLACES: tuple[tuple[Any, str], ...] = (
    (StageLoop, "micro_loss"), (StageLoop, "evaluate"), (StageLoop, "train_step"), (metrics, "append_json_line"),
    (checkpoints, "_write"), (checkpoints, "seal"), (checkpoints, "flush"), (checkpoints, "save_file"),
)  # fmt: skip
"""Functions in which a run may end."""


def killed_in(patch: pytest.MonkeyPatch, place: tuple[Any, str], call: int, kill: Callable[[], object]) -> None:
    """`kill` is called right after the `call`-th call of a function, or right before it where `call` is even."""
    owner, name = place
    inner, calls = getattr(owner, name), [0]

    def ends(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and call % 2 == 0:
            kill()
        result = inner(*args, **options)
        if calls[0] == call:
            kill()
        return result

    patch.setattr(owner, name, ends)


CHANGES: dict[str, Any] = {"objective": "sft", "hide_window": 0.5, "eval_every": 2, "keep": "best", "save_every": 2}


@pytest.fixture(scope="module")
def undisturbed(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[float]]:
    work = tmp_path_factory.mktemp("undisturbed")
    return trained(recipe(**CHANGES), work), [line["loss"] for line in lines(work)]


@pytest.mark.parametrize("seed", range(6))
def test_a_run_that_is_killed_anywhere_again_and_again_comes_to_the_same(
    recipe, undisturbed, tmp_path, monkeypatch, seed
):
    draw, work, kills = random.Random(seed), tmp_path / "work", 0  # noqa: S311

    def kill() -> None:
        raise Killed

    for _ in range(3):
        with monkeypatch.context() as patch:
            killed_in(patch, draw.choice(PLACES), draw.randint(1, 3), kill)
            try:
                found = trained(recipe(**CHANGES), work, resume=work.exists())
            except Killed:
                kills += 1
    found = trained(recipe(**CHANGES), work, resume=True)
    assert kills > 0
    assert same(undisturbed[0], found) and [line["loss"] for line in lines(work)] == undisturbed[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL is sent to a forked process")
@pytest.mark.parametrize(("place", "call"), [(PLACES[5], 2), (PLACES[3], 5)])
def test_a_process_that_is_killed_leaves_what_a_run_goes_on_from(recipe, undisturbed, tmp_path, place, call):
    work = tmp_path / "work"
    child = os.fork()
    if child == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                killed_in(patch, place, call, lambda: os.kill(os.getpid(), signal.SIGKILL))
                trained(recipe(**CHANGES), work)
        finally:
            os._exit(1)  # only if it was not killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert newest(work / "stage-0") is not None
    found = trained(recipe(**CHANGES), work, resume=True)
    assert same(undisturbed[0], found) and [line["loss"] for line in lines(work)] == undisturbed[1]
