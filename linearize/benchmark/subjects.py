"""The timed models: a converted model and its teacher on the same weights, with caches filled as by a long text."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from linearize.conversion.swap import convert_model
from linearize.families import family_of
from linearize.model import LinearizedForCausalLM, cache_nbytes
from linearize.model.quantized import QuantizedLinear
from linearize.quantization.pairs import PairedLinear

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from linearize.recipe import MixerSpec

# The number of random keys and values; a longer past repeats them, because drawing all would take longer than decoding.
_DRAWN = 4096


@dataclass(frozen=True)
class Subject:
    """One of the timed models.

    Attributes:
        name: `teacher`, `teacher-graph`, `teacher-onednn`, `model` or `int8`.
        weights_bytes: bytes of its parameters and buffers; shared ones count for each model.
        graph: True if a teacher's step is one CUDA graph, see `full_cache`.
    """

    name: str
    model: Any
    converted: bool
    weights_bytes: int
    graph: bool = False

    @classmethod
    def of(cls, name: str, model: Any, *, graph: bool = False) -> Subject:
        return cls(name, model, isinstance(model, LinearizedForCausalLM), _nbytes(model), graph)

    @property
    def base(self) -> Any:
        """The base model's configuration."""
        return self.model.config.text_config if self.converted else self.model.config

    def bytes_per_token(self) -> int:
        """Bytes of one more token in the cache of one sequence."""
        if self.converted:
            return sum(layer.memory_nbytes(self.model.dtype)[1] for layer in self.model.attention_layers)
        layers = family_of(self.base).layers(self.base)
        return sum(
            layer.key_value_heads * (layer.key_width + layer.value_width) * self.model.dtype.itemsize
            for layer in layers
            if layer.window is None
        )

    def needs(self, batch: int, tokens: int) -> int:
        """Approximate bytes of decoding after `tokens` tokens, weights aside: the cache, and the copies of one layer of
        it that a step makes to append to it and to repeat the keys for each query head."""
        layers = family_of(self.base).layers(self.base)
        group = layers[0].query_heads // layers[0].key_value_heads
        whole = batch * tokens * self.bytes_per_token()
        return whole + whole * (1 + 2 * group) // len(layers)

    def step_bytes(self, cache: DynamicCache, batch: int) -> int:
        """The minimum of bytes that a step moves: weights and cache are read, the state is written. Of embeddings that
        are not tied to the output, only the rows of `batch` tokens are read."""
        words = self.model.get_input_embeddings().weight
        tied = words is getattr(self.model.get_output_embeddings(), "weight", None)
        unread = 0 if tied else words.numel() * words.element_size() * max(len(words) - batch, 0) // len(words)
        written = 0
        if self.converted:
            states = [layer.parts.get("state", {}) for layer in cache.layers]
            written = sum(x.numel() * x.element_size() for state in states for x in state.values())
        return self.weights_bytes - unread + self.cache_bytes(cache) + written

    def filled_cache(self, batch: int, tokens: int) -> DynamicCache:
        """A cache of `tokens` tokens with random contents. For a converted model that is its fixed-size memory with the
        counts set."""
        return _filled_memory(self, batch, tokens) if self.converted else _filled_keys(self, batch, tokens)

    def cache_bytes(self, cache: DynamicCache) -> int:
        """Bytes of the whole cache."""
        if self.converted:
            return cache_nbytes(cache)
        return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


class FullLayer(DynamicLayer):
    """A full cache layer: each new token overwrites the last one. A step reads all keys and values, as with a
    preallocated cache, and nothing grows, moves or is masked."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values


def full_cache(cache: DynamicCache) -> DynamicCache:
    """`cache` with `FullLayer`s, to measure a teacher's step without Python overhead and cache copies."""
    full = DynamicCache()
    for layer in cache.layers:
        held = layer
        if type(layer) is DynamicLayer:
            held = FullLayer()
            held.lazy_initialization(layer.keys, layer.values)
            held.keys, held.values = layer.keys, layer.values
        full.layers.append(held)
    return full


def random_teacher(config: Any, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A model of that configuration with small random weights."""
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def converted_from(teacher: PreTrainedModel, spec: MixerSpec) -> LinearizedForCausalLM:
    """The conversion of `teacher`, which does not change; both share the weights."""
    return convert_model(sharing(teacher), spec)


def teacher_beside(model: LinearizedForCausalLM) -> PreTrainedModel:
    """The softmax transformer of `model`'s base configuration, on the weights of `model`."""
    with torch.device("meta"):
        teacher: PreTrainedModel = AutoModelForCausalLM.from_config(
            model.config.text_config, dtype=model.dtype, attn_implementation="sdpa"
        )
    for path, module in list(teacher.named_modules()):
        own = model.get_submodule(path)
        if isinstance(own, QuantizedLinear):  # quantized in the teacher too, because the benchmark compares the mixers
            teacher.set_submodule(path, own)
            continue
        for name in module._parameters:
            module._parameters[name] = own._parameters[name]
        for name in module._buffers:
            module._buffers[name] = own._buffers[name]
    return teacher.eval()


def sharing(model: Any, apart: Callable[[str], bool] = lambda _: False) -> Any:
    """A copy of the modules with the same tensors, except parameters whose name `apart` accepts, which are copied."""
    tensors = [*(p for name, p in model.named_parameters() if not apart(name)), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def cut(model: Any, layers: int) -> None:
    """Keep only the first `layers` layers of a pretrained model."""
    config = model.config
    owner, _, name = family_of(config).blocks.rpartition(".")
    blocks = model.get_submodule(family_of(config).blocks)
    setattr(model.get_submodule(owner), name, nn.ModuleList(blocks[:layers]))
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def _filled_keys(subject: Subject, batch: int, tokens: int) -> DynamicCache:
    cache = DynamicCache(config=subject.base)
    model = subject.model
    for index, layer in enumerate(family_of(subject.base).layers(subject.base)):
        keys, values = (
            _past((batch, layer.key_value_heads, tokens, width), 2, model.dtype, model.device)
            for width in (layer.key_width, layer.value_width)
        )
        cache.update(keys, values, index)
    return cache


def _filled_memory(subject: Subject, batch: int, tokens: int) -> DynamicCache:
    cache = DynamicCache(config=subject.base)
    model = subject.model
    for index, attention in enumerate(model.attention_layers):
        memory = attention.memory(batch, model.dtype, model.device)
        for tensors in memory.parts.values():
            for tensor in tensors.values():
                if tensor.is_floating_point():
                    tensor.uniform_(0.1, 1)  # positive, because states that are sums of masses are never negative
        for name, tensor in memory.past.items():
            memory.past[name] = _past((batch, tokens, *tensor.shape[2:]), 1, tensor.dtype, model.device)
        memory.counts.fill_(tokens)
        memory.seen = tokens
        cache.layers[index] = memory
    return cache


def _past(shape: tuple[int, ...], axis: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers of that shape, repeated along the token axis after `_DRAWN` tokens."""
    tokens = shape[axis]
    drawn = torch.randn(*shape[:axis], min(tokens, _DRAWN), *shape[axis + 1 :], dtype=dtype, device=device)
    if tokens <= _DRAWN:
        return drawn
    repeats = [1] * len(shape)
    repeats[axis] = -(-tokens // _DRAWN)
    return drawn.repeat(repeats).narrow(axis, 0, tokens)


def _nbytes(model: Any) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    sizes: list[int] = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
    return sum(sizes) + sum(module.packed_nbytes for module in model.modules() if isinstance(module, PairedLinear))
