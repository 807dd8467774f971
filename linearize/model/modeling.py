"""The converted model: a transformers causal LM whose attention modules were replaced, and nothing else.

`LinearizedForCausalLM` stands in front. For each base architecture it derives one class, which is both a
`LinearizedForCausalLM` and, say, a `LlamaForCausalLM`: weights keep the base model's names, and tied embeddings,
tensor-parallel plans, gradient checkpointing and `generate` are the base model's own.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init

from linearize.families import FAMILIES, Family
from linearize.model.attention import LinearizedAttention, Mixer
from linearize.model.configuration import LinearizedConfig, MixerConfig
from linearize.model.layout import segments_of
from linearize.model.memory import LayerMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers.cache_utils import Cache


class LinearizedForCausalLM(PreTrainedModel, GenerationMixin):
    """A converted language model; see `from_pretrained` and `from_teacher`."""

    config: LinearizedConfig
    config_class = LinearizedConfig
    # A recurrent state cannot be rolled back, so assisted decoding must be refused by generate().
    _is_stateful = True
    # The few own parameters are small and take small updates: half precision would swallow them.
    _keep_in_fp32_modules_strict = ("mixer",)

    def __init__(self, config: LinearizedConfig, *args: Any, **kwargs: Any) -> None:
        if type(self) is LinearizedForCausalLM:
            raise TypeError("build a converted model with from_pretrained, from_config or from_teacher")
        self.__dict__["_outer_config"] = config  # read by post_init, which the base model's __init__ calls
        super().__init__(config.text_config, *args, **kwargs)

    def post_init(self) -> None:
        self._install(self.__dict__.pop("_outer_config"))
        super().post_init()

    def _install(self, config: LinearizedConfig) -> None:
        """Puts a `LinearizedAttention` in the place of every attention that `config` names."""
        base: Any = config.text_config
        family = family_of(base)
        heads = family.heads(base)
        for layer, (owner, name) in enumerate(family.attention_modules(self)):
            mixer = config.mixer_of(layer)
            if mixer is not None:
                attention = LinearizedAttention(getattr(owner, name), family, mixer, heads, layer)
                setattr(owner, name, attention)
        self.config = config

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mixer):
            for name, value in module.initial_values().items():
                init.constant_(module.get_parameter(name), value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> LinearizedForCausalLM:
        """As `PreTrainedModel.from_pretrained`, for a converted checkpoint."""
        if cls is not LinearizedForCausalLM and cls.__bases__[0] is LinearizedForCausalLM:
            model: LinearizedForCausalLM = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            return model
        config = kwargs.pop("config", None)
        if config is None:
            config = LinearizedConfig.from_pretrained(pretrained_model_name_or_path)
        return derived_class(cls, config).from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: LinearizedConfig, **kwargs: Any) -> LinearizedForCausalLM:
        """What `AutoModelForCausalLM.from_config` calls: random weights."""
        if cls.__bases__[0] is LinearizedForCausalLM:
            model: LinearizedForCausalLM = super()._from_config(config, **kwargs)
            return model
        return derived_class(cls, config)._from_config(config, **kwargs)

    @classmethod
    def from_teacher(cls, teacher: PreTrainedModel, mixers: Sequence[MixerConfig]) -> LinearizedForCausalLM:
        """Converts `teacher` where it stands: no weight is copied, and the teacher must not be used afterwards.

        Raises:
            ValueError: the architecture is not supported, or a mixer section names a layer that is not there.
        """
        base = teacher.config
        layers = len(family_of(base).attention_modules(teacher))
        for mixer in mixers:
            if any(layer not in range(layers) for layer in mixer.layers):
                raise ValueError(f"the model has layers 0 to {layers - 1}; the mixer names {mixer.layers}")
        config = LinearizedConfig(text_config=base, mixers=[asdict(mixer) for mixer in mixers], dtype=teacher.dtype)
        model: Any = teacher
        model.__class__ = derived_class(cls, config)
        model._install(config)
        for layer in range(layers):
            owner, name = family_of(base).attention_modules(model)[layer]
            attention = getattr(owner, name)
            if isinstance(attention, LinearizedAttention):
                attention.mixer.to(next(attention.parameters()).device)
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
        **kwargs: Any,
    ) -> Any:
        """As the base model's. Pads (mask 0) may stand on either side and change nothing; rows whose positions
        restart are packed documents and do not see each other, as long as no mask is given and no cache continued."""
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                "a converted model takes an attention mask [batch, tokens] that tells pads; other masks, and the "
                "static cache that makes them, are not supported"
            )
        shape = input_ids.shape if input_ids is not None else inputs_embeds.shape  # type: ignore[union-attr]
        batch, tokens = shape[0], shape[1]
        if use_cache is None and self.training:
            use_cache = False
        memory = _first_memory(past_key_values)
        segments = segments_of(attention_mask, position_ids, batch, tokens, memory is not None and memory.seen > 0)
        if position_ids is None and segments is not None:
            past = memory.counts[:, None] if memory else 0
            position_ids = (segments.cumsum(1) - 1).clamp_min(0) + past
        elif position_ids is None and memory is not None:
            position_ids = memory.counts[:, None] + torch.arange(tokens, device=memory.counts.device)
        # Base models hand a mask of four dimensions through to their layers as it is. Ours speaks of the new
        # tokens only, so that nothing quadratic, and nothing that grows with the context, is ever made.
        device = self.device if input_ids is None else input_ids.device
        attention_mask = (
            torch.ones(1, 1, 1, 0, dtype=torch.long, device=device) if segments is None else segments[:, None, None, :]
        )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


@cache
def _derive(front: Any, base: Any) -> type[LinearizedForCausalLM]:
    # The name keeps the base architecture's, by which transformers finds the loss function among other things.
    return type(f"Linearized{base.__name__}", (front, base), {"__module__": front.__module__})


def derived_class(front: type[LinearizedForCausalLM], config: LinearizedConfig) -> type[LinearizedForCausalLM]:
    """The class of a converted model of `config`'s base architecture."""
    family_of(config.text_config)
    return _derive(cast("Any", front), AutoModelForCausalLM._model_mapping[type(config.text_config)])


def family_of(config: Any) -> Family:
    """The family of a base configuration.

    Raises:
        ValueError: no family covers it, or the family refuses this configuration.
    """
    model_type = getattr(config, "model_type", "unknown")
    if model_type not in FAMILIES:
        raise ValueError(f"architecture {model_type!r} is not supported; there are: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[model_type]
    if (reason := family.refusal(config)) is not None:
        raise ValueError(f"this {model_type} model cannot be converted: {reason}")
    return family


def register() -> None:
    """Makes transformers' auto classes load converted checkpoints."""
    AutoConfig.register(LinearizedConfig.model_type, LinearizedConfig, exist_ok=True)
    AutoModelForCausalLM.register(LinearizedConfig, LinearizedForCausalLM, exist_ok=True)


def _first_memory(past_key_values: Cache | None) -> LayerMemory | None:
    layers = past_key_values.layers if past_key_values is not None else []
    return next((layer for layer in layers if isinstance(layer, LayerMemory)), None)
