"""Converted models in vLLM: its own model of the base architecture with other attention in the converted layers.

Weights, parallelism, quantisation, adapters and layers that keep softmax stay vLLM's. `LinearizedLlamaForCausalLM` and
the like are derived when they are first looked up; `HybridLinearized...` is the same for models in which a layer keeps
softmax, because vLLM reads that from the class.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.models.utils import PPMissingLayer

from linearize.families import family_of
from linearize.model.mixer.mixer import Mixer
from linearize.vllm.layer import BothPositions, MixedAttention, SplitAttention
from linearize.vllm.pages import Pages
from linearize.vllm.plugin import HYBRID, keeps_softmax
from linearize.vllm.settings import base_model
from linearize.vllm.weights import bare_weights, of_rank

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from linearize.families.base import AttentionLayer
    from linearize.model.configuration import LinearizedConfig, MixerConfig


class LinearizedModel:
    """The front of each derived class; the other base is vLLM's model."""

    has_inner_state: ClassVar[bool] = True
    supports_mamba_prefix_caching: ClassVar[bool] = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        base = config.text_config
        architecture = AutoModelForCausalLM._model_mapping[type(base)]
        inner = vllm_config.with_hf_config(base, architectures=[architecture.__name__])
        super().__init__(vllm_config=inner, prefix=prefix)  # type: ignore[call-arg]
        # Also if the configuration has untied weights: vLLM changes it if the file has an output head.
        self._tied = dict(getattr(architecture, "_tied_weights_keys", None) or {})
        self._own = _install(self, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a converted checkpoint: the mixers' parameters here, everything else by vLLM's model."""
        module: Any = self
        config: LinearizedConfig = module.linearized_config
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        loaded, rank = set[str](), get_tensor_model_parallel_rank()

        def others() -> Iterable[tuple[str, Tensor]]:
            for name, weight in bare_weights(weights, config, self._tied):
                if (place := self._own.get(name)) is None:
                    # A rank of a pipeline has only the mixers of its own layers.
                    if ".mixer." not in name:
                        yield name, weight
                    continue
                mixer, own = place
                parameter = mixer.get_parameter(own)
                parameter.data.copy_(of_rank(mixer, own, weight, rank))
                loaded.add(names[id(parameter)])

        return loaded | set(super().load_weights(others()))  # type: ignore[misc]

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        return ((pages_of(vllm_config).nbytes,),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        return (torch.int8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()

    @classmethod
    def get_mamba_state_copy_funcs(cls, mamba_types: Any) -> Any:
        return dict.fromkeys(mamba_types, cls.get_mamba_state_copy_func())


def _install(model: Any, vllm_config: Any) -> dict[str, tuple[Mixer, str]]:
    """Replace the attention of the converted layers.

    Returns:
        the checkpoint's name of each mixer parameter -> the mixer and its name there.
    """
    config = model.linearized_config = vllm_config.model_config.hf_config
    family, layers, pages = family_of(config.text_config), mixed_layers(vllm_config), pages_of(vllm_config)
    context = vllm_config.compilation_config.static_forward_context
    own: dict[str, tuple[Mixer, str]] = {}
    for index, (owner, name) in enumerate(family.attention_modules(model)):
        if isinstance(owner, PPMissingLayer) or index not in layers:
            continue
        layer, (section, mixed) = family.layer(config.text_config, index), layers[index]
        attention = getattr(owner, name)
        old = attention.attn
        mixer = _mixer(vllm_config, index, section, mixed).float()  # half precision would round trained values
        if vllm_config.parallel_config.tensor_parallel_size > 1 and "score_weight" in mixer._parameters:
            _share_scores(mixer, layer.key_value_heads)
        del context[old.layer_name]
        attention.attn = MixedAttention(mixer, pages, index, old.layer_name, context)
        if section.softmax_heads:
            kept = Attention(
                layer.query_heads - mixed.query_heads,  # no tensor parallelism with kept heads
                layer.key_width,
                layer.scale,
                num_kv_heads=len(section.softmax_heads),
                cache_config=vllm_config.cache_config,
                logits_soft_cap=layer.softcap,
                prefix=f"{old.layer_name}.kept",
            )
            attention.attn = SplitAttention(kept, attention.attn, sorted(section.softmax_heads), layer)
        if layer.rotary:
            attention.rotary_emb = BothPositions(attention.rotary_emb)
        for parameter, _ in mixer.named_parameters():
            own[f"{family.blocks}.{index}.{name}.mixer.{parameter}"] = mixer, parameter
    return own


def _share_scores(mixer: Mixer, heads: int) -> None:
    """Let a mixer of one tensor-parallel rank compute its share of the learned scores of a layer with `heads` heads."""
    columns = mixer.score_weight.shape[1]
    mixer.score_weight = nn.Parameter(mixer.score_weight.new_zeros(heads, columns))
    first = get_tensor_model_parallel_rank() * mixer.layer.key_value_heads

    def sum_of_ranks(scores: Tensor) -> Tensor:
        every: Tensor = tensor_model_parallel_all_reduce(scores)
        return every[..., first : first + mixer.layer.key_value_heads]

    mixer.sum_of_ranks = sum_of_ranks


def mixed_layers(vllm_config: Any) -> dict[int, tuple[MixerConfig, AttentionLayer]]:
    """The number of each converted layer -> its section, and the heads of it that the mixer of one rank has."""
    config, ranks = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
    found = {}
    for index, layer in enumerate(family_of(config.text_config).layers(config.text_config)):
        section = config.mixer_of(index).fitted(layer)
        keys, group = layer.key_value_heads, layer.query_heads // layer.key_value_heads
        mixed = (keys - len(set(section.softmax_heads))) // ranks
        if section.window is not None and mixed:
            found[index] = section, replace(layer, query_heads=mixed * group, key_value_heads=mixed)
    return found


def pages_of(vllm_config: Any) -> Pages:
    """The places of the layers' memories of one sequence, on one tensor-parallel rank."""
    meta, dtype, memories = torch.device("meta"), vllm_config.model_config.dtype, {}
    for index, (section, mixed) in mixed_layers(vllm_config).items():
        with meta:
            memories[index] = _mixer(vllm_config, index, section, mixed).parts(1, dtype, meta)
    # vLLM has several tables of pages if some layers keep softmax. A rank of a pipeline has only its own layers' pages.
    alone = keeps_softmax(vllm_config.model_config.hf_config) or vllm_config.parallel_config.pipeline_parallel_size > 1
    return Pages(memories, shared=not alone)


def _mixer(vllm_config: Any, index: int, section: MixerConfig, heads: AttentionLayer) -> Mixer:
    depth = max(vllm_config.model_config.hf_config.text_config.num_hidden_layers - 1, 1)
    return Mixer(section, heads, index / depth)


@cache
def _derive(architecture: str) -> type[LinearizedModel]:
    # vLLM needs a class before it calls `Settings`, which refuses an architecture that vLLM lacks.
    base = (base_model(architecture) or base_model("LlamaForCausalLM")).load_model_cls()
    kind = {"is_hybrid": True} if architecture.startswith(HYBRID) else {"is_attention_free": True}
    return type(architecture, (LinearizedModel, base), {"__module__": __name__, **kind})


def __getattr__(name: str) -> type[LinearizedModel]:
    if "Linearized" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _derive(name)
