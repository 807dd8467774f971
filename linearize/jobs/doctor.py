"""`linearize doctor`: versions, devices, kernels, the Hub, caches, and known incompatibilities.

Each part runs even if others fail, because the command is used when something is broken.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

OPTIONAL = ("triton", "flash-linear-attention", "numpy", "tokenizers", "huggingface-hub", "pyarrow")
"""Reported in addition to the requirements of linearize."""

_HOPPER = (9, 0)


class Problem(NamedTuple):
    """An incompatibility or a failure, with a remedy."""

    severity: Literal["error", "warning"]
    what: str
    remedy: str


class _Pair(NamedTuple):
    """Versions that are known not to work together. It applies if all named packages are installed in these versions.

    Attributes:
        capability: the GPU's compute capability that is affected, or None for any machine.
        without: a package that must be missing.
    """

    packages: Mapping[str, str]
    what: str
    remedy: str
    capability: tuple[int, int] | None = None
    without: str | None = None


KNOWN_BAD: Sequence[_Pair] = (
    _Pair(
        {"flash-linear-attention": "", "triton": ">=3.4,<3.7.1"},
        "on Hopper the backward pass of its gated kernels fails with this triton",
        "pip install 'triton>=3.9'",
        capability=_HOPPER,
    ),
    _Pair(
        {"triton": "~=3.6.0", "numpy": ">=2.4"},
        "kernels fail in Triton's interpreter (TRITON_INTERPRET=1)",
        "pip install 'triton>=3.8'",
    ),
    _Pair(
        {"flash-linear-attention": ""},
        "it cannot be imported without triton, so recurrences run in plain torch",
        "pip install triton",
        without="triton",
    ),
)


def examine() -> dict[str, Any]:
    """All findings as plain data; `ok` is False if any of `problems` is an error."""
    versions, problems = installed()
    devices = _part(_devices, problems, "torch cannot list the devices")
    capabilities = [tuple(gpu["capability"]) for gpu in (devices or {}).get("gpus", [])]
    problems += bad_pairs(versions, capabilities)
    found = {
        "versions": versions,
        "platform": {
            "system": platform.platform(),
            "python": sys.executable,
            "cpus": os.cpu_count(),
        },
        "devices": devices,
        "kernels": _part(_kernels, problems, "the kernels cannot be chosen"),
        "hub": _part(_hub, problems, "the settings of the Hub cannot be read"),
        "caches": _part(_caches, problems, "the caches cannot be read"),
    }
    return {
        "ok": not any(problem.severity == "error" for problem in problems),
        **found,
        "problems": [problem._asdict() for problem in problems],
    }


def _part(look: Callable[[], Any], problems: list[Problem], failed: str) -> Any:
    try:
        return look()
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        problems.append(
            Problem(
                "error", f"{failed}: {type(error).__name__}: {reason}", "correct the setting or reinstall the package"
            )
        )
        return None


def installed() -> tuple[dict[str, str], list[Problem]]:
    """The versions of linearize's requirements, and problems: missing packages and unmet version requirements."""
    versions: dict[str, str] = {"python": platform.python_version()}
    problems = []
    needed = [one.name for one in _requirements("linearize")]
    for name in ("linearize", *needed, *OPTIONAL):
        found = _version(name)
        if found is not None:
            versions[name] = found
        elif name in needed:
            problems.append(Problem("error", f"{name} is not installed", f"pip install {name}"))
    for name in list(versions):
        for wanted in _requirements(name):
            has = _version(wanted.name)
            if has is not None and not wanted.specifier.contains(has, prereleases=True):
                text = f"{name} {versions[name]} requires {wanted.name}{wanted.specifier}, and {has} is installed"
                problems.append(Problem("error", text, f"pip install '{wanted.name}{wanted.specifier}'"))
    return versions, problems


def bad_pairs(
    versions: Mapping[str, str], capabilities: Sequence[tuple[int, ...]], known: Sequence[_Pair] = KNOWN_BAD
) -> list[Problem]:
    """The pairs of `known` that are installed, on a machine with these GPU capabilities."""
    found = []
    for pair in known:
        there = all(
            name in versions and SpecifierSet(wanted).contains(versions[name], prereleases=True)
            for name, wanted in pair.packages.items()
        )
        if there and pair.without not in versions and (pair.capability is None or pair.capability in capabilities):
            names = " with ".join(f"{name} {versions[name]}" for name in pair.packages)
            found.append(Problem("warning", f"{names}: {pair.what}", pair.remedy))
    return found


def _requirements(name: str) -> list[Requirement]:
    """The requirements of a package on this machine, without its extras."""
    found = []
    try:
        texts = requires(name) or []
    except PackageNotFoundError:
        return []
    for text in texts:
        try:
            one = Requirement(text)
        except InvalidRequirement:
            continue
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            found.append(one)
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    import torch

    from linearize.runtime.memory import free_bytes

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": [properties.major, properties.minor],
                "bytes": properties.total_memory,
                "free_bytes": free_bytes(torch.device("cuda", index)),
            }
        )
    return {
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "cpu_threads": torch.get_num_threads(),
        "free_bytes": free_bytes(torch.device("cpu")),
    }


def _kernels() -> dict[str, Any]:
    """For each device, the implementation of each operation in that device's usual dtype."""
    from typing import get_args

    import torch
    from linearize_kernels.dispatch import Operation, decide

    usual = {"cpu": torch.float32, **({"cuda": torch.bfloat16} if torch.cuda.is_available() else {})}
    return {
        device: {
            operation: {"kernels": decision.kernels, "why": decision.why}
            for operation in get_args(Operation)
            for decision in (decide(operation, device, dtype),)
        }
        for device, dtype in usual.items()
    }


def _hub() -> dict[str, Any]:
    """Hub settings: whether a token exists and its source, but never the token itself."""
    from huggingface_hub import constants, get_token

    named = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), None)
    present = get_token() is not None
    return {
        "logged_in": present,
        "token_from": (named or str(constants.HF_TOKEN_PATH)) if present else None,
        "offline": bool(constants.HF_HUB_OFFLINE),
        "endpoint": re.sub(r"//[^/@]*@", "//", constants.ENDPOINT),  # without a name and password
    }


def _caches() -> list[dict[str, Any]]:
    from datasets import config as datasets_config
    from huggingface_hub import constants

    from linearize.runtime.folders import cache_folder

    found = []
    for name, folder in (
        ("linearize", cache_folder()),
        ("models of the Hub", Path(constants.HF_HUB_CACHE)),
        ("data sets of the Hub", Path(datasets_config.HF_DATASETS_CACHE)),
    ):
        size, files = _size(folder)
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(nearest).free
        found.append({"name": name, "folder": str(folder), "bytes": size, "files": files, "free_bytes": free})
    return found


def _size(folder: Path) -> tuple[int, int]:
    """Bytes and number of files below a folder; symlinks, which the Hub's cache uses, are not followed."""
    size = files = 0
    waiting = [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        size, files = size + entry.stat(follow_symlinks=False).st_size, files + 1
        except OSError:
            continue
    return size, files
