"""Task scores against lm-eval run on its own stock definitions."""

from __future__ import annotations

import logging
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from linearize.errors import ModelError
from linearize.evaluation.runner import run
from linearize.evaluation.tasks.loading import lm_eval_tasks
from linearize.evaluation.tasks.task import Item, TaskScore
from linearize.evaluation.tasks.tasks import available_tasks, task_definitions

from . import data_folder, tiny_model_folder
from .test_tasks import STOCK, items_of


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def wikitext_pages(folder: Path) -> Path:
    """The pages as JSON lines, cut with a regular expression: independent of the code under test."""
    import json

    text = (data_folder() / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    starts = [match.start() for match in re.finditer(r"^ = [^=\n]+ = $", text, flags=re.MULTILINE)]
    pages = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text) + 1], strict=True)]
    path = folder / "pages.jsonl"
    # The line break before the next title separates pages and belongs to neither.
    lines = [json.dumps({"page": page[:-1] if number < len(pages) - 1 else page}) for number, page in enumerate(pages)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def stock_results(model: Any, name: str, indices: list[int], folder: Path) -> dict[str, Any]:
    """What lm-eval's stock task gives on a model, with only its data set pointed at a local file."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / STOCK[name])
    split = config.get("test_split") or config["validation_split"]
    file = wikitext_pages(folder) if name == "wikitext2" else data_folder() / task_definitions()[name].local.path
    for key in ("tag", "dataset_name", "training_split"):
        config.pop(key, None)
    if config.get("test_split"):
        config.pop("validation_split", None)
    if name == "hellaswag":  # its file holds processed documents, under the name that lm-eval gives the answer
        config.pop("process_docs")
        config["doc_to_target"] = "{{gold}}"
    config["dataset_path"] = "json"
    config["dataset_kwargs"] = {"data_files": {split: str(file)}, "cache_dir": str(folder / "cache")}
    config["num_fewshot"] = 0
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(1234)
    results: dict[str, Any] = evaluate(lm=model, task_dict={name: task}, samples={name: indices}, bootstrap_iters=0)
    return results


def assert_equal_to_stock(
    reference: Any, model: Any, tokenizer: Any, names: list[str], indices: list[int], folder: Path
) -> None:
    for plain, shared in zip(
        lm_eval_tasks(names, data_folder(), plain=True), lm_eval_tasks(names, data_folder()), strict=True
    ):
        stock = stock_results(reference, plain.name, indices, folder)
        samples = stock["samples"][plain.name]
        items = [sample[plain.metric] for sample in samples]
        with torch.inference_mode():
            for ours, theirs in zip(plain.answers(model, tokenizer, indices, 8), samples, strict=True):
                # The very prompts and continuations, and the model's log-likelihoods of them.
                assert ours.arguments == theirs["arguments"], plain.name
                assert ours.responses == theirs["filtered_resps"], plain.name
            for task in (plain, shared):
                found = task.score(model, tokenizer, indices, 8)
                expected = [item[0] if isinstance(item, tuple) else item for item in items]
                # Of a page shared reading sums the log-probabilities piece by piece.
                assert [item.value for item in found] == pytest.approx(expected, rel=1e-6), task.name
                (measure,) = task.measures(indices, found)
                value = stock["results"][plain.name][f"{plain.metric},none"]
                assert measure.value == pytest.approx(value, rel=1e-6), plain.name


def test_items_equal_those_of_lm_eval(tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load(tiny_model_folder())
    reference = HFLM(pretrained=str(tiny_model_folder()), device="cpu", batch_size=8)
    names = ["piqa", "winogrande", "arc_challenge"]
    last = min(items_of(name, data_folder()) for name in names) - 1
    assert_equal_to_stock(reference, model.eval(), tokenizer, names, [*range(20), last // 2, last], tmp_path)


@pytest.mark.slow
@pytest.mark.public
def test_items_equal_those_of_lm_eval_on_every_task(smollm2_path: Path, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load(smollm2_path)
    # The same float32 sums as ours: with bfloat16 weights lm-eval's own would be rounded.
    reference = HFLM(pretrained=str(smollm2_path), device="cpu", batch_size=8, softmax_dtype="float32")
    core = sorted(available_tasks("core").keys() - {"wikitext2"})
    # A page of WikiText is as long as a hundred questions.
    for names, count in ((core, 200), (["wikitext2"], 5)):
        assert_equal_to_stock(reference, model.eval(), tokenizer, names, list(range(count)), tmp_path)


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: list[str], limit: int, **options: Any
) -> list[TaskScore]:
    return run({"it": lambda: model}, lm_eval_tasks(names, data_folder(), **options), tokenizer, limit=limit)["it"]


@pytest.fixture(scope="module")
def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load(tiny_model_folder())


def test_scores_describe_themselves(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    names = ["hellaswag", "lambada", "wikitext2"]
    hellaswag, lambada, wikitext2 = run_tasks(*tiny, names, limit=4)
    assert (hellaswag.metric, hellaswag.higher_is_better, hellaswag.suite) == ("acc_norm", True, "core")
    assert (lambada.metric, lambada.n) == ("acc", 4)
    assert (wikitext2.metric, wikitext2.higher_is_better) == ("word_perplexity", False)
    mean = sum(hellaswag.items) / 4
    deviation = math.sqrt(sum((item - mean) ** 2 for item in hellaswag.items) / 3)
    assert hellaswag.value == mean
    assert hellaswag.stderr == pytest.approx(deviation / 2)
    (task,) = lm_eval_tasks(["wikitext2"], data_folder())
    places = [task._place(tag["item"]) for tag in wikitext2.tags]
    pages = [leaf.documents[at]["page"] for leaf, at in places]
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    assert words == sum(tag["weight"] for tag in wikitext2.tags)
    assert wikitext2.value == pytest.approx(math.exp(-sum(wikitext2.items) / words))


def test_perplexity_error_agrees_with_the_bootstrap() -> None:
    draw = random.Random(0)  # noqa: S311
    words = [draw.randint(500, 8000) for _ in range(62)]
    nats = [-count * draw.gauss(3.0, 0.3) for count in words]
    (task,) = lm_eval_tasks(["wikitext2"], data_folder())
    items = [Item(sum_, metrics={"word_perplexity": [sum_, count]}) for sum_, count in zip(nats, words, strict=True)]
    places = [0] * 62
    (measure,) = task.measures(places, items)
    resampled = []
    for _ in range(2000):
        picked = draw.choices(range(62), k=62)
        resampled.append(math.exp(-sum(nats[i] for i in picked) / sum(words[i] for i in picked)))
    mean = sum(resampled) / 2000
    bootstrap = math.sqrt(sum((one - mean) ** 2 for one in resampled) / 1999)
    assert measure.value == pytest.approx(math.exp(-sum(nats) / sum(words)))
    assert measure.stderr == pytest.approx(bootstrap, rel=0.1)
    assert task.measures(places[:1], items[:1])[0].stderr is None


def test_leaves_everything_as_it_was(
    tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase], capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = tiny
    model.train()
    before = (tokenizer.pad_token, random.getstate(), torch.get_rng_state(), logging.getLogger("lm_eval").level)
    (score,) = run_tasks(model, tokenizer, ["arc_easy"], limit=1)
    assert model.training
    assert tokenizer.pad_token == before[0]
    assert random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert logging.getLogger("lm_eval").level == before[3]
    assert (score.n, score.stderr, score.seed) == (1, None, 0) and score.total == items_of("arc_easy", data_folder())
    assert capfd.readouterr() == ("", "")


def test_shorter_context_costs_perplexity(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    (short,) = run_tasks(*tiny, ["wikitext2"], limit=1, max_length=8)
    (long,) = run_tasks(*tiny, ["wikitext2"], limit=1)
    assert short.value != long.value


def test_a_model_that_gives_nan() -> None:
    model, tokenizer = load(tiny_model_folder())
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    (task,) = lm_eval_tasks(["piqa"], data_folder())
    for indices, told in (([0], "item 1 of piqa"), ([7], "item 8 of piqa")):
        with pytest.raises(ModelError, match=f"{told} are not finite"):
            task.score(model, tokenizer, indices, 2)


def test_a_digest_tells_tasks_apart() -> None:
    def digest(name: str, **options: Any) -> str:
        return lm_eval_tasks([name], data_folder(), **options)[0].digest

    assert digest("piqa") == digest("piqa") == digest("piqa", plain=True)
    assert len({digest("piqa"), digest("arc_easy"), digest("piqa", max_length=64)}) == 3


def test_a_digest_is_of_the_documents(tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    digests = set()
    for answer in (0, 1):
        (tmp_path / "piqa" / "piqa.validation.jsonl").write_text(
            f'{{"goal": "boil an egg", "sol1": "in water", "sol2": "in sand", "label": {answer}}}\n', encoding="utf-8"
        )
        digests.add(lm_eval_tasks(["piqa"], tmp_path)[0].digest)
    assert len(digests) == 2
