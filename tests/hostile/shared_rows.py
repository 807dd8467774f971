"""Hostile inputs of what is shared: folders of checkpoints that somebody else made, or changed, exported or pushed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.hostile.kit import Kit

DEEP = "[" * 100_000


def changed(kit: Kit, name: str, content: str | bytes | None = None, **values: Any) -> Path:
    """A copy of the converted model with another file, or with other values in a JSON file."""
    model = kit.model(kit.converted)
    if content is None:
        content = json.dumps({**json.loads((model / name).read_text()), **values})
    (model / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return model


def export(*arguments: Any, **values: Any) -> Callable[[Kit], list[Any]]:
    return lambda kit: ["export", changed(kit, *arguments, **values), kit.folder / "out"]


def push(*arguments: Any, **values: Any) -> Callable[[Kit], list[Any]]:
    return lambda kit: ["push", "me/model", unnamed(kit, changed(kit, *arguments, **values)), "--yes"]


def unnamed(kit: Kit, model: Path) -> Path:
    """The model's folder without the base model's path, which would be told first."""
    for name in ("linearize.json", "recipe.yaml"):
        (model / name).write_text((model / name).read_text().replace(str(kit.plain), "tiny"))
    return model


def linked(kit: Kit) -> list[Any]:
    model = unnamed(kit, kit.model(kit.converted))
    (model / "a.txt").symlink_to(kit.plain / "config.json")
    return ["push", "me/model", model, "--yes"]


BOMB = "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(12))
_NOT_OURS = "linearize.json is missing, damaged or not written by linearize; fetch the model again, or convert it again"
_UNSAID = "linearize.json does not say what belongs to the checkpoint"

SHARED: list[tuple[str, Callable[[Kit], list[Any]], str]] = [
    ("export: no provenance", export("linearize.json", "{}"), _NOT_OURS),
    ("export: provenance nested too deeply", export("linearize.json", DEEP), _NOT_OURS),
    ("export: a base that is text", export("linearize.json", base="x"), _NOT_OURS),
    ("export: a base without a kind", export("linearize.json", base={"model": 5}), _NOT_OURS),
    ("export: stages that are none", export("linearize.json", stages=[1]), _NOT_OURS),
    ("export: a stage without tokens", export("linearize.json", stages=[{"objective": "1 sft"}]), _NOT_OURS),
    ("export: a start that is a list", export("linearize.json", start=[1]), _NOT_OURS),
    ("export: versions that are a number", export("linearize.json", versions=3), _NOT_OURS),
    ("export: a recipe of aliases", export("recipe.yaml", BOMB), "anchors and aliases are not allowed"),
    ("finetune: provenance that is none", lambda kit: [
        "finetune", "window-gla", *kit.out, "--set", f"model={changed(kit, 'linearize.json', stages=[1])}",
    ], _NOT_OURS),
    ("push: no provenance", push("linearize.json", "{}"), _UNSAID),
    ("push: provenance nested too deeply", push("linearize.json", DEEP), _UNSAID),
    ("push: files that are a list", push("linearize.json", files=[1]), _UNSAID),
    ("push: a recipe of aliases", push("recipe.yaml", BOMB), "recipe.yaml is not as it was written"),
    ("push: a link to a file elsewhere", linked, "a.txt is a link to a file elsewhere"),
]  # fmt: skip
