"""Read a converted checkpoint's `linearize.json`: its base model, its stages, and the digests of its files."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from linearize.errors import ModelError
from linearize.sources.source import _NAME_ONE, Source, _is_ours, _json_of, find_source


def provenance_of(source: Source) -> dict[str, Any]:
    """The contents of a converted model's `linearize.json`, or an empty mapping if it is missing."""
    return _json_of(source, "linearize.json")


def checkpoint_digest(source: Source) -> str | None:
    """Identity of a converted checkpoint: SHA-256 over the digests of configuration and weights in its
    `linearize.json`; None if there are none. Reads no other file."""
    files = provenance_of(source).get("files")
    if not isinstance(files, dict):
        return None
    told = {name: digest for name, digest in files.items() if isinstance(digest, str) and _TELLING.fullmatch(name)}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest() if told else None


# Leaves out the card, which users may edit, and the rows of training data, which are not shared.
_TELLING = re.compile(r"config\.json|model.*\.safetensors")


def sound_provenance(source: Source) -> dict[str, Any]:
    """Read a converted model's `linearize.json` and check the entries that are used.

    Raises:
        ModelError: the file is missing, or an entry has an unexpected form.
    """
    found = provenance_of(source)
    base, stages, start, made = (found.get(key, kind()) for key, kind in _PARTS.items())
    sound = (
        isinstance(base, dict)
        and all(isinstance(base.get(key), str) for key in ("kind", "name"))
        and isinstance(base.get("model", ""), str)
        and isinstance(stages, list)
        and all(isinstance(stage, dict) for stage in stages)
        and all(isinstance(stage.get(key), kind) for stage in stages for key, kind in _STAGE.items())
        and isinstance(start, dict)
        and all(isinstance(lines, list) and all(isinstance(line, str) for line in lines) for lines in start.values())
        and isinstance(made, dict)
        and isinstance(made.get("linearize", ""), str)
    )
    if not sound:
        raise ModelError(
            f"{source.reference}: linearize.json is missing, damaged or not written by linearize; fetch the model "
            "again, or convert it again"
        )
    return found


_PARTS: dict[str, type] = {"base": dict, "stages": list, "start": dict, "versions": dict}


_STAGE: dict[str, type] = {"objective": str, "data": str, "tokens": int}


def teacher_of(source: Source, named: str | None = None) -> Source:
    """The pretrained model that a converted one was made from; any other model is its own teacher.

    Args:
        named: the user's choice of teacher, used unchanged.

    Raises:
        ModelError: the folder does not name a teacher, or the named one is missing.
    """
    if named is not None:
        return find_source(named, trust_remote_code=source.trust_remote_code)
    if not source.is_converted:
        return source
    base = provenance_of(source).get("base")
    if not isinstance(base, dict) or not isinstance(base.get("model"), str):
        raise ModelError(f"{source.reference}: linearize.json does not name the base model; {_NAME_ONE}")
    try:
        teacher = find_source(base["model"], trust_remote_code=source.trust_remote_code)
    except ModelError as error:
        reason = str(error).split(";")[0]  # drop the advice, because the user did not name this model
        raise ModelError(f"the teacher of {source.name} is gone: {reason}; {_NAME_ONE}") from error
    if _is_ours(_json_of(teacher, "config.json")):  # `load_model` raises an error later if it is missing
        raise ModelError(f"{teacher.reference}: converted, where the teacher of {source.name} was; {_NAME_ONE}")
    return teacher
