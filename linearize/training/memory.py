"""Estimate the memory of training before it starts, on one GPU or on each of several.

    weights       the student's frozen weights, in their own dtype
    trained       adapters, the mixers' own parameters, or every weight
    gradients     gradients of the trained parameters, in their dtype
    optimizer     moments, and float32 copies of parameters trained in half precision
    teacher       the teacher's weights, if the objective needs it
    activations   tensors of the forward and backward pass at the peak, with the temporaries of one layer
    logits        logits of student and teacher and their gradients at the peak
    gathered      buffers of the engine: a layer's gathered weights, all gradients

Activations and logits are counted by a run on the meta device, see `linearize.training.rehearsal`. Long rows and deep
models of equal layers are extrapolated linearly from two small runs. The other parts are computed from shapes.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from linearize.conversion.swap import convert_model, mixers_for
from linearize.families import family_of
from linearize.model import LinearizedForCausalLM, MixerConfig
from linearize.report.formatting import readable_bytes
from linearize.sources.source import DTYPES
from linearize.training.adapters import add_adapters, choose_trained
from linearize.training.rehearsal import Moment, fullest_moment
from linearize.training.teachers import wants_teacher

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from linearize.recipe import Recipe, Stage

Engine = Literal["single", "ddp", "fsdp2", "zero3"]
ENGINES: tuple[Engine, ...] = ("single", "ddp", "fsdp2", "zero3")
CARDS = (16, 24, 48, 80, 141)
"""GB of the GPUs that `fits` covers."""

_CONTEXT = 1_000_000_000  # the driver, CUDA's libraries and NCCL on an empty GPU
_FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes per weight, with its shares of both levels of scales
_COUNTED = 512  # tokens; with fewer, or fewer windows, memory does not grow linearly yet
_COUNTED_WINDOWS = 4
_FEW_LAYERS = (2, 4)
# DeepSpeed's default for stage 3: the maximum number of parameters gathered at a time.
_ZERO3_LIVE = 1_000_000_000


@dataclass(frozen=True)
class TrainingMemory:
    """Peak bytes on each GPU while a stage trains.

    Attributes:
        activations, logits: None if they cannot be counted, because the computation depends on the data.
        cache: the cache of the trained model when it generates a micro-batch of sequences of `length` tokens; not part
            of the total.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int | None
    logits: int | None
    gathered: int
    cache: int

    @property
    def total(self) -> int | None:
        if self.activations is None or self.logits is None:
            return None
        held = self.weights + self.trained + self.gradients + self.optimizer + self.teacher + self.gathered
        return held + self.activations + self.logits

    def fits(self) -> dict[int, bool | None]:
        """For each of `CARDS`: True if the memory fits; None if that is unknown."""
        total = self.total
        return {card: None if total is None else total + _CONTEXT <= card * 10**9 for card in CARDS}

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total, "fits_gb": {str(card): fit for card, fit in self.fits().items()}}


def training_memory(
    config: Any,
    recipe: Recipe,
    stage: Stage,
    *,
    processes: int = 8,
    checkpointing: bool | None = None,
    position_ids: Tensor | None = None,
) -> dict[Engine, TrainingMemory]:
    """Memory of `stage` for a model of this configuration, by engine.

    Args:
        config: the configuration of a pretrained model, or of a converted one, which has its own mixers.
        processes: the number of GPUs, for engines that use several.
        checkpointing: replaces the stage's `gradient_checkpointing`.
        position_ids: `[micro_batch, length]` of packed documents; None for one document per row. In plain torch every
            document of a packed row takes as much memory as the longest one.
    """
    pair = _pair(config, recipe, stage)
    student, converted, teacher = pair
    dtype, asked = teacher.dtype, wants_teacher(stage)
    beside = asked and stage.teacher_at == "device"
    wanted = stage.gradient_checkpointing if checkpointing is None else checkpointing
    moment = _moment(config, recipe, stage, pair, wanted, position_ids)
    trained = [p for p in student.parameters() if p.requires_grad]
    weights, gradients = _nbytes(student.parameters()), _nbytes(trained)
    unpacked = 0
    if recipe.lora is not None and recipe.lora.four_bit:
        linear = _quantized(converted)
        weights -= sum(x.nbytes - math.ceil(x.numel() * _FOUR_BIT) for x in linear)
        unpacked = max(x.nbytes for x in linear)  # the weight of the current layer
    optimizer = _optimizer_nbytes(stage, trained)
    pretrained = _nbytes(teacher.parameters()) if beside else 0
    cache = stage.micro_batch * sum(
        first + more * stage.length for first, more in (a.memory_nbytes(dtype) for a in converted.attention_layers)
    )
    layers, teachers = _units(converted), _units(teacher) if beside else (0, 0)
    if asked and stage.teacher_at == "cpu":  # its modules are on the GPU one at a time
        pretrained = max(_nbytes(module.parameters(recurse=False)) for module in teacher.modules())
    found: dict[Engine, TrainingMemory] = {}
    for engine in ENGINES:
        parts = processes if engine in ("fsdp2", "zero3") else 1
        gathered = {
            "single": 0,
            "ddp": gradients,  # the buckets of the all-reduce
            # Weights outside layers stay gathered from the forward to the backward pass. Of the layers, the current
            # and the next one are gathered, and the gradients of one are being reduced.
            "fsdp2": sum(outside + 2 * layer for layer, outside in (layers, teachers))
            + 2 * _layer_share(converted, trained),
            "zero3": sum(
                min(_nbytes(model.parameters()), _ZERO3_LIVE * dtype.itemsize)
                for model in (student, *([teacher] if beside else []))
            ),
        }[engine]
        shared_teacher = math.ceil(pretrained / parts) if beside else pretrained
        found[engine] = TrainingMemory(
            weights=math.ceil((weights - gradients) / parts),
            trained=math.ceil(gradients / parts),
            gradients=math.ceil(gradients / parts),
            optimizer=math.ceil(optimizer / parts),
            teacher=shared_teacher,
            activations=None if moment is None else moment.activations,
            logits=None if moment is None else moment.logits,
            gathered=gathered + unpacked,
            cache=cache,
        )
    return found


class _Pair(NamedTuple):
    """Models on the meta device: the student, the student without adapters, and the teacher."""

    student: Any
    converted: LinearizedForCausalLM
    teacher: Any


def _pair(config: Any, recipe: Recipe, stage: Stage) -> _Pair:
    mixers = [MixerConfig(**section) for section in config.mixers] if config.model_type == "linearized" else None
    dtype = DTYPES.get(recipe.dtype) or getattr(config, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    pretrained = config if mixers is None else config.text_config
    with torch.device("meta"):
        teacher, base = (AutoModelForCausalLM.from_config(pretrained, dtype=dtype).eval() for _ in range(2))
    if dtype == torch.float16:
        base.float()  # as `finetune` trains it
    converted = (
        convert_model(base, recipe.mixer) if mixers is None else LinearizedForCausalLM.from_teacher(base, mixers)
    )
    student = add_adapters(converted, recipe.lora if stage.train == "lora" else None).train()
    choose_trained(student, stage.train)
    return _Pair(student, converted, teacher.requires_grad_(False))


def _cut(config: Any, recipe: Recipe, layers: int) -> Any:
    """`config` with its first layers only; None if the layers are not all alike."""
    if config.model_type == "linearized" or config.num_hidden_layers <= layers:
        return None
    whole = family_of(config).layers(config)
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        shorter.layer_types = config.layer_types[:layers]
    alike = len(mixers_for(recipe.mixer, whole)) == 1 and all(layer == whole[0] for layer in whole)
    return shorter if alike and family_of(shorter).layers(shorter) == whole[:layers] else None


def _moment(
    config: Any, recipe: Recipe, stage: Stage, pair: _Pair, checkpointing: bool, position_ids: Tensor | None
) -> Moment | None:
    """The peak of a step, without complete gradients; None if it depends on the data."""
    rows, heard = stage.micro_batch, wants_teacher(stage) and stage.teacher_at != "disk"

    def counted(pair: _Pair, tokens: int) -> tuple[float, float]:
        found = fullest_moment(
            pair.student,
            pair.teacher if heard else None,
            stage,
            rows=rows,
            tokens=tokens,
            accumulates=stage.batch_tokens > rows * stage.length,
            checkpointing=checkpointing,
            position_ids=position_ids,
        )
        return found.activations, found.logits

    def at_length(pair: _Pair) -> tuple[float, float]:
        windows = [layer.mixer.window for layer in pair.converted.attention_layers if layer.mixer is not None]
        most = max(_COUNTED, _COUNTED_WINDOWS * max(windows, default=0))
        if stage.length <= most or position_ids is not None:
            return counted(pair, stage.length)
        return _along(stage.length, most // 2, counted(pair, most // 2), most, counted(pair, most))

    few, more = _FEW_LAYERS
    shorter, longer = _cut(config, recipe, few), _cut(config, recipe, more)
    try:
        if shorter is None or longer is None:
            activations, logits = at_length(pair)
        else:
            ends = (at_length(_pair(one, recipe, stage)) for one in (shorter, longer))
            activations, logits = _along(config.num_hidden_layers, few, next(ends), more, next(ends))
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    masks = rows * stage.length**2 if heard else 0  # the mask that separates the teacher's documents
    return Moment(round(activations) + masks, round(logits))


def _along(
    place: int, first: int, start: tuple[float, float], second: int, end: tuple[float, float]
) -> tuple[float, float]:
    """Extrapolate two values linearly to `place`, from `start` at `first` and `end` at `second`."""
    share = (place - second) / (second - first)
    (a, b), (c, d) = start, end
    return c + (c - a) * share, d + (d - b) * share


def _optimizer_nbytes(stage: Stage, trained: list[nn.Parameter]) -> int:
    """Bytes of the optimizer's state, see `linearize.training.optimizers`."""
    small = any(p.element_size() < 4 for p in trained)
    size = 0
    for parameter in trained:
        count, wide = parameter.numel(), max(parameter.element_size(), 4)
        if small:
            size += 2 * wide * count  # the copy, and its gradient during the step
        if stage.optimizer == "adafactor":
            factors = count // parameter.shape[-1] + count // parameter.shape[-2] if parameter.dim() > 1 else count
            size += wide * factors
        elif stage.optimizer == "adamw8bit" and count >= 4096:
            size += 2 * count
        else:
            size += 2 * wide * count
    return size


def _quantized(model: LinearizedForCausalLM) -> list[Tensor]:
    """The weights that `load_model` holds in 4 bits."""
    blocks = model.get_submodule(family_of(model.config.text_config).blocks)
    named = (pair for block in blocks for pair in block.named_modules())
    return [
        module.weight
        for name, module in named
        if isinstance(module, nn.Linear) and "mixer" not in name.split(".") and "lora" not in name
    ]


def _units(model: Any) -> tuple[int, int]:
    """Bytes of the largest layer, and of the weights outside layers."""
    blocks = model.get_submodule(family_of(getattr(model.config, "text_config", model.config)).blocks)
    sizes = [_nbytes(block.parameters()) for block in blocks]
    return max(sizes), _nbytes(model.parameters()) - sum(sizes)


def _layer_share(model: Any, trained: list[nn.Parameter]) -> int:
    """The maximum bytes of trained parameters in one layer."""
    chosen = {id(p) for p in trained}
    blocks = model.get_submodule(family_of(model.config.text_config).blocks)
    return max(_nbytes(p for p in block.parameters() if id(p) in chosen) for block in blocks)


def stages_memory(config: Any, recipe: Recipe, processes: int) -> list[dict[Engine, TrainingMemory]]:
    """`training_memory` for each stage of `recipe`; `config` is that of its model."""
    return [training_memory(config, recipe, stage, processes=processes) for stage in recipe.stages]


def memory_rows(engines: dict[Engine, TrainingMemory]) -> list[list[str]]:
    """Table rows: each part that is not 0, and the total, with a figure for each engine."""
    rows = []
    parts = [name for name in TrainingMemory.__dataclass_fields__ if name != "cache"]
    for name in (*parts, "total", "cache"):
        sizes = [getattr(memory, name) for memory in engines.values()]
        if any(size != 0 for size in sizes):
            rows.append([name, *("unknown" if size is None else readable_bytes(size) for size in sizes)])
    return [*rows, ["fits (GB)", *(_fit_words(memory) for memory in engines.values())]]


def _fit_words(memory: TrainingMemory) -> str:
    if memory.total is None:
        return "unknown"
    return ", ".join(str(card) for card, fit in memory.fits().items() if fit) or "none"


def _nbytes(parameters: Iterable[nn.Parameter]) -> int:
    held = {id(p): p.numel() * p.element_size() for p in parameters}
    return sum(held.values())
