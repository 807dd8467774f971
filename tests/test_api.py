"""The Python API: what is public, that it stays so, and that it is cheap to import."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import linearize
from linearize.cli.app import COMMANDS

PUBLIC = {
    "convert": ["model", "output", "recipe", "overrides", "overwrite", "trust_remote_code", "say"],
    "evaluate": [
        "model", "suites", "tasks", "baselines", "teacher", "limit", "seed", "lengths", "samples", "data",
        "include_path", "num_fewshot", "apply_chat_template", "system_instruction", "confirm_run_unsafe_code", "report",
        "fresh", "batch_size", "dtype", "trust_remote_code", "progress", "say", "command",
    ],
    "export": [
        "folder", "output", "name", "base", "licence", "report", "dtype", "weights", "outliers", "text", "tokens",
        "shard_size", "overwrite", "say",
    ],
    "finetune": [
        "recipe", "output", "model", "teacher", "overrides", "resume", "overwrite", "shard", "trust_remote_code", "say",
    ],
    "generate": [
        "model", "prompt", "tokenizer", "state", "chat", "system", "max_new_tokens", "temperature", "top_k", "top_p",
        "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "seed", "dtype",
        "trust_remote_code", "write",
    ],
    "push": ["repo", "folder", "public", "force", "message", "steps", "confirm", "tick", "say"],
    "verify": ["model", "tokens", "steps", "dtype", "trust_remote_code", "tick"],
}  # fmt: skip
"""Functions and their parameters, in order. What is here was promised: names may be added, none taken away."""


def test_what_is_public_is_listed():
    assert set(linearize.__all__) == {*PUBLIC, "LinearizeError", "State", "__version__"}
    assert set(linearize.__all__) <= set(dir(linearize))
    for name in linearize.__all__:
        assert getattr(linearize, name) is not None
    with pytest.raises(AttributeError, match="module 'linearize' has no attribute 'converts'"):
        _ = linearize.converts
    names = {{"evaluate": "eval"}.get(name, name) for name in PUBLIC}
    assert names <= COMMANDS.keys()  # named as the commands are


@pytest.mark.parametrize("name", PUBLIC)
def test_functions_are_typed_and_documented(name):
    function = getattr(linearize, name)
    signature = inspect.signature(function)
    assert list(signature.parameters) == PUBLIC[name]
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())
    assert signature.return_annotation not in (inspect.Signature.empty, "None")
    described = function.__doc__.partition("Args:")[2].partition("Raises:")[0]
    assert [one for one in PUBLIC[name] if not re.search(rf"^ +{one}: ", described, re.MULTILINE)] == []
    assert "Raises:" in function.__doc__


def test_the_page_lists_the_same():
    page = (Path(__file__).resolve().parents[1] / "docs" / "python.md").read_text()
    assert set(re.findall(r"^\| `(\w+)", page, re.MULTILINE)) == {*PUBLIC, "State", "LinearizeError"}


def test_importing_is_cheap():
    program = (
        "import sys, linearize; linearize.LinearizeError, dir(linearize);"
        "print(sorted({'torch', 'transformers', 'numpy', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
