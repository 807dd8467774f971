"""The runner and its store: what is scored, what is kept, and what an interruption costs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from linearize.conversion.swap import convert_model
from linearize.errors import DataError, ModelError, OutputError
from linearize.evaluation import runner
from linearize.evaluation.baselines import silence
from linearize.evaluation.progress import ProgressLine, duration
from linearize.evaluation.runner import StampedLoader, run, subset
from linearize.evaluation.store import Store, model_key
from linearize.evaluation.tasks.task import Item, Task
from linearize.recipe import MixerSpec

from . import tiny_model_folder


class Count(Task):
    """Item i's result is i plus the model's first weight; notes what it was asked."""

    suite, metric = "test", "loss"
    higher_is_better = False

    def __init__(self, name: str = "count", items: int = 100, stops_at: int | None = None) -> None:
        self.name, self.items, self.stops_at = name, items, stops_at
        self.digest = f"{name} {items}"
        self.asked: list[int] = []
        self.wrong: dict[int, Item] = {}

    def __len__(self) -> int:
        return self.items

    def tags(self, index: int) -> Mapping[str, Any]:
        return {"half": index >= self.items / 2}

    def score(self, model: Any, tokenizer: Any, indices: Sequence[int], batch_size: int) -> list[Item]:
        assert not model.training
        assert torch.is_inference_mode_enabled()
        if self.stops_at in indices:
            raise KeyboardInterrupt
        self.asked += indices
        first = float(next(model.parameters()).flatten()[0])
        return [self.wrong.get(index, Item(index + first, (float(index),))) for index in indices]


def model(weight: float = 0.5, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=32, **{**sizes, **options}))
    with torch.no_grad():
        next(made.parameters()).flatten()[0] = weight
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_scores_are_of_every_item_in_order(tokenizer: Any) -> None:
    told: list[tuple[str, str, int, int]] = []
    tasks = [Count(), Count("short", 3)]
    scores = run({"a": model, "b": lambda: model(1.0)}, tasks, tokenizer, progress=lambda *what: told.append(what))
    assert list(scores) == ["a", "b"]
    for name, first in (("a", 0.5), ("b", 1.0)):
        long, short = scores[name]
        assert long.items == [index + first for index in range(100)]
        assert long.value == pytest.approx(49.5 + first)
        assert (long.task, long.suite, long.metric, long.higher_is_better) == ("count", "test", "loss", False)
        assert (long.total, long.seed, short.n, short.total) == (100, None, 3, 3)
        assert long.tags[0] == {"half": False}
        assert long.curves[7] == (7.0,)
    assert told[:5] == [("a", "count", done, 100) for done in (0, 32, 64, 96, 100)]
    assert told[-1] == ("b", "short", 3, 3)


def test_a_limit_draws_the_same_items_for_every_system(tokenizer: Any) -> None:
    task = Count()
    scores = run({"a": model, "b": model}, [task], tokenizer, limit=10, seed=3)
    (a,), (b,) = scores["a"], scores["b"]
    drawn = [tag["item"] for tag in a.tags]
    assert drawn == sorted(set(drawn)) == subset(task, 10, 3)
    assert drawn != list(range(10))
    assert a.tags == b.tags
    assert (a.n, a.total, a.seed) == (10, 100, 3)
    assert a.items == [index + 0.5 for index in drawn]


def test_subsets_are_seeded_and_nested() -> None:
    task = Count()
    assert subset(task, 20, 0) == subset(task, 20, 0) != subset(task, 20, 1)
    assert set(subset(task, 20, 0)) < set(subset(task, 30, 0))
    assert subset(task, 20, 0) != subset(Count("other"), 20, 0)
    assert subset(task, 100, 0) == subset(task, 1000, 0) == subset(task, None, 5) == list(range(100))
    # No half of the task is left out.
    assert 5 < sum(index < 50 for index in subset(task, 20, 0)) < 15


def test_an_interrupted_run_goes_on_where_it_stopped(tokenizer: Any, store: Store) -> None:
    first = Count(stops_at=70)
    with pytest.raises(KeyboardInterrupt):
        run({"a": model}, [first], tokenizer, store=store)
    assert first.asked == list(range(64))
    second = Count()
    (score,) = run({"a": model}, [second], tokenizer, store=store)["a"]
    assert second.asked == list(range(64, 100))
    (whole,) = run({"a": model}, [Count()], tokenizer)["a"]
    assert score == whole
    third = Count()
    assert run({"a": model}, [third], tokenizer, store=store)["a"] == [whole]
    assert third.asked == []


def test_a_larger_limit_scores_only_what_is_new(tokenizer: Any, store: Store) -> None:
    small, large = Count(), Count()
    run({"a": model}, [small], tokenizer, limit=10, store=store)
    run({"a": model}, [large], tokenizer, limit=30, store=store)
    assert not set(small.asked) & set(large.asked)
    assert sorted(small.asked + large.asked) == subset(large, 30, 0)


def test_what_counts_as_another_model_or_task(tokenizer: Any, store: Store) -> None:
    run({"a": model}, [Count()], tokenizer, store=store)

    def asked(load: Any, task: Count | None = None, words: Any = None) -> int:
        task = task or Count()
        run({"a": load}, [task], words or tokenizer, store=store)
        return len(task.asked)

    changed = AutoTokenizer.from_pretrained(tiny_model_folder())
    changed.add_tokens(["<another>"])
    assert asked(model) == 0
    assert asked(lambda: model(0.25)) == 100
    assert asked(lambda: model().to(torch.bfloat16)) == 100
    assert asked(lambda: model(rms_norm_eps=1e-4)) == 100
    assert asked(model, Count(items=99)) == 99
    assert asked(model, words=changed) == 100
    assert asked(model) == 0


def test_a_padded_call_does_not_change_the_tokenizer(tokenizer: Any) -> None:
    copied = AutoTokenizer.from_pretrained(tiny_model_folder())
    copied.pad_token = copied.eos_token
    before = model_key(model(), copied)
    copied(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert model_key(model(), copied) == before


def test_other_settings_of_generation_are_another_model(tokenizer: Any) -> None:
    changed = model()
    changed.generation_config.repetition_penalty = 1.5  # it applies to what lm-eval's tasks write
    assert model_key(changed, tokenizer) != model_key(model(), tokenizer)


def test_a_branch_that_is_off_is_another_model(tokenizer: Any) -> None:
    converted = convert_model(model(), MixerSpec(window=8))
    keys = {model_key(silence(converted, off), tokenizer) for off in ((), ("window",), ("recurrence",))}
    assert len(keys | {model_key(model(), tokenizer)}) == 4


def test_a_stamped_model_is_not_loaded_where_all_is_kept(tokenizer: Any, store: Store) -> None:
    loads: list[str] = []

    def loader(stamp: str) -> StampedLoader:
        return StampedLoader(lambda: loads.append(stamp) or model(), stamp)  # type: ignore[func-returns-value]

    (first,) = run({"a": loader("x")}, [Count()], tokenizer, store=store)["a"]
    assert run({"a": loader("x")}, [Count()], tokenizer, store=store)["a"] == [first]
    assert loads == ["x"]
    run({"a": loader("x")}, [Count(), Count("new", 3)], tokenizer, store=store)
    run({"a": loader("y")}, [Count()], tokenizer, store=store)  # the same weights in other files
    assert loads == ["x", "x", "y"]


def test_fresh_reads_nothing_and_keeps_the_new(tokenizer: Any, store: Store) -> None:
    run({"a": model}, [Count()], tokenizer, store=store)
    again = Count()
    again.wrong[5] = Item(-1.0)
    run({"a": model}, [again], tokenizer, store=Store(store.folder, fresh=True))
    assert len(again.asked) == 100
    (score,) = run({"a": model}, [Count()], tokenizer, store=store)["a"]
    assert score.items[5] == -1.0


def test_torn_and_foreign_lines_are_not_read(store: Store) -> None:
    store.write("m", "t", {0: Item(1.0), 1: Item(2.0, (1.0, 2.0))})
    (file,) = store.folder.rglob("*.jsonl")
    with file.open("a", encoding="utf-8") as lines:
        lines.write('[]\n{"item": 4}\n{"item": 7, "value": "high"}\n{"item": 2, "val')
    assert store.read("m", "t") == {0: Item(1.0), 1: Item(2.0, (1.0, 2.0))}
    store.write("m", "t", {3: Item(4.0)})
    assert set(store.read("m", "t")) == {0, 1, 3}
    assert store.read("m", "other") == store.read("other", "t") == {}


def test_two_stores_share_a_folder(store: Store) -> None:
    other = Store(store.folder)
    store.write("m", "t", {0: Item(1.0)})
    other.write("m", "t", {1: Item(2.0)})
    store.write("m", "t", {0: Item(1.5)})
    assert other.read("m", "t") == {0: Item(1.5), 1: Item(2.0)}
    text = next(store.folder.rglob("*.jsonl")).read_text(encoding="utf-8")
    assert [json.loads(line)["item"] for line in text.splitlines() if line] == [0, 1, 0]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be kept there") as caught:
        Store(tmp_path / "file").write("m", "t", {0: Item(1.0)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [Item(float("nan")), Item(float("inf")), Item(1.0, (0.0, float("nan")))])
def test_a_result_that_is_not_finite(wrong: Item, tokenizer: Any, store: Store) -> None:
    task = Count()
    task.wrong[40] = wrong
    with pytest.raises(ModelError, match="a: the result on item 41 of count is not finite"):
        run({"a": model}, [task], tokenizer, store=store)
    (score,) = run({"a": model}, [Count()], tokenizer, store=store)["a"]  # the chunk was not kept
    assert score.items[40] == 40.5


@pytest.mark.check
def test_too_little_memory_halves_the_batch(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    fits = [2]
    score = Count.score

    def limited(self: Any, model: Any, tokenizer: Any, indices: Any, batch_size: int) -> Any:
        sizes.append(batch_size)
        if batch_size > fits[0]:
            raise torch.OutOfMemoryError("much text\nin lines")
        return score(self, model, tokenizer, indices, batch_size)

    plenty = run({"a": model}, [Count()], tokenizer)["a"][0]
    monkeypatch.setattr(Count, "score", limited)
    found = run({"a": model}, [Count()], tokenizer, batch_size=8)["a"][0]
    assert found == plenty and sizes[:3] == [8, 4, 2] and set(sizes[2:]) == {2}
    fits[0] = 0
    with pytest.raises(ModelError, match="a: out of memory on count with one sequence at a time"):
        run({"a": model}, [Count()], tokenizer, batch_size=4)


def test_wrong_calls(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="limit is 0"):
        run({"a": model}, [Count()], tokenizer, limit=0)
    with pytest.raises(DataError, match="each once"):
        run({"a": model}, [Count(), Count()], tokenizer)


def test_the_model_is_put_back_into_its_mode(tokenizer: Any) -> None:
    trained = model().train()
    run({"a": lambda: trained}, [Count()], tokenizer)
    assert trained.training


def test_slow_chunks_get_smaller(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CHUNK_SECONDS", -1.0)
    told: list[int] = []
    run({"a": model}, [Count()], tokenizer, progress=lambda *what: told.append(what[2]))
    assert told[:7] == [0, 32, 48, 56, 60, 62, 63]
    assert told[-1] == 100


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_sparse_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("linearize.evaluation.progress.time.monotonic", lambda: now[0])
    terminal, pipe = _Terminal(), io.StringIO()
    lines = ProgressLine(terminal), ProgressLine(pipe)
    for done in (20, *range(40, 401, 20)):  # the first 20 came from the store
        for line in lines:
            line("teacher", "piqa", done, 400)
        now[0] += 10.0
    assert "teacher piqa: 60 of 400 items, 2.0 a second, 2 min 50 s left" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")
    assert pipe.getvalue().count("\n") == 3
    assert pipe.getvalue().startswith("teacher piqa: 140 of 400 items, 2.0 a second, 2 min 10 s left\n")


def test_durations() -> None:
    assert [duration(x) for x in (0.4, 59, 61, 3600 * 3 + 120)] == ["0 s", "59 s", "1 min 1 s", "3 h 2 min"]
