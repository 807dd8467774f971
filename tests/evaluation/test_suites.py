"""Suites by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from linearize.errors import DataError
from linearize.evaluation.tasks.suites import SUITES, SuiteOptions, build_suites, choose_tasks
from linearize.evaluation.tasks.tasks import available_tasks

from . import data_folder, tiny_model_folder


def test_names_of_all_suites_are_different() -> None:
    names = [name for suite in SUITES.values() for name in (*suite().names, *suite().more)]
    assert len(set(names)) == len(names)


def test_whole_suites_and_single_tasks() -> None:
    assert choose_tasks([], ["core"]) == {"core": list(available_tasks("core"))}
    assert choose_tasks(["passkey", "piqa", "passkey"]) == {"recall": ["passkey"], "core": ["piqa"]}
    assert choose_tasks(["piqa", "passkey_twice"], ["mmlu", "core"]) == {
        "mmlu": ["mmlu"],
        "core": list(available_tasks("core")),
        "recall": ["passkey_twice"],
    }
    assert choose_tasks([]) == {}


@pytest.mark.parametrize(
    ("tasks", "suites", "told"),
    [
        (["piqqa"], [], "no task called 'piqqa': did you mean piqa"),
        (["gsmk8"], [], "no task called 'gsmk8': did you mean gsm8k"),
        (["qqqqqq"], [], "no task called 'qqqqqq': `linearize eval --list` has their names"),
        (["passkee"], [], "did you mean passkey"),
        (["heldout"], [], "did you mean held_out"),
        ([], ["recal"], "no suite called 'recal': did you mean recall"),
        ([], ["zzz"], "choose from core, mmlu, recall"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(tasks: list[str], suites: list[str], told: str) -> None:
    with pytest.raises(DataError, match=told):
        choose_tasks(tasks, suites)


def test_options_reach_the_tasks() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder())
    options = SuiteOptions(data=data_folder(), lengths=(192, 256), samples=2)
    piqa, passkey, rise = build_suites(choose_tasks(["piqa", "passkey", "loss_rise"]), tokenizer, options)
    assert (piqa.suite, passkey.suite, rise.suite) == ("core", "recall", "length")
    assert {passkey.tags(index)["length"] for index in range(len(passkey))} == {192, 256}
    assert len(rise) == 2
    (other,) = build_suites({"recall": ["passkey"]}, tokenizer, SuiteOptions(lengths=(192, 256), samples=2, seed=1))
    assert other.digest != passkey.digest
    with pytest.raises(DataError, match="agreement: compared with the teacher; name it with --teacher"):
        build_suites({"generation": ["agreement"]}, tokenizer, options)


def test_looking_up_names_imports_no_lm_eval() -> None:
    code = (
        "import sys; from linearize.evaluation.tasks.suites import choose_tasks; choose_tasks(['piqa'], ['mmlu']);"
        "assert not {'torch', 'lm_eval', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
