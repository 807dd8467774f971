"""What training takes, told before it starts, on one GPU or on each of several.

    weights       of the student: frozen ones in their own dtype, trained ones too
    gradients     of what is trained, in its dtype
    optimizer     its moments, and float32 copies of what is trained in less
    teacher       its weights, where the objective asks it
    activations   what a forward and a backward pass have at their fullest moment, at most a layer's own work included
    logits        of the student, the teacher and their gradients at that moment
    gathered      what an engine puts together or copies: a layer's weights, all gradients

Activations and logits are counted by a rehearsal without data, see `linearize.training.rehearsal`: exactly on few
tokens, of which there are two numbers, and along the line through these for more. All else
follows from shapes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoModelForCausalLM

from linearize.conversion.convert import convert_model
from linearize.conversion.source import DTYPES
from linearize.evaluation.formatting import readable_bytes
from linearize.model.modeling import family_of
from linearize.training.finetune import add_adapters, choose_trained, wants_teacher
from linearize.training.rehearsal import Moment, fullest_moment

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from linearize.recipe import Recipe, Stage

Engine = Literal["single", "ddp", "fsdp2", "zero3"]
ENGINES: tuple[Engine, ...] = ("single", "ddp", "fsdp2", "zero3")
CARDS = (16, 24, 48, 80, 141)
"""GB of the cards that fits are told for."""

_CONTEXT = 1_000_000_000  # what the driver, CUDA's libraries and NCCL hold on a GPU before anything is put there
_COUNTED = 512
# DeepSpeed's own default for stage 3: parameters that it keeps gathered at a time.
_ZERO3_LIVE = 1_000_000_000


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on each GPU while a stage trains, at its fullest moment.

    Attributes:
        activations, logits: None where they cannot be counted, because what is computed depends on the data.
        cache: of as many sequences as a micro batch has rows, each as long as one, when the trained model generates;
            not part of the total.
    """

    weights: int
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
        held = self.weights + self.gradients + self.optimizer + self.teacher + self.gathered
        return held + self.activations + self.logits

    def fits(self) -> dict[int, bool | None]:
        """For each of `CARDS` whether it is enough; None where that is not known."""
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
    """What `stage` takes with a model of this configuration, by engine.

    Args:
        config: of the pretrained model.
        processes: GPUs, for the engines that have several.
        checkpointing: instead of the stage's own `gradient_checkpointing`.
        position_ids: `[micro_batch, length]` of packed documents; None takes each row to be one. In plain torch rows
            of several documents take as much as if each of these were as long as the longest.
    """
    dtype = DTYPES.get(recipe.dtype) or getattr(config, "dtype", None) or torch.float32
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    with torch.device("meta"):
        teacher, base = (AutoModelForCausalLM.from_config(config, dtype=dtype).eval() for _ in range(2))
    converted = convert_model(base, recipe.mixer)
    converted.requires_grad_(False)
    teacher.requires_grad_(False)
    student = add_adapters(converted, recipe.lora if stage.train == "lora" else None).train()
    choose_trained(student, stage.train)
    asked = wants_teacher(stage)
    beside = asked and stage.teacher_at == "device"
    moment = _moment(
        student, teacher if asked and stage.teacher_at != "disk" else None, stage, checkpointing, position_ids
    )
    trained = [p for p in student.parameters() if p.requires_grad]
    weights, gradients = _nbytes(student.parameters()), _nbytes(trained)
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
            "ddp": gradients,  # the buckets that are summed over processes
            # What is outside of layers stays gathered from the forward to the backward pass; of layers the one at
            # work and the next, and the gradients of one on their way.
            "fsdp2": sum(outside + 2 * layer for layer, outside in (layers, teachers))
            + 2 * _layer_share(converted, trained),
            "zero3": sum(
                min(_nbytes(model.parameters()), _ZERO3_LIVE * dtype.itemsize)
                for model in (student, *([teacher] if beside else []))
            ),
        }[engine]
        shared_teacher = math.ceil(pretrained / parts) if beside else pretrained
        found[engine] = TrainingMemory(
            weights=math.ceil(weights / parts),
            gradients=math.ceil(gradients / parts),
            optimizer=math.ceil(optimizer / parts),
            teacher=shared_teacher,
            activations=None if moment is None else moment.activations,
            logits=None if moment is None else moment.logits,
            gathered=gathered,
            cache=cache,
        )
    return found


def _moment(
    student: Any, teacher: Any, stage: Stage, checkpointing: bool | None, position_ids: Tensor | None
) -> Moment | None:
    """The fullest moment of a step, without the gradients that are complete; None where that depends on the data."""
    wanted = stage.gradient_checkpointing if checkpointing is None else checkpointing
    rows = stage.micro_batch
    accumulates = stage.batch_tokens > rows * stage.length

    def counted(tokens: int) -> Moment:
        return fullest_moment(
            student,
            teacher,
            stage,
            rows=rows,
            tokens=tokens,
            accumulates=accumulates,
            checkpointing=wanted,
            position_ids=position_ids,
        )

    masks = rows * stage.length**2 if teacher is not None else 0  # which documents the teacher's tokens may see
    try:
        if stage.length <= _COUNTED or position_ids is not None:
            found = counted(stage.length)
            return Moment(found.activations + masks, found.logits)
        half, whole = counted(_COUNTED // 2), counted(_COUNTED)
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    steps = (stage.length - _COUNTED) / (_COUNTED - _COUNTED // 2)
    activations, logits = (
        round(end + (end - start) * steps)
        for start, end in ((half.activations, whole.activations), (half.logits, whole.logits))
    )
    return Moment(activations + masks, logits)


def _optimizer_nbytes(stage: Stage, trained: list[nn.Parameter]) -> int:
    """What the optimizer keeps of each parameter, see `linearize.training.optimizers`."""
    small = any(p.element_size() < 4 for p in trained)
    size = 0
    for parameter in trained:
        count, wide = parameter.numel(), max(parameter.element_size(), 4)
        if small:
            size += 2 * wide * count  # a copy, and its gradient while it steps
        if stage.optimizer == "adafactor":
            factors = count // parameter.shape[-1] + count // parameter.shape[-2] if parameter.dim() > 1 else count
            size += wide * factors
        elif stage.optimizer == "adamw8bit" and count >= 4096:
            size += 2 * count
        else:
            size += 2 * wide * count
    return size


def _units(model: Any) -> tuple[int, int]:
    """Bytes of the largest layer, and of all that is in no layer."""
    blocks = model.get_submodule(family_of(getattr(model.config, "text_config", model.config)).blocks)
    sizes = [_nbytes(block.parameters()) for block in blocks]
    return max(sizes), _nbytes(model.parameters()) - sum(sizes)


def _layer_share(model: Any, trained: list[nn.Parameter]) -> int:
    """Bytes of what is trained in the layer that has most of it."""
    chosen = {id(p) for p in trained}
    blocks = model.get_submodule(family_of(model.config.text_config).blocks)
    return max(_nbytes(p for p in block.parameters() if id(p) in chosen) for block in blocks)


def memory_rows(engines: dict[Engine, TrainingMemory]) -> tuple[list[str], list[list[str]]]:
    """A table for people: its head, and a row for each engine."""
    parts = [name for name in TrainingMemory.__dataclass_fields__ if name != "cache"]
    used = [name for name in parts if any(getattr(memory, name) != 0 for memory in engines.values())]
    head = ["engine", *used, "total", "cache", "fits"]
    rows = []
    for engine, memory in engines.items():
        sizes = [*(getattr(memory, name) for name in used), memory.total, memory.cache]
        rows.append([engine, *("unknown" if x is None else readable_bytes(x) for x in sizes), fit_words(memory)])
    return head, rows


def fit_words(memory: TrainingMemory) -> str:
    """Which of `CARDS` are enough, for people."""
    if memory.total is None:
        return "not known"
    enough = [str(card) for card, fit in memory.fits().items() if fit]
    return f"{', '.join(enough)} GB" if enough else f"none of {', '.join(map(str, CARDS))} GB"


def _nbytes(parameters: Iterable[nn.Parameter]) -> int:
    held = {id(p): p.numel() * p.element_size() for p in parameters}
    return sum(held.values())
