"""What of a model a stage trains: adapters on its projections, its mixers' own parameters, or everything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from peft import LoraConfig, MissConfig, PeftConfig, TaskType, get_peft_model
from transformers.pytorch_utils import Conv1D

from linearize.errors import RecipeError
from linearize.model.modeling import family_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from linearize.recipe import LoraSpec


def add_adapters(model: PreTrainedModel, lora: LoraSpec | None) -> Any:
    """The model, converted or pretrained, with peft's adapters on the targets of `lora`, in float32, or as it is; see
    `choose_trained`.

    Raises:
        RecipeError: a target is not there, or is of a kind that the adapters do not take.
    """
    model.requires_grad_(False)
    if lora is None:
        return model
    modules = _target_modules(model, lora.targets)
    try:
        return get_peft_model(model, _adapter_config(lora, modules))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError(f"lora: {lora.kind} does not fit this model: {str(error).splitlines()[0]}") from error


def _adapter_config(lora: LoraSpec, modules: dict[str, nn.Module]) -> PeftConfig:
    if lora.kind == "miss":
        return MissConfig(
            r=lora.rank, miss_dropout=lora.dropout, target_modules=list(modules), task_type=TaskType.CAUSAL_LM
        )
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules.values()),
        task_type=TaskType.CAUSAL_LM,
        use_rslora=lora.kind == "rslora",
        use_dora=lora.kind == "dora",
        init_lora_weights="pissa" if lora.kind == "pissa" else True,
    )


def choose_trained(student: Any, train: Literal["lora", "mixer", "full"]) -> None:
    """Lets gradients reach what a stage trains, and nothing else.

    Raises:
        RecipeError: nothing is left to train.
    """
    for name, parameter in student.named_parameters():
        adapter = is_adapter(name)
        chosen = {"lora": adapter, "mixer": False, "full": not adapter}[train] or is_own_parameter(name)
        parameter.requires_grad_(chosen)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise RecipeError("nothing to train: the recipe has no lora, and this mixer has no parameters of its own")


def is_own_parameter(name: str) -> bool:
    """Test by its name if a parameter belongs to a mixer: neither pretrained nor an adapter's."""
    return ".mixer." in name and not is_adapter(name)


def is_adapter(name: str) -> bool:
    """Test by its name if a parameter belongs to an adapter of peft."""
    return ".lora_" in name or ".miss_" in name


def _target_modules(model: PreTrainedModel, targets: list[str]) -> dict[str, nn.Module]:
    """What the names of the modules that LoRA targets end in, with one module of each.

    Raises:
        RecipeError: a target is not there.
    """
    projections = family_of(getattr(model.config, "text_config", model.config)).projections
    modules: dict[str, nn.Module] = {}
    for target in targets:
        ending = projections.get(target, target)
        found = next((module for name, module in model.named_modules() if f".{name}".endswith(f".{ending}")), None)
        if found is None:
            raise RecipeError(f"lora.targets: the model has no module {target!r} ({ending})")
        modules[ending] = found
    return modules
