"""The converted model: a transformers causal LM with replaced attention modules.

`LinearizedForCausalLM` is the front. For each base architecture it derives one class, a subclass of both
`LinearizedForCausalLM` and the base class, such as `LlamaForCausalLM`. Weights keep the base model's names; tied
embeddings, tensor-parallel plans, gradient checkpointing and `generate` are the base model's own.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from linearize_kernels.products import take_products
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from linearize.families import family_of
from linearize.model.attention import LinearizedAttention
from linearize.model.configuration import LinearizedConfig, MixerConfig
from linearize.model.layout import layer_mask, segments_of
from linearize.model.memory import LayerMemory
from linearize.model.mixer.mixer import Mixer
from linearize.model.positions import renew_rotary, settle_rotary
from linearize.model.quantized import Quantization, install

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers.cache_utils import Cache


class LinearizedForCausalLM(PreTrainedModel, GenerationMixin):
    """A converted language model; construct it with `from_pretrained` or `from_teacher`."""

    config: LinearizedConfig
    config_class = LinearizedConfig
    # `generate` refuses assisted decoding for stateful models; a recurrent state cannot be rolled back.
    _is_stateful = True
    # Half precision would round away the small updates of the mixers' parameters.
    _keep_in_fp32_modules_strict = ("mixer",)
    # The name of the base model's cache argument, from the signature of its `forward`.
    _cache_name: str
    # Phi-3 overrides this to drop the cache when its rotary table changes; a converted model has one table.
    prepare_inputs_for_generation = GenerationMixin.prepare_inputs_for_generation

    def __init__(self, config: LinearizedConfig, *args: Any, **kwargs: Any) -> None:
        if type(self) is LinearizedForCausalLM:
            raise TypeError("build a converted model with from_pretrained, from_config or from_teacher")
        self.__dict__["_outer_config"] = config  # read by post_init, which the base model's __init__ calls
        super().__init__(config.text_config, *args, **kwargs)

    def post_init(self) -> None:
        self._install(self.__dict__.pop("_outer_config"))
        super().post_init()

    def _install(self, config: LinearizedConfig) -> None:
        """Replace each attention module that `config` names by a `LinearizedAttention`."""
        base: Any = config.text_config
        family = family_of(base)
        layers = family.layers(base)
        for index, (owner, name) in enumerate(family.attention_modules(self)):
            mixer = config.mixer_of(index)
            try:
                depth = index / max(len(layers) - 1, 1)
                attention = LinearizedAttention(getattr(owner, name), family, layers[index], mixer, index, depth)
            except ValueError as error:
                raise ValueError(f"layer {index}: {error}") from error
            setattr(owner, name, attention)
        self.config = config
        # Base classes set it from `text_config`, which names no checkpoint. peft records it as an adapter's base.
        self.name_or_path = config.name_or_path
        if config.quantized:
            install(self, Quantization(**config.quantized))
        take_products(self)

    @property
    def attention_layers(self) -> list[LinearizedAttention]:
        """The `LinearizedAttention` modules, first layer first."""
        return [module for module in self.modules() if isinstance(module, LinearizedAttention)]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Set every parameter that no checkpoint loaded to its initial value."""
        # Not in `_init_weights`, because transformers calls the base model's own for modules inside the base model.
        for module in self.modules():
            if isinstance(module, Mixer):
                for name, value in module.initial_values().items():
                    init.copy_(module.get_parameter(name), value)
        super().initialize_weights()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> LinearizedForCausalLM:
        """`PreTrainedModel.from_pretrained` for a converted checkpoint."""
        if cls is not LinearizedForCausalLM and cls.__bases__[0] is LinearizedForCausalLM:
            model: LinearizedForCausalLM = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            return model
        config = kwargs.pop("config", None)
        if config is None:
            config = LinearizedConfig.from_pretrained(pretrained_model_name_or_path)
        return derived_class(cls, config).from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: LinearizedConfig, **kwargs: Any) -> LinearizedForCausalLM:
        """The implementation of `AutoModelForCausalLM.from_config`: random weights."""
        if cls.__bases__[0] is LinearizedForCausalLM:
            model: LinearizedForCausalLM = super()._from_config(config, **kwargs)
            return model
        return derived_class(cls, config)._from_config(config, **kwargs)

    @classmethod
    def from_teacher(cls, teacher: PreTrainedModel, mixers: Sequence[MixerConfig]) -> LinearizedForCausalLM:
        """Convert `teacher` in place: no weight is copied, and the teacher must not be used afterwards.

        A converted model is converted again from its pretrained architecture. Rotary tables that depend on the length
        of a text become one table, see `settle_rotary`.

        Raises:
            ValueError: the architecture is not supported, or a mixer section names a layer that does not exist.
        """
        base = teacher.config.text_config if isinstance(teacher, LinearizedForCausalLM) else teacher.config
        family = family_of(base)
        layers = family.layers(base)
        for mixer in mixers:
            if any(index not in range(len(layers)) for index in mixer.layers):
                raise ValueError(f"the model has layers 0 to {len(layers) - 1}; the mixer names {mixer.layers}")
            for index in mixer.layers:
                Mixer.check(mixer.fitted(layers[index]), layers[index])  # before the teacher is changed
        if settle_rotary(base):
            renew_rotary(teacher, base)
        config = LinearizedConfig(text_config=base, mixers=[asdict(mixer) for mixer in mixers], dtype=teacher.dtype)
        model: Any = teacher
        model.__class__ = derived_class(cls, config)
        # The renaming rules of the teacher's files; a converted checkpoint is read by other rules.
        model.__dict__.pop("_weight_conversions", None)
        model._install(config)
        for owner, name in family.attention_modules(model):
            attention = getattr(owner, name)
            attention.to(next(attention.parameters()).device)
            attention.train(teacher.training)
        assert isinstance(model, cls)  # noqa: S101 - for the type checker
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute logits as the base model does; since transformers 5.24 `past_key_values` is called `cache`.

        Pads (mask 0) may be on either side and change nothing. Without a mask and without a cache to continue, rows
        whose `position_ids` restart are packed documents: they do not attend to each other, and no cache is made.

        Raises:
            ValueError: attention weights are requested, the mask has another form, or packed rows would need a cache.
            RuntimeError: this version of transformers passes its cache under an unknown name.
        """
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise ValueError("a converted model has no attention weights to return; leave output_attentions out")
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("give input_ids or inputs_embeds")
        batch, tokens = given.shape[0], given.shape[1]
        if isinstance(attention_mask, dict) or (attention_mask is not None and not _tells_pads(attention_mask, tokens)):
            raise ValueError("a converted model takes an attention mask [batch, tokens] that tells pads, and no other")
        if use_cache is None and self.training:
            use_cache = False
        cache = past_key_values if cache is None else cache
        memory = _first_memory(cache)
        continued = tokens > 1 and memory is not None and memory.seen > 0
        segments = segments_of(attention_mask, position_ids, batch, tokens, continued)
        if attention_mask is None and segments is not None:
            # A memory has one row per row of the batch; packed documents would need more.
            if use_cache or cache is not None:
                raise ValueError("position_ids restart, so the rows are packed documents, which no cache can continue")
            use_cache = False
        if position_ids is None and segments is not None:
            past = memory.counts[:, None] if memory else 0
            position_ids = (segments.cumsum(1) - 1).clamp_min(0) + past
        elif position_ids is None and memory is not None:
            position_ids = memory.counts[:, None] + torch.arange(tokens, device=memory.counts.device)
        if kwargs.get("output_router_logits") or getattr(self.config, "output_router_logits", False):
            # The load-balancing loss of experts counts tokens by this mask, so it must be full and of 0 and 1 only.
            segments = (
                torch.ones(batch, tokens, dtype=torch.long, device=given.device) if segments is None else segments
            )
            if bool((segments > 1).any()):
                raise ValueError("output_router_logits does not go with packed rows; give one document per row")
        # Base models pass a 4-dimensional mask to their layers unchanged. Ours covers the new tokens only, so it is not
        # quadratic and does not grow with the context.
        attention_mask = layer_mask(segments, given.device)
        kwargs[self._cache_name] = cache
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        held = getattr(output, self._cache_name, None)
        if held is not None and _first_memory(held) is None:
            # Layers ignore unknown arguments, so without a cache each token would be processed as the first one.
            raise RuntimeError(
                f"transformers {transformers.__version__} hands its cache to layers under a name that is not known "
                "here; take an earlier version of it, or a later one of linearize"
            )
        return output

    @staticmethod
    def create_masks_for_generate(inputs_embeds: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """The mask that `generate` passes to `forward` for a static cache. It covers the new tokens only, so its shape
        does not grow."""
        tokens = inputs_embeds.shape[1]
        real = None if attention_mask is None else (attention_mask[:, -tokens:] != 0).long()
        return layer_mask(real, inputs_embeds.device)

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Not supported: continuous batching pages keys and values, which a converted model does not keep.

        Raises:
            ValueError: always.
        """
        raise ValueError("continuous batching is not supported by converted models; use generate with a padded batch")

    generate_batch = continuous_batching_context_manager = init_continuous_batching


@cache
def _derive(front: Any, base: Any) -> type[LinearizedForCausalLM]:
    # The name contains the base architecture's, because transformers finds the loss function by it, for example.
    name = f"Linearized{base.__name__}"
    known = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
    # `pipeline` and `Trainer` (label smoothing) recognise a causal LM by its class name in the values of this table.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"{LinearizedConfig.model_type}:{base.__name__}"] = name
    return type(name, (front, base), {"__module__": front.__module__, "_cache_name": known})


if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[LinearizedForCausalLM]:
        """The derived class of this name; pickles and checkpoints of `save_pretrained` refer to it by name."""
        base = getattr(transformers, name.removeprefix("Linearized"), None) if name.startswith("Linearized") else None
        if base is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return _derive(LinearizedForCausalLM, base)


def derived_class(front: type[LinearizedForCausalLM], config: LinearizedConfig) -> type[LinearizedForCausalLM]:
    """The class of a converted model of `config`'s base architecture."""
    family_of(config.text_config)
    return _derive(cast("Any", front), AutoModelForCausalLM._model_mapping[type(config.text_config)])


def _tells_pads(attention_mask: Tensor, tokens: int) -> bool:
    ours = attention_mask.dtype == torch.long and attention_mask.shape[1:-1] == (1, 1)
    return attention_mask.dim() == 2 or (attention_mask.dim() == 4 and ours and attention_mask.shape[-1] in (0, tokens))


def _first_memory(past_key_values: Cache | None) -> LayerMemory | None:
    layers = past_key_values.layers if past_key_values is not None else []
    return next((layer for layer in layers if isinstance(layer, LayerMemory)), None)


# A copy in a checkpoint has another module name and registers nothing: transformers finds it by `auto_map`.
if __name__ == "linearize.model.modeling":
    AutoModelForCausalLM.register(LinearizedConfig, LinearizedForCausalLM, exist_ok=True)
