"""Shard a model's weights among processes (FSDP2): each process holds a part of every tensor, and gathers a layer's
weights while the layer runs. Gradients and optimizer states are sharded the same way.

Checkpoints are unsharded, so any number of processes, with or without sharding, can resume from them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from linearize.errors import LinearizeError, RecipeError
from linearize.families import family_of
from linearize.recipe.schema import STUDENT
from linearize.runtime import processes

if TYPE_CHECKING:
    from linearize.recipe import Recipe


def check_shardable(recipe: Recipe) -> None:
    """Raises:
    LinearizeError: there is only one process.
    RecipeError: a stage does not support sharding.
    """
    if processes.count() == 1:
        raise LinearizeError("--shard: there is one process only; add --launch N")
    for number, stage in enumerate(recipe.stages):
        where = f"stages.{number}"
        if stage.train != recipe.stages[0].train:
            raise RecipeError(
                f"{where}.train: a split model trains the same in all stages; run these one after another"
            )
        if any(one.source == STUDENT for one in stage.data.sources):
            raise RecipeError(f"{where}.data: a student that --shard splits writes no text; take self or files")
        if "align" in stage.weights:
            raise RecipeError(f"{where}.objective: align runs layers one by one, which --shard has split")
        if stage.teacher_at == "cpu":
            raise RecipeError(f"{where}.teacher_at: --shard splits the teacher as well; take device or disk")
        if stage.optimizer == "adamw8bit":
            raise RecipeError(f"{where}.optimizer: adamw8bit does not go with --shard; take adamw or adafactor")
    if recipe.lora is not None and recipe.lora.kind == "pissa":
        raise RecipeError("lora.kind: pissa changes the weights that --shard splits; take lora, rslora or dora")


@cache
def mesh() -> DeviceMesh:
    """The one-dimensional device mesh of all processes; all of them must make the first call."""
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (torch.distributed.get_world_size(),))


def shard(model: Any) -> None:
    """Shard the weights of `model` among all processes, layer by layer, on the processes' devices.

    Each process must have the same weights. `requires_grad` must not be changed afterwards.

    Args:
        model: a pretrained or a converted model, also with adapters.
    """
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in getattr(base, "attention_layers", ()):
        # The trained parameters of a unit need one dtype, and a mixer's own parameters are float32.
        if layer.mixer is not None and len({p.dtype for p in layer.parameters() if p.requires_grad}) > 1:
            fully_shard(layer.mixer, mesh=mesh())
    for block in base.get_submodule(family_of(getattr(base.config, "text_config", base.config)).blocks):
        fully_shard(block, mesh=mesh())
    fully_shard(model, mesh=mesh())
    model._is_accelerate_prepared = True  # otherwise accelerate wraps it for DDP


def is_sharded(model: nn.Module) -> bool:
    """True if `shard` was applied to the model."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, sharded as `like`."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.to_local().device), like.device_mesh, like.placements)


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with unsharded tensors, on the CPU; all processes must call it."""
    return {key: _mapped(value) for key, value in state.items()}


def split_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse of `whole_state`: sharded as the parameters of `optimizer`."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    split = dict(state)
    split["state"] = {
        number: {k: part_like(v, trained[number]) if isinstance(v, Tensor) else v for k, v in kept.items()}
        for number, kept in state["state"].items()
    }
    if "masters" in state:
        split["masters"] = [part_like(x, p) for x, p in zip(state["masters"], trained, strict=True)]
    return split


def _mapped(value: Any) -> Any:
    if isinstance(value, Tensor):
        return whole(value.detach()).cpu()
    if isinstance(value, dict):
        return {k: _mapped(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_mapped(v) for v in value]
    return value
