"""An environment that has torch and transformers with what they require, and nothing else."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOTS = ("torch", "transformers")


def clean_site(folder: Path) -> Path:
    """A site folder of links to the installed files of `ROOTS` and their requirements."""
    folder.mkdir()
    for name in _closure(ROOTS):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = Path(str(found.locate_file(top)))
            if target.exists() and not (folder / top).exists():
                (folder / top).symlink_to(target)
    return folder


def _closure(names: tuple[str, ...]) -> set[str]:
    waiting, found = list(names), set[str]()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            requirements = map(Requirement, distribution(name).requires or ())
        except PackageNotFoundError:  # not needed here
            continue
        found.add(name)
        waiting += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


LOAD = """
import torch
from importlib.util import find_spec
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(map(find_spec, ("linearize", "linearize_kernels", "peft", "accelerate", "datasets", "triton", "fla")))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)("Once upon a time").input_ids
ids = torch.arange(5, 105)[None]
print(float(model(ids).logits.double().sum()))
print(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 100:].tolist())
"""
"""Loads a checkpoint where linearize is not installed, and prints the sum of its logits, and what it writes."""


def says(model: Any) -> dict[str, Any]:
    """The logits of a text in one forward and token by token, and what is written after it."""
    import torch

    ids, cache, steps = torch.arange(5, 105)[None], None, []
    with torch.no_grad():
        for token in ids.split(1, 1):
            out = model(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[:, 100:]
        return {"whole": model(ids).logits, "steps": torch.cat(steps, 1), "written": written}


SAYS_ALONE = f"""
from importlib.util import find_spec
from typing import Any
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
{inspect.getsource(says)}
assert not any(map(find_spec, ("linearize", "linearize_kernels")))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
save_file(says(model), sys.argv[2])
print(sum(type(module).__name__ == "QuantizedLinear" for module in model.modules()))
"""
"""Calls it where linearize is not installed, writes what it gives, and prints how many layers are of integers."""


def run_python(home: Path, program: str, *arguments: object, site: Path | None = None, **environment: str) -> str:
    """Runs a program in a new process with an empty home, and gives its stdout.

    Args:
        site: instead of all installed packages, and with neither the working directory nor any other folder in sight.
    """
    alone = ("-I", "-S") if site else ()
    start = "import sys\n" + (f"sys.path.append({str(site)!r})\n" if site else "")
    plain = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *alone, "-c", start + program, *map(str, arguments)],
        capture_output=True, text=True, env={**plain, **environment}, cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
