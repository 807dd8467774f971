"""The first commands of a user import no more than they need: each in a process of its own, by what it imported."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.conversion.gguf_kit import tiny, write_gguf
from tests.tables import some

if TYPE_CHECKING:
    from pathlib import Path

MODELING = {
    "linearize.calibration", "linearize.conversion.streaming", "linearize.model.modeling", "linearize.training",
    "transformers.modeling_utils", "transformers.generation.utils", "transformers.models.llama.modeling_llama",
}  # fmt: skip
"""Modules that build models or load weights."""

SLOW = {
    "accelerate", "datasets", "lm_eval", "scipy.optimize", "sympy", "torch._dynamo", "torch._inductor",
    "torch.distributed.fsdp", "torch.distributed.tensor", "transformers.activations", "triton",
}  # fmt: skip
"""Modules that take from a tenth of a second to two seconds; neither torch nor a configuration needs them."""

PROGRAM = """
import sys
from linearize.cli.app import run

status = run(sys.argv[2:])
found = sorted(set(sys.argv[1].split()) & set(sys.modules))
sys.exit(f"{found} are imported" if found else status)
"""


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny("llama"))


def imports_none_of(modules: set[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, " ".join(modules), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "are imported" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("more", some([(), ("--json",), ("--recurrence", "all"), ("-r", "window-gla")], [()]))
def test_inspecting_a_gguf_file_imports_no_modeling(gguf: Path, more: tuple[str, ...]) -> None:
    done = imports_none_of(MODELING | SLOW, "inspect", gguf, *more)
    assert done.returncode == 0 and "llama" in done.stdout, done.stderr


@pytest.mark.check
def test_inspecting_a_folder_imports_no_modeling(tiny_folder: Path, converted: Path) -> None:
    assert imports_none_of(MODELING | SLOW, "inspect", tiny_folder).returncode == 0
    done = imports_none_of(MODELING | SLOW, "inspect", converted)
    assert done.returncode == 0 and "(converted)" in done.stdout, done.stderr


@pytest.mark.parametrize("recipe", some(["default", "window-gla", "train"], ["default"]))
def test_a_dry_run_of_a_gguf_file_imports_no_modeling(gguf: Path, tmp_path: Path, recipe: str) -> None:
    small = ("--set", "mixer.window=8", "--set", "mixer.landmarks=32")
    done = imports_none_of(MODELING | SLOW, "convert", gguf, "-o", tmp_path / "out", "-r", recipe, *small, "--dry-run")
    assert done.returncode == 0 and "would convert" in done.stdout, done.stderr


def test_help_imports_neither_yaml_nor_the_tasks() -> None:
    heavy = {
        "torch",
        "transformers",
        "numpy",
        "yaml",
        "pydantic",
        "importlib.resources",
        "linearize.evaluation.tasks.suites",
    }
    assert imports_none_of(heavy, "--help").returncode == 0


REGISTERED = """
config = sys.argv[1]
from transformers import AutoConfig
assert AutoConfig.from_pretrained(config).model_type == "linearized"
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(config)).__name__)
"""


ORDERS = [
    "import linearize; from transformers import LlamaConfig; assert 'linearize.model.modeling' not in sys.modules",
    "import linearize, transformers.models.auto.modeling_auto as auto; auto.AutoModelForCausalLM",
    "from transformers import AutoModelForCausalLM; import linearize",
    "import transformers.models.auto.modeling_auto; import linearize",
    "import linearize.model.modeling",
    "from linearize.model import LinearizedForCausalLM",
]


@pytest.mark.parametrize("first", some(ORDERS, ORDERS[:1]))
def test_converted_checkpoints_are_registered_in_whichever_order_modules_are_imported(
    first: str, converted: Path
) -> None:
    program = f"import sys\n{first}{REGISTERED}"
    done = subprocess.run([sys.executable, "-c", program, str(converted)], capture_output=True, text=True)
    assert done.stdout == "LinearizedLlamaForCausalLM\n", done.stderr


@pytest.mark.check
def test_a_name_of_an_activation_function_is_still_validated() -> None:
    program = """
import sys
from linearize.sources.validators import import_validators

import_validators()
from transformers.utils import type_validators

assert "transformers.activations" not in sys.modules
assert "silu" in type_validators.ACT2FN and "misspelt" not in type_validators.ACT2FN
from transformers.activations import ACT2FN

assert list(type_validators.ACT2FN) == list(ACT2FN) and len(type_validators.ACT2FN) == len(ACT2FN)
assert type(type_validators.ACT2FN["silu"]) is type(ACT2FN["silu"])
import_validators()
assert sys.modules["transformers.activations"].ACT2FN is ACT2FN
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    "command",
    some([("convert", "-o", "out"), ("chat",), ("verify",), ("serve",), ("inspect",)], [("convert", "-o", "out")]),
)
def test_a_wrong_path_is_told_before_torch_is_imported(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = imports_none_of({"torch", "transformers"}, command[0], tmp_path / "nothing", *command[1:])
    assert done.returncode == 1 and "no such folder or file" in done.stderr
