"""Write a converted checkpoint: weights, configurations, tokenizer, carried code, card and `linearize.json`."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from linearize import __version__
from linearize.checkpoint.card import CardFacts, model_card
from linearize.checkpoint.carry import AUTO_MAP, carried_files
from linearize.checkpoint.sizes import growth_nbytes, state_nbytes
from linearize.recipe import Recipe, dump_recipe
from linearize.runtime.claims import final_name
from linearize.runtime.files import check_space, sha256
from linearize.runtime.memory import nbytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from linearize.model import LinearizedForCausalLM
    from linearize.sources.source import Source


PROVENANCE = "linearize.json"


SHARD_BYTES = 5_000_000_000


def base_record(source: Source, revision: str | None) -> dict[str, Any]:
    """Build the base model's record for `linearize.json`."""
    return {"model": source.reference, "name": source.name, "kind": source.kind, "revision": revision}


def write_checkpoint(
    folder: Path,
    model: LinearizedForCausalLM,
    tokenizer: Any,
    recipe: Recipe,
    base: dict[str, Any],
    stages: Sequence[dict[str, Any]] = (),
    name: str | None = None,
    *,
    start: Mapping[str, Any] | None = None,
    shard_size: int | str = SHARD_BYTES,
    written: dict[str, str] | None = None,
    facts: CardFacts | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write all files of a converted checkpoint.

    Args:
        folder: an existing folder.
        tokenizer: None if the base model has none.
        base: the base model's record, see `base_record`.
        stages: a record of each training stage: objective, data, tokens.
        name: the checkpoint's name on its card; by default the folder's name.
        start: heading -> lines on kept softmax and calibration before training.
        shard_size: maximum bytes of a weight file.
        written: file name -> SHA-256 of the weight files that already are in `folder`; None writes the model's weights.
        facts: further content of the card.
        more: further entries of `linearize.json`.

    Raises:
        OutputError: the disk has too little space.
    """
    check_space(folder, nbytes(model) if written is None else 0)
    model.config.auto_map = dict(AUTO_MAP)
    config: Any = model.config.text_config
    config._name_or_path = ""  # a local path; `linearize.json` names the base model
    if written is None:
        model.save_pretrained(folder, max_shard_size=shard_size)
    else:
        _write_configurations(folder, model)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        _name_tokenizer_class(folder / "tokenizer_config.json")
    for file, source in carried_files().items():
        (folder / file).write_text(source, encoding="utf-8")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    provenance: dict[str, Any] = {
        "format": 1,
        "base": base,
        "seed": recipe.seed,
        **({"start": dict(start)} if start else {}),
        "stages": list(stages),
        "versions": versions(),
        **(more or {}),
    }
    card = model_card(
        name or final_name(folder),
        provenance,
        model.config.mixers or [],
        state_nbytes(model),
        growth_nbytes(model),
        facts,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    known = written or {}
    # In subfolders too: transformers writes a tokenizer's further chat templates into one.
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    provenance["files"] = {name: known.get(name) or sha256(folder / name) for name in names}
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def _write_configurations(folder: Path, model: LinearizedForCausalLM) -> None:
    """Write the configuration files of `save_pretrained` without the weights."""
    config: Any = model.config
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    generation: Any = model.generation_config
    generation.save_pretrained(folder)


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    found = {"linearize": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _name_tokenizer_class(path: Path) -> None:
    """Replace transformers' generic tokenizer class by its name before version 5. Older versions lack the newer name;
    they can then load the tokenizer without the model's configuration, and so without its code."""
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
