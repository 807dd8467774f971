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
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.models.utils import PPMissingLayer

from linearize.families import family_of
from linearize.model.mixer.mixer import Mixer
from linearize.vllm.layer import BothPositions, MixedAttention, SplitAttention
from linearize.vllm.pages import Page
from linearize.vllm.plugin import HYBRID
from linearize.vllm.settings import base_model
from linearize.vllm.weights import bare_weights

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
                if (parameter := self._own.get(name)) is None:
                    # A rank of a pipeline has only the mixers of its own layers.
                    if ".mixer." not in name:
                        yield name, weight
                    continue
                heads = parameter.shape[0]  # query heads or key/value heads, of this rank alone
                parameter.data.copy_(weight[rank * heads : (rank + 1) * heads])
                loaded.add(names[id(parameter)])

        return loaded | set(super().load_weights(others()))  # type: ignore[misc]

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        return ((page_nbytes(vllm_config),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        return (torch.int8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()

    @classmethod
    def get_mamba_state_copy_funcs(cls, mamba_types: Any) -> Any:
        return dict.fromkeys(mamba_types, cls.get_mamba_state_copy_func())


def _install(model: Any, vllm_config: Any) -> dict[str, nn.Parameter]:
    """Replace the attention of the converted layers.

    Returns:
        the checkpoint's name of each mixer parameter -> the parameter.
    """
    config = model.linearized_config = vllm_config.model_config.hf_config
    family, nbytes = family_of(config.text_config), page_nbytes(vllm_config)
    context = vllm_config.compilation_config.static_forward_context
    own: dict[str, nn.Parameter] = {}
    depth = max(config.text_config.num_hidden_layers - 1, 1)
    for index, (owner, name) in enumerate(family.attention_modules(model)):
        if isinstance(owner, PPMissingLayer):
            continue
        layer = family.layer(config.text_config, index)
        section = config.mixer_of(index).fitted(layer)
        if section.window is None or len(set(section.softmax_heads)) == layer.key_value_heads:
            continue
        attention = getattr(owner, name)
        old = attention.attn
        heads = replace(layer, query_heads=old.num_heads, key_value_heads=old.num_kv_heads)
        mixed = _mixed(section, heads)
        mixer = Mixer(section, mixed, index / depth).float()  # half precision would round trained values
        page = Page(mixer.parts(1, vllm_config.model_config.dtype, torch.device("meta")))
        del context[old.layer_name]
        attention.attn = MixedAttention(mixer, page, nbytes, old.layer_name, context)
        if section.softmax_heads:
            kept = Attention(
                layer.query_heads - mixed.query_heads,
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
        for parameter_name, parameter in mixer.named_parameters():
            own[f"{family.blocks}.{index}.{name}.mixer.{parameter_name}"] = parameter
    return own


def _mixed(section: MixerConfig, heads: AttentionLayer) -> AttentionLayer:
    """The heads of a layer that the mixer has."""
    mixed, group = heads.key_value_heads - len(section.softmax_heads), heads.query_heads // heads.key_value_heads
    return replace(heads, query_heads=mixed * group, key_value_heads=mixed)


def page_nbytes(vllm_config: Any) -> int:
    """Bytes of the largest layer's memory of one sequence, on one tensor-parallel rank."""
    config, ranks = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
    family, largest, meta = family_of(config.text_config), 0, torch.device("meta")
    for index in range(config.text_config.num_hidden_layers):
        layer = family.layer(config.text_config, index)
        section = config.mixer_of(index).fitted(layer)
        if section.window is not None and len(set(section.softmax_heads)) < layer.key_value_heads:
            heads = replace(
                layer, query_heads=layer.query_heads // ranks, key_value_heads=layer.key_value_heads // ranks
            )
            with meta:
                parts = Mixer(section, _mixed(section, heads)).parts(1, vllm_config.model_config.dtype, meta)
            largest = max(largest, Page(parts).nbytes)
    return largest


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
