"""What training takes, told before it starts.

    weights       of the student, frozen ones in their own dtype
    trained       LoRA and the mixers' own parameters, float32, with a gradient of the same size
    optimizer     two moments of each
    teacher       its weights, where the objective asks it
    activations   what the forward pass keeps for the backward pass
    logits        of the student and the teacher with their gradient, B * T * V each, and 64 positions in float32

All but the activations follow from shapes. Activations are counted: the recipe's own model, without data, runs one
micro batch on the meta device, and the bytes that autograd saves are added up, each storage once. They grow linearly
with the tokens of a micro batch, so a long text is counted on its first 1,024 tokens. Libraries, the CUDA context (some
0.5 GB) and what an allocator keeps for itself are not part of it.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from linearize.conversion.convert import convert_model
from linearize.conversion.source import DTYPES
from linearize.evaluation.formatting import readable_bytes
from linearize.training.finetune import add_adapters, choose_trained, wants_teacher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from linearize.recipe import Recipe, Stage

CARDS = (16, 24, 48, 80, 141)
"""GB of the cards that fits are told for."""
_RESERVED = 1_500_000_000  # for the CUDA context, libraries and what the allocator rounds up
_COUNTED_TOKENS = 1024
_CHUNK_TENSORS = 5  # of 64 positions in float32, at the widest place of `token_losses`


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on each GPU while a stage trains.

    Attributes:
        activations: None where they cannot be counted, because what is computed depends on the data.
    """

    weights: int
    trained: int
    optimizer: int
    teacher: int
    activations: int | None
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.optimizer + self.teacher + (self.activations or 0) + self.logits

    def fits(self) -> dict[int, bool | None]:
        """For each of `CARDS` whether it is enough; None where that is not known."""
        known = self.activations is not None
        return {card: self.total + _RESERVED <= card * 10**9 if known else None for card in CARDS}

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total, "fits_gb": {str(card): fit for card, fit in self.fits().items()}}


def training_memory(config: Any, recipe: Recipe, stage: Stage) -> dict[str, TrainingMemory]:
    """What `stage` takes with a model of this configuration, by engine: as the recipe says, on one GPU or on each GPU
    of several (`ddp`), and with the activations of one layer at a time (`checkpointed`).

    Args:
        config: of the pretrained model.
    """
    dtype = DTYPES.get(recipe.dtype) or getattr(config, "dtype", None) or torch.float32
    if not isinstance(dtype, torch.dtype):
        dtype = torch.float32
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(config, dtype=dtype)
    pretrained = _nbytes(teacher.parameters())
    converted = convert_model(teacher.eval(), recipe.mixer)
    student = add_adapters(converted, recipe.lora if stage.train == "lora" else None).train()
    choose_trained(student, stage.train)
    trained = _nbytes(p for p in student.parameters() if p.requires_grad)
    rows = stage.micro_batch
    tokens = rows * stage.length
    asks_teacher = wants_teacher(stage)
    vocabulary = int(config.vocab_size)
    of_logits = tokens * vocabulary * dtype.itemsize * (3 if asks_teacher else 2)
    chunk = _CHUNK_TENSORS * 64 * vocabulary * 4
    counted = min(stage.length, _COUNTED_TOKENS)
    kept: tuple[int | None, int | None] = (None, None)
    try:
        by_layer, others = _saved(student, rows, counted)
    except (RuntimeError, NotImplementedError, ValueError):
        pass  # what is computed depends on the data, as the choice of experts does
    else:
        longer = stage.length / counted
        block = tokens * int(config.hidden_size) * dtype.itemsize
        whole = round((sum(by_layer) + others) * longer)
        kept = (whole, round((max(by_layer) + others) * longer) + len(by_layer) * block)
    engines = {"ddp": kept[1] if stage.gradient_checkpointing else kept[0], "checkpointed": kept[1]}
    return {
        engine: TrainingMemory(
            weights=_nbytes(student.parameters()) - trained,
            trained=2 * trained,
            optimizer=2 * trained,
            teacher=pretrained if asks_teacher else 0,
            activations=activations,
            logits=of_logits + chunk,
        )
        for engine, activations in engines.items()
    }


def memory_lines(engines: dict[str, TrainingMemory]) -> Iterator[str]:
    """A line for each engine, for people."""
    for engine, memory in engines.items():
        parts = {name: size for name, size in asdict(memory).items() if size != 0}
        told = ", ".join(f"{k} {'unknown' if size is None else readable_bytes(size)}" for k, size in parts.items())
        fits = [str(card) for card, fit in memory.fits().items() if fit]
        where = f"fits {', '.join(fits)} GB" if fits else "fits none of the cards that are known"
        where = "what fits is not known" if memory.activations is None else where
        yield f"{engine}: {readable_bytes(memory.total)} per GPU ({told}); {where}"


def _saved(student: Any, rows: int, tokens: int) -> tuple[list[int], int]:
    """Bytes that autograd keeps for each layer, and for the rest of the model."""
    base = student.get_base_model() if hasattr(student, "get_base_model") else student
    blocks = [owner for owner, _ in _attentions(base)]
    own = {p.untyped_storage()._cdata for p in student.parameters()}
    seen: dict[int, Tensor] = {}
    sizes = [0] * (len(blocks) + 1)
    place = [len(blocks)]

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own and key not in seen:
            seen[key] = tensor  # held, or another could be given its place
            sizes[place[0]] += tensor.untyped_storage().nbytes()
        return tensor

    with _places(blocks, place), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
        output = student.get_base_model() if hasattr(student, "get_base_model") else student
        logits = output(input_ids=ids, use_cache=False).logits
    del logits
    return sizes[:-1], sizes[-1]


def _attentions(model: Any) -> list[tuple[Any, str]]:
    from linearize.model.modeling import family_of

    return list(family_of(model.config.text_config).attention_modules(model))


@contextmanager
def _places(blocks: list[Any], place: list[int]) -> Iterator[None]:
    """Keeps in `place` the number of the block that is running, or how many there are between them."""
    hooks = []
    for number, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(lambda *_, number=number: place.__setitem__(0, number)))
        hooks.append(block.register_forward_hook(lambda *_: place.__setitem__(0, len(blocks))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _nbytes(parameters: Any) -> int:
    held = {id(p): p.numel() * p.element_size() for p in parameters}
    return sum(held.values())
