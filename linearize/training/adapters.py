"""Select a stage's trainable parameters (adapters, mixer parameters or all weights), and merge adapters."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from peft import LoraConfig, MissConfig, PeftConfig, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from linearize.errors import ModelError, RecipeError
from linearize.families import family_of
from linearize.model.configuration import CODING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from linearize.data.rows import Rows
    from linearize.model import LinearizedForCausalLM
    from linearize.recipe import LoraSpec, Recipe

_MERGE_TOKENS = 256
_MERGE_NOISE = 8.0
"""Maximum change of logits by merging, as a multiple of the change by one rounding of the merged weights."""


def add_adapters(model: PreTrainedModel, lora: LoraSpec | None, say: Callable[[str], None] = lambda _: None) -> Any:
    """Add peft's adapters, in float32, to the targets of `lora`; without `lora` the model is only frozen.

    Args:
        model: a converted or pretrained model.
        say: called with a line if a target is in some layers only, or beside fused experts.

    Raises:
        RecipeError: a target does not exist, shares its weight with another module, or is of a kind without adapters.
    """
    model.requires_grad_(False)
    if lora is None:
        return model
    targets = _targets(model, lora.targets)
    for line in _coverage(model, targets):
        say(line)
    try:
        return get_peft_model(model, _adapter_config(lora, targets))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError(f"lora: {lora.kind} does not fit this model: {str(error).splitlines()[0]}") from error


def merged(student: Any, rows: Rows, kept: str) -> Any:
    """Merge the adapters of `student` into its weights, and check that the logits of one row stay the same.

    A merged weight is rounded once to its dtype. So the tolerance is derived from the change of the logits when each of
    these weights is moved at random by up to one unit of rounding.

    Args:
        rows: the check uses the first row.
        kept: the folder that still has the adapters, for the error.

    Raises:
        ModelError: the logits differ by more than the tolerance, or are not finite.
    """
    student.eval()
    base = base_of(student)
    names = [name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    before = _logits(base, rows)
    try:
        model = student.merge_and_unload(safe_merge=True)
    except ValueError as error:  # values that are not finite
        raise ModelError(f"adapters cannot be merged: {str(error).splitlines()[0]}; {kept} has them") from error
    after = _logits(model, rows)
    with _rounded([model.get_submodule(name) for name in names]):
        rounded = _logits(model, rows)
    # The median over tokens, because another choice of an expert or landmark can change single tokens by any amount.
    change, noise = ((x - after).norm(dim=-1).median().item() for x in (before, rounded))
    if not change <= _MERGE_NOISE * noise:
        raise ModelError(
            f"merging adapters changed the model: logits moved by {change:.1e}, and rounding explains {noise:.1e}; "
            f"nothing was written, and {kept} has the adapters"
        )
    return model


@torch.no_grad()
def _logits(model: Any, rows: Rows) -> Tensor:
    """`[T, V]` float32 of the first tokens of the first row."""
    ids, positions = (x[:1, :_MERGE_TOKENS].to(model.device) for x in (rows.input_ids, rows.position_ids))
    logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    return logits.float() if logits.dtype != torch.float64 else logits


@contextmanager
def _rounded(modules: list[Any]) -> Iterator[None]:
    """Add random rounding to each module's weight while the module runs; one weight at a time is copied."""
    held: dict[nn.Module, Tensor] = {}

    def begin(module: Any, _: Any) -> None:
        weight = held[module] = module.weight.data
        generator = torch.Generator(weight.device).manual_seed(0)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        noise = torch.rand(wide.shape, generator=generator, device=wide.device, dtype=wide.dtype)
        # The recurrence and softmax compute in float32 even if weights are float64.
        unit = max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
        module.weight.data = (wide * (1 + unit * (2 * noise - 1))).to(weight.dtype)

    def end(module: Any, *_: Any) -> None:
        module.weight.data = held.pop(module)

    hooks = [
        hook
        for module in modules
        for hook in (module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adapter_config(lora: LoraSpec, targets: list[_Target]) -> PeftConfig:
    endings = [target.ending for target in targets]
    if lora.kind == "miss":
        return MissConfig(r=lora.rank, miss_dropout=lora.dropout, target_modules=endings, task_type=TaskType.CAUSAL_LM)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=endings,
        fan_in_fan_out=any(isinstance(target.modules[name], Conv1D) for target in targets for name in target.modules),
        task_type=TaskType.CAUSAL_LM,
        use_rslora=lora.kind == "rslora",
        use_dora=lora.kind == "dora",
        init_lora_weights="pissa" if lora.kind == "pissa" else True,
    )


FITTED = (".mixer.score_weight", *CODING)
"""Name endings of parameters without a gradient: the choice and the coding of kept tokens are not differentiated."""


def choose_trained(student: Any, train: Literal["lora", "mixer", "full"]) -> None:
    """Set `requires_grad` on the parameters that a stage trains, and clear it on all others.

    Raises:
        RecipeError: there is nothing to train.
    """
    for name, parameter in student.named_parameters():
        adapter = is_adapter(name)
        chosen = {"lora": adapter, "mixer": False, "full": not adapter}[train] or is_own_parameter(name)
        parameter.requires_grad_(chosen and not name.endswith(FITTED))
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise RecipeError(
            "nothing to train: stages.N.train chooses parameters that this model does not have (window and slots have "
            "none that train): add a lora section and set train to lora, or set train to full"
        )


def base_of(student: Any) -> LinearizedForCausalLM:
    """The converted model, with or without peft's wrapper around it."""
    model: LinearizedForCausalLM = student.get_base_model() if hasattr(student, "get_base_model") else student
    return model


def is_own_parameter(name: str) -> bool:
    """Test by its name if a parameter belongs to a mixer: neither pretrained nor an adapter's."""
    return ".mixer." in name and not is_adapter(name)


def is_adapter(name: str) -> bool:
    """Test by its name if a parameter belongs to an adapter of peft."""
    return ".lora_" in name or ".miss_" in name


class _Target(NamedTuple):
    """A name in `lora.targets`, the suffix of module names that it stands for, and all modules with that suffix."""

    name: str
    ending: str
    modules: dict[str, nn.Module]


def _targets(model: PreTrainedModel, names: list[str]) -> list[_Target]:
    """Raises:
    RecipeError: a target does not exist, or shares its weight with another module.
    """
    projections = family_of(getattr(model.config, "text_config", model.config)).projections
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    targets: dict[str, _Target] = {}
    for target in names:
        ending = projections.get(target, target)
        found = {name: module for name, module in _takers(model).items() if f".{name}".endswith(f".{ending}")}
        if not found:
            experts = sorted(_fused_experts(model))
            hint = f"; its experts ({', '.join(experts)}) are fused, and adapters do not reach them" if experts else ""
            raise RecipeError(
                f"lora.targets: the model has no module {target!r} ({ending}) that takes adapters; those that do are "
                f"{', '.join(_available(model, projections))}{hint}"
            )
        for name, module in found.items():
            for parameter in module.parameters(recurse=False):
                others = [other for other in owners[id(parameter)] if other.rpartition(".")[0] != name]
                if others:
                    raise RecipeError(
                        f"lora.targets: {target!r} shares its weight with {others[0]}, which merging its adapter would "
                        "change too; leave it out, or train the shared weight by train: full"
                    )
        targets.setdefault(ending, _Target(target, ending, found))
    return list(targets.values())


def _takers(model: nn.Module) -> dict[str, nn.Module]:
    """The pretrained modules that peft has adapters for, by name."""
    kinds = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _available(model: PreTrainedModel, projections: dict[str, str]) -> list[str]:
    """Valid names for `lora.targets`: the short ones, then the last parts of names without a short one."""
    names = {f".{name}" for block in _blocks(model) for name in _takers(block) if not is_own_parameter(f".{name}")}
    short = {key: ending for key, ending in projections.items() if any(name.endswith(f".{ending}") for name in names)}
    endings = tuple(f".{ending}" for ending in short.values())
    return [*short, *sorted({name.rpartition(".")[2] for name in names if not name.endswith(endings)})]


def _fused_experts(model: PreTrainedModel) -> dict[str, int]:
    """3-D parameters, which hold all experts in one: name within a layer -> number of layers."""
    found: dict[str, int] = {}
    for block in _blocks(model):
        for name, parameter in block.named_parameters():
            if parameter.dim() == 3 and not is_own_parameter(f".{name}"):
                found[name] = found.get(name, 0) + 1
    return found


def _coverage(model: PreTrainedModel, targets: list[_Target]) -> list[str]:
    """Warnings about targets in some layers only, and about fused experts without adapters beside them."""
    blocks = _blocks(model)
    lines, beside = [], []
    experts = _fused_experts(model)
    parts = {name.partition(".")[0] for name in experts}  # mlp, say
    for target in targets:
        modules = set(target.modules.values())
        inside = [{name for name, module in block.named_modules() if module in modules} for block in blocks]
        names, count = sorted(set().union(*inside)), sum(map(bool, inside))
        where = f"{target.name} ({', '.join(names)}) in {count} of {len(blocks)} layers"
        if 0 < count < len(blocks):
            lines.append(f"lora: {where} only")
        if any(name.partition(".")[0] in parts for name in names):
            beside.append(where)
    if beside:
        lines.append(
            f"lora: adapts {'; '.join(beside)}. The fused experts ({', '.join(sorted(experts))}) are not adapted; "
            "train: full trains them"
        )
    return lines


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    family = family_of(getattr(model.config, "text_config", model.config))
    blocks: Any = model.get_submodule(family.blocks)
    return list(blocks)


def check_dtype(recipe: Recipe) -> None:
    """Raises:
    RecipeError: stages in float16, whose small gradients become 0 because training has no loss scaling.
    """
    if recipe.stages and recipe.dtype == "float16":
        raise RecipeError("dtype: float16 turns small gradients into 0; take bfloat16 or float32 to train")


def check_four_bit(recipe: Recipe, shard: bool) -> None:
    """Raises:
    RecipeError: the recipe or the engine does not support frozen weights in 4 bits.
    """
    if shard:
        raise RecipeError("lora.four_bit: does not go with --shard; leave one of them out")
    for number, stage in enumerate(recipe.stages):
        if stage.train != "lora":
            raise RecipeError(f"stages.{number}.train: {stage.train} does not go with lora.four_bit; take lora")
        if "align" in stage.weights:
            raise RecipeError(f"stages.{number}.objective: align does not go with lora.four_bit; take distill or sft")
    if recipe.lora is not None and recipe.lora.kind == "pissa":
        raise RecipeError("lora.kind: pissa changes the weights that four_bit freezes; take lora, rslora or dora")
