"""The code that a converted checkpoint carries, so that it loads with `trust_remote_code=True` where linearize is not
installed.

transformers copies only Python files that lie beside each other and import each other as `from .name import ...`.
So the modules that the model is made of are laid side by side, and their imports of one another are rewritten.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

# The two names that `config.json` points transformers to.
_ENTRIES = {
    "linearize.model.configuration": "configuration_linearized",
    "linearize.model.modeling": "modeling_linearized",
}
AUTO_MAP = {
    "AutoConfig": "configuration_linearized.LinearizedConfig",
    "AutoModelForCausalLM": "modeling_linearized.LinearizedForCausalLM",
}
_OUR_IMPORT = re.compile(r"^([ \t]*)from (linearize(?:_kernels)?(?:\.\w+)*) import ", re.MULTILINE)


def carried_files() -> dict[str, str]:
    """File name -> source of every module that the model needs, found by following imports from its two entries."""
    waiting, files = list(_ENTRIES), dict[str, str]()
    while waiting:
        module = waiting.pop()
        name = f"{_flat(module)}.py"
        if name in files:
            continue
        source = _source(module)
        waiting += [module for _, module in _OUR_IMPORT.findall(source)]
        files[name] = _OUR_IMPORT.sub(lambda match: f"{match[1]}from .{_flat(match[2])} import ", source)
    return files


def _flat(module: str) -> str:
    return _ENTRIES.get(module, module.replace(".", "_"))


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the source of {module} is not at hand to be carried in a checkpoint")
    return Path(spec.origin).read_text(encoding="utf-8")
