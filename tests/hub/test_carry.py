"""The code that a checkpoint carries: one file for the model, one for each optional package that kernels need."""

from __future__ import annotations

import builtins
import os
import pickle
import re
import shutil
import subprocess
import symtable
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports

from linearize.checkpoint import carry
from linearize.jobs.convert import convert_into as convert
from linearize.recipe import load_recipe
from linearize.sources.source import find_source

_MODULE_NAMES = {"__name__", "__file__", "__doc__"}
_KERNEL = """
import sys, torch
sys.modules.update(dict.fromkeys(("linearize", "linearize_kernels")))  # importing either raises ModuleNotFoundError
from carried import modeling_linearized as m

torch.manual_seed(0)
q, k, v = (torch.randn(20, 2, 16) for _ in range(3))
gate, options = -torch.rand(20, 2, 1), m.LigerOptions(window=8, scale=0.25, mix="fixed")
ours, plain = (run(q, k, v, q, k, gate, options)[0] for run in (m.liger_attention, m.liger_attention_composed))
print(m.decide("attention", q.device, q.dtype).kernels, float((ours - plain).abs().max()))
"""


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return carry.carried_files()


def test_a_file_for_the_model_and_one_for_each_set_of_kernels(files):
    assert sorted(files) == [
        "linearize_kernels_fla_ops.py",
        "linearize_kernels_landmark_merge_kernel.py",
        "linearize_kernels_landmark_pool_triton.py",
        "linearize_kernels_landmark_text_triton.py",
        "linearize_kernels_landmark_triton.py",
        "linearize_kernels_liger_autograd.py",
        "linearize_kernels_step_kernel.py",
        "linearize_kernels_step_triton.py",
        "modeling_linearized.py",
    ]
    assert {value.split(".")[0] for value in carry.AUTO_MAP.values()} == {"modeling_linearized"}
    assert all(source.startswith("# SPDX-License-Identifier: Apache-2.0\n") for source in files.values())


def test_the_files_import_only_each_other_torch_and_transformers(files, tmp_path):
    """And packages whose absence they handle: transformers refuses files that import anything else."""
    for name, source in files.items():
        (tmp_path / name).write_text(source, encoding="utf-8")
        needed = set(get_imports(tmp_path / name))
        assert needed <= {"torch", "transformers", *sys.stdlib_module_names}, (name, needed)


def test_every_name_is_defined(files):
    for file, source in files.items():
        top = symtable.symtable(source, file, "exec")
        defined = {name.get_name() for name in top.get_symbols() if name.is_assigned() or name.is_imported()}
        defined |= {name.get_name() for name in top.get_symbols() if name.is_namespace()}
        missing = _globals(top) - defined - set(dir(builtins)) - _MODULE_NAMES
        assert not missing, (file, missing)
        for name in carry.AUTO_MAP.values() if file == "modeling_linearized.py" else ():
            assert name.split(".")[1] in defined


def _globals(table: symtable.SymbolTable) -> set[str]:
    """The names that a scope and those within it look for at the top of their file."""
    outermost = table.get_type() == "module"
    own = {name.get_name() for name in table.get_symbols() if name.is_global() or (outermost and name.is_referenced())}
    return own.union(*(_globals(child) for child in table.get_children()))


def _carry(monkeypatch, sources: dict[str, str]) -> dict[str, str]:
    monkeypatch.setattr(carry, "_source", sources.__getitem__)
    carry._imports.cache_clear()
    try:
        return carry.carried_files()
    finally:
        carry._imports.cache_clear()


def test_follows_imports_of_every_kind(monkeypatch, tmp_path):
    files = _carry(
        monkeypatch,
        {
            "linearize.model.modeling": '''"""The model."""
import math
from typing import TYPE_CHECKING
from linearize.model.mixer import (
    WIDTH,
    size as size_of,
)
if TYPE_CHECKING:
    from collections.abc import Sequence
    from linearize.model.nowhere import Nothing
__all__ = ["answer"]
def answer(of: Sequence[int]) -> float:
    from linearize.model.mixer import size as other
    from linearize.model.late import none
    from linearize_kernels.lazy import (
        double,
    )
    return math.sqrt(size_of()) + other() + double(WIDTH) + none()
''',
            "linearize.model.mixer": "from linearize.model.parts import WIDTH\ndef size():\n    return WIDTH\n",
            "linearize.model.parts": "WIDTH = 4\n",
            "linearize.model.late": "from linearize.model.modeling import answer\ndef none():\n    return 0\n",
            "linearize_kernels.lazy": """
try:
    import json
except ImportError as error:
    raise ImportError("no json") from error
from linearize.model.parts import WIDTH
from linearize_kernels.deep import twice
def double(x):
    return twice(x) + 0 * WIDTH
""",
            "linearize_kernels.deep": "size = 1\ndef twice(x):\n    return 2 * x\n",
        },
    )
    assert list(files) == ["modeling_linearized.py", "linearize_kernels_lazy.py"]
    assert "# The model.\n" in files["modeling_linearized.py"] and "__all__" not in files["modeling_linearized.py"]
    assert "Nothing" not in files["modeling_linearized.py"]
    package = tmp_path / "followed"
    package.mkdir()
    for name, source in files.items():
        (package / name).write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    from followed.modeling_linearized import answer

    assert answer([]) == 2 + 4 + 8


@pytest.mark.parametrize(
    ("model", "other", "said"),
    [
        ("_SIZE = 2", "_SIZE = 1", "_SIZE is bound by 'linearize.other' and by 'linearize.model.modeling'"),
        ("from math import log", "def log(): ...", "log is bound by 'linearize.other' and by 'from math import log'"),
        ("", "sum = 3", "sum, of 'linearize.other', is a builtin"),
        ("from linearize import other", "", "linearize.model.modeling: imports the module other"),
        ("import linearize.other", "", "`import linearize.other` cannot be carried"),
        ("from . import other", "", "`from . import other` cannot be carried"),
    ],
)
def test_refuses_what_does_not_go_into_one_file(monkeypatch, model, other, said):
    sources = {
        "linearize": "",
        "linearize.other": f"A = 1\n{other}\n",
        "linearize.model.modeling": f"from linearize.other import A\n{model}\n",
    }
    with pytest.raises(ValueError, match=re.escape(said)):
        _carry(monkeypatch, sources)


@pytest.mark.check
def test_a_carried_kernel_runs(files, tmp_path):
    """In Triton's interpreter: Triton reads a kernel's source from its file."""
    pytest.importorskip("triton")
    (tmp_path / "carried").mkdir()
    for name, source in files.items():
        (tmp_path / "carried" / name).write_text(source, encoding="utf-8")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "LINEARIZE_KERNELS": "triton"}
    done = subprocess.run(
        [sys.executable, "-c", _KERNEL], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kernels, difference = done.stdout.split()
    assert kernels == "triton" and float(difference) < 1e-5


def test_two_versions_in_one_process_share_nothing(tiny_folder, tmp_path, monkeypatch):
    """And `save_pretrained` writes the carried code along, so that the copy loads again."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    convert(find_source(str(tiny_folder)), load_recipe("window-gla", ["mixer.window=16"]), old)
    _foreign(old)
    shutil.copytree(old, new)
    source = (new / "modeling_linearized.py").read_text()
    (new / "modeling_linearized.py").write_text(f"{source}\nVERSION = 'new'\n")
    first, second = (AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for folder in (old, new))
    modules = [sys.modules[type(model).__module__] for model in (first, second)]
    assert all(module.__name__.startswith("transformers_modules.") for module in modules)
    assert [hasattr(module, "VERSION") for module in modules] == [False, True]
    assert type(first) is not type(second) and type(first.config) is not type(second.config)
    assert type(first.config) is modules[0].LinearizedConfig
    ids = torch.arange(5, 105)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)
    second.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == carry.carried_files().keys()
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(third(ids).logits, second(ids).logits)
    assert type(pickle.loads(pickle.dumps(third))) is type(third)  # noqa: S301


def _foreign(folder):
    """Gives a checkpoint a `model_type` of its own: transformers prefers classes that are registered for theirs."""
    for name in ("config.json", "modeling_linearized.py"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"linearized"', '"linearized_foreign"'))
