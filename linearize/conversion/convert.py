"""Conversion: the swap itself, and the checkpoint folder that comes out of it.

The checks and `mixers_for` need a configuration only. What builds or reads a model imports transformers' modeling
modules by itself, because they take seconds.
"""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from linearize import __version__
from linearize.conversion.claims import final_name
from linearize.conversion.output import check_space, sha256
from linearize.conversion.source import Source, find_source, load_config, load_model, load_tokenizer
from linearize.errors import DataError, ModelError, RecipeError
from linearize.families import family_of
from linearize.hub.card import CardFacts, model_card
from linearize.hub.carry import AUTO_MAP, carried_files
from linearize.model.configuration import MixerConfig
from linearize.model.mixer.mixer import Mixer
from linearize.recipe import MixerSpec, Recipe, dump_recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from linearize.families import AttentionLayer
    from linearize.model import LinearizedForCausalLM

PROVENANCE = "linearize.json"
BASELINE_SINKS = 4
SHARD_BYTES = 5_000_000_000
"""Default size of a file of weights."""


def mixers_for(spec: MixerSpec, layers: Sequence[AttentionLayer]) -> list[MixerConfig]:
    """A recipe's mixer section for a model with these attention layers, one section per distinct kind of layer.

    Layers with a sliding window of their own need no more memory than that already: where others see everything,
    they stay as they are. Where all of them slide, all are converted, or there would be nothing to do.

    Raises:
        RecipeError: `keep`, `windows` or `landmark_layers` names what is not there, `windows` names a layer that stays
            as it is, landmarks are asked of layers that slide, or nothing is left to convert.
    """
    count = len(layers)
    named_layers = {
        "keep": {*spec.keep.layers, *spec.keep.heads},
        "windows": {*spec.windows},
        "landmark_layers": {*spec.landmark_layers},
    }
    for key, named in named_layers.items():
        for index in sorted(named):
            if index not in range(count):
                raise RecipeError(f"mixer.{key}: there is no layer {index}; the model has 0 to {count - 1}")
    for index, chosen in sorted(spec.keep.heads.items()):
        for head in chosen:
            if head not in range(layers[index].key_value_heads):
                most = layers[index].key_value_heads - 1
                raise RecipeError(
                    f"mixer.keep.heads.{index}: there is no key/value head {head}; the layer has 0 to {most}"
                )
    full = [index for index in range(count) if layers[index].window is None]
    _check_landmarks(spec, layers)
    softmax = spec.keep.whole(count)
    kept = {*softmax, *(set(range(count)) - set(full) if full else ())}
    for index in sorted(kept & {*spec.windows}):
        why = "is kept as softmax by mixer.keep" if index in softmax else "has a sliding window of its own, which stays"
        raise RecipeError(f"mixer.windows: layer {index} {why}, so no other window is used there; leave it out")
    common = MixerConfig(
        layers=[],
        recurrence=spec.recurrence,
        window=spec.window,
        sinks=spec.sinks,
        mix=spec.mix,
        covers=spec.covers,
        feature_map=spec.feature_map,
        normalize=spec.normalize,
        rope=spec.rope,
        qk_norm=spec.qk_norm,
        slots=spec.slots,
        negative_eigenvalues=spec.negative_eigenvalues,
        gate_source=spec.gate.source,
        lower_bound=spec.gate.lower_bound,
        gate_scale=spec.gate.scale,
        gate_bias=spec.gate.bias,
        gate_divisor=spec.gate.divisor,
        gate_learned=spec.gate.learned,
    )
    kinds: dict[tuple[tuple[int, ...], int, int] | None, MixerConfig] = {}
    for index in range(count):
        heads = None if index in kept else tuple(sorted(set(spec.keep.heads.get(index, ()))))
        window = spec.window if heads is None else spec.windows.get(index, spec.window)
        if heads is None:
            kind, fresh = None, MixerConfig(layers=[], recurrence="none", window=None, sinks=0)
        else:
            kind = heads, window, spec.landmark_layers.get(index, spec.landmarks)
            fresh = replace(common, layers=[], window=window, softmax_heads=list(heads), landmarks=kind[2])
            try:
                fitted = fresh.fitted(layers[index])
            except ValueError as error:
                raise RecipeError(f"mixer.keep.heads.{index}: {error}") from error
            try:
                Mixer.check(fitted, layers[index])
            except ValueError as error:
                raise RecipeError(f"mixer: {error}") from error
        kinds.setdefault(kind, fresh).layers.append(index)
    sections = sorted(kinds.values(), key=lambda section: (section.window is None, len(section.softmax_heads)))
    if not any(section.converts(layers[index]) for section in sections for index in section.layers) and (
        softmax or spec.keep.heads
    ):
        raise RecipeError("mixer.keep: nothing is left to convert")
    return sections


def _check_landmarks(spec: MixerSpec, layers: Sequence[AttentionLayer]) -> None:
    """Raises:
    RecipeError: landmarks for layers that never see beyond a sliding window of their own.
    """
    for index, number in sorted(spec.landmark_layers.items()):
        if number and layers[index].window is not None:
            raise RecipeError(
                f"mixer.landmark_layers: layer {index} has a sliding window of its own and sees nothing beyond it, so "
                "it has no landmarks; leave it out"
            )
    if spec.landmarks and all(layer.window is not None for layer in layers):
        raise RecipeError(
            "mixer.landmarks: all layers of this model have sliding windows of their own and see nothing beyond them, "
            "so none has landmarks; take a recipe without them"
        )


def check_convertible(config: Any, source: Source, spec: MixerSpec | None = None) -> None:
    """Raises:
    ModelError: the model is converted already, or its architecture is not supported.
    RecipeError: `spec` does not fit it.
    """
    if config.model_type == "linearized":
        raise ModelError(f"{source.name}: is a converted model already; finetune or eval it as it is")
    try:
        family = family_of(config)
    except ValueError as error:
        raise ModelError(f"{source.name}: {error}") from error
    if spec is not None:
        mixers_for(spec, family.layers(config))


def check_reach(recipe: Recipe, config: Any) -> None:
    """Refuses a recipe that calibrates, or shares landmarks out, where no text is longer than what is read exactly.

    Args:
        config: of the pretrained model.

    Raises:
        DataError: rows of `calibrate.length` tokens are too short.
        RecipeError: the model's context is too short.
    """
    if recipe.calibrate is None and recipe.mixer.landmarks_by is None:
        return
    layers = family_of(config).layers(config)
    sections = mixers_for(recipe.mixer, layers)
    reach = min(
        (one.exact_tokens for one in sections for index in one.layers if one.converts(layers[index])),
        default=None,
    )
    if reach is None:
        if recipe.calibrate is None:
            return
        raise DataError("calibrate: the recipe converts no layer of this model, so there is nothing to calibrate")
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context <= reach:
        landmarks = f" and {recipe.mixer.landmarks:,} landmarks" if recipe.mixer.landmarks else ""
        raise RecipeError(
            f"mixer: a window of {recipe.mixer.window:,}, {recipe.mixer.sinks:,} sinks{landmarks} read the first "
            f"{reach:,} tokens of a text exactly, and this model's context is {context:,} tokens: lower "
            f"{'mixer.landmarks or ' if landmarks else ''}mixer.window"
        )
    if recipe.calibrate is not None and recipe.calibrate.length <= reach:
        raise DataError(
            f"calibrate.length {recipe.calibrate.length:,}: the first {reach:,} tokens are all read exactly, so such "
            "rows leave the recurrence nothing to answer: raise it"
        )


def convert_model(teacher: PreTrainedModel, spec: MixerSpec) -> LinearizedForCausalLM:
    """Swaps the attention of `teacher` in place; see `LinearizedForCausalLM.from_teacher`."""
    from linearize.model import LinearizedForCausalLM

    base = teacher.config.text_config if isinstance(teacher, LinearizedForCausalLM) else teacher.config
    return LinearizedForCausalLM.from_teacher(teacher, mixers_for(spec, family_of(base).layers(base)))


def window_sections(mixers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`mixers` with window and sinks alone; what they keep as softmax is kept. Nothing else of them is left, so two
    models of the same window have the same baseline."""
    # Sinks cost next to nothing and a window alone is a straw man, so the baseline has them in any case.
    kept = ("layers", "window", "softmax_heads")
    return [
        {
            **{name: mixer[name] for name in kept if name in mixer},
            "recurrence": "none",
            "covers": "evicted",
            "sinks": max(mixer["sinks"], BASELINE_SINKS),
        }
        if mixer["window"] is not None
        else mixer
        for mixer in mixers
    ]


def window_baseline(teacher: PreTrainedModel, mixers: Sequence[dict[str, Any]]) -> LinearizedForCausalLM:
    """`teacher`, which is used up, with `window_sections(mixers)`: what costs no training at all."""
    from linearize.model import LinearizedForCausalLM

    return LinearizedForCausalLM.from_teacher(teacher, [MixerConfig(**section) for section in window_sections(mixers)])


def base_record(source: Source, revision: str | None) -> dict[str, Any]:
    """The base model's record in `linearize.json`."""
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
    """Writes everything a converted checkpoint consists of.

    Args:
        folder: an existing folder.
        tokenizer: None where the base model has none.
        base: the base model's record, see `base_record`.
        stages: a record of each training stage: objective, data, tokens.
        name: the checkpoint's name on its card; the folder's own, if left out.
        start: what was kept and calibrated before any training, in lines by heading.
        shard_size: the most that one file of weights holds.
        written: the files of weights that are in `folder` already, with their SHA-256; None writes the model's.
        facts: what else the card says.
        more: what else `linearize.json` says.

    Raises:
        OutputError: the disk has no room for it.
    """
    check_space(folder, nbytes(model) if written is None else 0)
    model.config.auto_map = dict(AUTO_MAP)
    config: Any = model.config.text_config
    config._name_or_path = ""  # a path of this machine; linearize.json names the base model
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
    provenance["files"] = {
        path.name: known.get(path.name) or sha256(path) for path in sorted(folder.iterdir()) if path.is_file()
    }
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def _name_tokenizer_class(path: Path) -> None:
    """Writes transformers' generic tokenizer class under the name that versions before 5, which lack the newer name,
    know as well: a tokenizer then loads there without the model's configuration, and so without its code."""
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def nbytes(model: torch.nn.Module) -> int:
    """Bytes of what a checkpoint of the model holds; what is tied counts once."""
    kept = {id(tensor): tensor.numel() * tensor.element_size() for tensor in model.state_dict(keep_vars=True).values()}
    return sum(kept.values())


def _write_configurations(folder: Path, model: LinearizedForCausalLM) -> None:
    """Write the files that `save_pretrained` writes beside the weights."""
    config: Any = model.config
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    generation: Any = model.generation_config
    generation.save_pretrained(folder)


def state_nbytes(model: LinearizedForCausalLM, dtype: torch.dtype | None = None) -> int:
    """Bytes of memory that one sequence takes in all layers before its first token: all that it ever takes, unless
    layers or heads keep softmax over the whole past."""
    return sum(layer.memory_nbytes(dtype or model.dtype)[0] for layer in model.attention_layers)


def converted_layers(model: LinearizedForCausalLM) -> int:
    """Number of layers that compute something else than their pretrained attention."""
    config = model.config
    layers = family_of(config.text_config).layers(config.text_config)
    return sum(config.mixer_of(index).converts(layer) for index, layer in enumerate(layers))


def growth_nbytes(model: LinearizedForCausalLM) -> int:
    """Bytes of memory per token on top of that, in the layers and heads that keep softmax over the whole past."""
    return sum(layer.memory_nbytes(model.dtype)[1] for layer in model.attention_layers)


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"linearize": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def open_model(reference: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any, Source]:
    """Any model, converted or not, with its tokenizer and whereabouts."""
    source = find_source(reference, trust_remote_code=trust_remote_code)
    load_config(source)  # a name that nobody has is looked for once, where the calls below look for several files
    tokenizer = load_tokenizer(source)
    return load_model(source, dtype=dtype), tokenizer, source
