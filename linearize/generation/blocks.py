"""One token a row through a decoder block in few launches, for the step that a CUDA graph records.

    norm · q, k, v as one product · heads and positions · mixer · output product · residual and norm
         · gate and up as one product · activation · down product, added to the residual where it lies

A block computes what the base model's own does. On a GPU each one is tried against it before its first use; one that
differs runs the base model's own code, as all do outside of the recorded step.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import torch
from linearize_kernels import choose, say_once
from linearize_kernels.block import HeadNorms, Norm, activated, residual_norm, turned_heads
from linearize_kernels.products import product
from torch import Tensor, nn
from transformers import DynamicCache

from linearize.families.base import Projections, side_by_side
from linearize.generation.statefile import empty_memories
from linearize.model.attention import LinearizedAttention, lengths_of
from linearize.model.mixer.fused import fused_step, fuses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from linearize_kernels.block import Activation

    from linearize.model import LinearizedForCausalLM

_ACTIVATIONS: dict[str, Activation] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
}
_STEPS, _ROWS = 3, 2
# Of the largest change that a block makes, in a trial: far above rounding errors, far below the effect of a fault. Base
# models norm in float32, also in float64.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}
_HALF_TOLERANCE = 4e-2


class Blocks:
    """The short blocks of a model. As a context manager it makes the model's layers run them.

    Args:
        fused: False runs the same steps in plain torch.

    Attributes:
        short: layer -> its short block.
        refused: the reason -> the number of layers that run the base model's own code for it.
    """

    def __init__(self, model: Any, *, fused: bool) -> None:
        converted = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.short, self.refused = dict[nn.Module, _Block](), Counter[str]()
        for attention in converted.attention_layers:
            owner = next(x for x, name in _owners(converted, attention) if getattr(x, name) is attention)
            reason = _refusal(owner, attention)
            if reason is None:
                self.short[owner] = _Block(owner, attention, fused=fused)
            else:
                self.refused[reason] += 1

    def __enter__(self) -> Blocks:
        for layer, block in self.short.items():
            layer.__dict__["forward"] = block
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self.short:
            layer.__dict__.pop("forward", None)


def _owners(model: Any, attention: LinearizedAttention) -> Iterator[tuple[nn.Module, str]]:
    return iter(attention.family.attention_modules(model))


def blocks_of(model: Any) -> Blocks | None:
    """The blocks that the recorded step of `model` runs; None if it runs the base model's own code."""
    dtype = next(model.parameters()).dtype
    if choose("block", model.device, dtype) != "triton":
        return None
    blocks = Blocks(model, fused=True)
    for layer, error in _distances(model, blocks):
        if error is not None:
            del blocks.short[layer]
            blocks.refused[error] += 1
    for reason, count in blocks.refused.items():
        say_once(f"{count} layers decode in more launches, which is slower: {reason}")
    return blocks if blocks.short else None


class _Block:
    """One layer.

    Args:
        layer: the base model's decoder layer, of which `attention` is a part.
    """

    def __init__(self, layer: nn.Module, attention: LinearizedAttention, *, fused: bool) -> None:
        family: Any = attention.family
        self.attention, self.fused, self.family = attention, fused, family
        self.norms = [_norm_of(getattr(layer, name, None) if name else None) for name in family.norms]
        self.parallel = self.norms[0] is not None and self.norms[2] is None
        self.factor = float(getattr(layer, "residual_multiplier", 1.0))
        self.mlp: Any = layer.mlp
        self.activation = _activation_of(self.mlp)
        self.head_norms, self.raw = _head_norms(attention)

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **_: Any,
    ) -> Tensor:
        before_attention, after_attention, before_network, after_network = self.norms
        x, fused, factor = hidden_states.squeeze(1), self.fused, self.factor
        h, y = residual_norm(x, None, before=before_attention, copies=self.parallel, fused=fused)
        heads = self._mixed(y, position_embeddings, attention_mask, (cache, past_key_values, layer_past))
        output = getattr(self.attention, self.family.projections["o"])
        if self.parallel:
            h = self._added(h, heads, output, None)
            return self._added(h, *self._network(y), None).unsqueeze(1)
        h, y = residual_norm(h, output(heads), after=after_attention, before=before_network, factor=factor, fused=fused)
        return self._added(h, *self._network(y), after_network).unsqueeze(1)

    def _added(self, h: Tensor, x: Tensor, module: Any, after: Norm | None) -> Tensor:
        """h + factor * after(module(x)); `h` may be changed in place. Without a module, x itself is added."""
        if module is not None and after is None and (weight := side_by_side([module])) is not None:
            return h.addmm_(x, weight.t(), alpha=self.factor)
        change = x if module is None else module(x)
        return residual_norm(h, change, after=after, factor=self.factor, fused=self.fused)[0]

    def _mixed(
        self,
        y: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        caches: tuple[Any, ...],
    ) -> Tensor:
        """The heads `[B, H V]` of the attention to `y` `[B, N]`, before their output projection."""
        attention, layer = self.attention, self.attention.layer
        (q, k, v), biases = self._projected(y)
        memory = attention.memory_in(caches, len(y), v)
        lengths = None if attention_mask is None or attention_mask.numel() == 0 else lengths_of(attention_mask)
        mixer = attention.mixer
        plain = Projections(*(x.unsqueeze(1) for x in (q, k, v, q, k)))
        whole = mixer is not None and not attention.softmax_heads and attention.observer is None
        counts = whole and self.fused and memory is not None and fuses(cast("Any", mixer), plain, memory)
        heads = turned_heads(
            (q, k, v),
            biases,
            self.head_norms,
            position_embeddings if layer.rotary else None,
            self.family.turn,
            memory.counts if counts and memory is not None else None,
            lengths,
            fused=self.fused,
        )
        new = Projections(*heads[:5])
        if counts and mixer is not None and memory is not None:
            new = new if mixer.config.landmarks else mixer.in_code(new)
            mixed = fused_step(mixer, new, lengths, memory, counts=heads.before, dtype=y.dtype)
        else:
            mixed = attention.mix(new, lengths, memory)
        if memory is not None:
            memory.advance(1, lengths, counted=counts)
        return (mixed if mixed.dtype == y.dtype else mixed.to(y.dtype)).flatten(1)

    def _projected(self, y: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor] | None]:
        """q, k and v `[B, heads, width]` and the biases that are to be added; with `raw`, also without norms."""
        attention, layer = self.attention, self.attention.layer
        names = [self.family.projections[name] for name in "qkv"]
        modules = [attention._modules[name] for name in dict.fromkeys(names)]
        weight = side_by_side(cast("Any", modules), biases=True) if self.raw else None
        if weight is None:
            if not self.raw:
                q, k, v = self.family.project(attention, layer, y.unsqueeze(1))
                return (q.squeeze(1), k.squeeze(1), v.squeeze(1)), None
            projected, biases = torch.cat([cast("Any", module)(y) for module in modules], -1), None
        else:
            projected = product(y, weight)
            found = [cast("Any", module).bias for module in modules]
            biases = None if found[0] is None else found
        sizes = [layer.query_heads * layer.key_width, layer.key_value_heads * layer.key_width]
        sizes.append(layer.key_value_heads * layer.value_width)
        widths = (layer.key_width, layer.key_width, layer.value_width)
        q, k, v = (x.unflatten(1, (-1, n)) for x, n in zip(projected.split(sizes, 1), widths, strict=True))
        if biases is not None and len(biases) == 1:
            biases = list(biases[0].split(sizes))
        return (q, k, v), None if biases is None else (biases[0], biases[1], biases[2])

    def _network(self, y: Tensor) -> tuple[Tensor, Any]:
        """The input of the feed-forward network's last product, and that module; or its output, and None."""
        names = self.family.projections
        down = getattr(self.mlp, names["down"].rpartition(".")[2], None)
        if self.activation is None or down is None:
            return self.mlp(y.unsqueeze(1)).squeeze(1), None
        wide = [self.mlp._modules[name] for name in dict.fromkeys(names[x] for x in ("gate", "up") if x in names)]
        weight = side_by_side(wide) if len(wide) > 1 else None
        whole = (
            product(y, weight) if weight is not None else torch.cat([m(y) for m in wide], 1) if wide[1:] else wide[0](y)
        )
        return activated(whole, self.activation, gated="gate" in names, fused=self.fused), down


def _refusal(layer: nn.Module, attention: LinearizedAttention) -> str | None:
    """The reason that a layer has no short block; None if it has one."""
    family: Any = attention.family
    if family.norms is None:
        return f"{family.name} has layers of another form"
    if layer.training or layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
        return "they are being trained or watched"
    if not hasattr(layer, "mlp"):
        return "their feed-forward network is of another kind"
    named = [getattr(layer, name, None) for name in family.norms if name]
    if any(x is not None and _norm_of(x) is None for x in named) or not any(x is not None for x in named):
        return "their norms are of another kind"
    return None


def _norm_of(module: Any) -> Norm | None:
    """A norm module's function; None if it is of another kind. The trial finds what its class does not tell."""
    if module is None or module._forward_hooks or module._forward_pre_hooks:
        return None
    kind = type(module).__name__
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-5))
    if kind.endswith("RMSNorm"):
        return Norm("rms", weight, eps, offset=1.0 if kind.startswith("Gemma") else 0.0)
    return Norm("layer", weight, eps, bias) if kind.endswith("LayerNorm") else None


def _head_norms(attention: LinearizedAttention) -> tuple[HeadNorms | None, bool]:
    """The norms of queries and keys, and True if the block projects by itself; else the family projects."""
    names = [attention.family.projections[name] for name in "qkv"]
    modules = attention._modules
    if any(name not in modules for name in names) or any(
        "norm" in x and x not in ("q_norm", "k_norm") for x in modules
    ):
        return None, False
    if modules.get("q_norm") is None:
        return None, True
    q, k = (_norm_of(modules[name]) for name in ("q_norm", "k_norm"))
    if q is None or k is None or q.weight is None or k.weight is None or q.bias is not None:
        return None, False
    q, k = (Norm(x.kind, x.weight.flatten(), x.eps, offset=x.offset) for x in (q, k) if x.weight is not None)
    # Over all heads together if the weight is flat and wider than a head.
    wide = cast("Any", modules["q_norm"]).weight.dim() == 1 and q.weight.numel() != attention.layer.key_width  # type: ignore[union-attr]
    return HeadNorms(q, k, wide), True


def _activation_of(mlp: Any) -> Activation | None:
    for name in ("act_fn", "activation_fn", "act"):
        if hasattr(mlp, name):
            return _ACTIVATIONS.get(type(getattr(mlp, name)).__name__)
    return None


@torch.no_grad()
def _distances(model: Any, blocks: Blocks) -> Iterator[tuple[nn.Module, str | None]]:
    """Each layer, and the difference between its short block and the base model's own code as a reason not to use the
    former; None if they agree."""
    converted: LinearizedForCausalLM = model.get_base_model() if hasattr(model, "get_base_model") else model
    caches, seen = [DynamicCache(), DynamicCache()], dict[nn.Module, dict[str, Any]]()
    for cache in caches:
        cache.layers = list(empty_memories(converted, _ROWS))

    def keep(layer: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        seen[layer] = given

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in blocks.short]
    ids = torch.zeros(_ROWS, 1, dtype=torch.long, device=converted.device)
    mask = torch.ones(_ROWS, 1, 1, 1, dtype=torch.long, device=converted.device)
    try:
        converted(input_ids=ids, attention_mask=mask, past_key_values=caches[0], use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    for memory in caches[0].layers:
        memory.reset()
    generator = torch.Generator().manual_seed(0)
    dtype, width = next(converted.parameters()).dtype, cast("Any", converted.config).text_config.hidden_size
    drawn = torch.randn(_STEPS, _ROWS, 1, width, generator=generator).to(converted.device, dtype)
    for layer, block in list(blocks.short.items()):
        yield layer, _difference(layer, block, seen.get(layer, {}), drawn, caches)


def _difference(layer: nn.Module, block: _Block, given: dict[str, Any], drawn: Tensor, caches: list[Any]) -> str | None:
    name = next((name for name in ("cache", "past_key_values", "layer_past") if given.get(name) is not None), None)
    if name is None:
        return "their base model passes its cache in another way"
    memories = [cache.layers[block.attention.layer_idx] for cache in caches]
    found = list[tuple[Tensor, Tensor, Tensor]]()
    try:
        for x in drawn:
            plain = layer(x, **{**given, name: caches[0]})
            found.append((plain - x, block(x, **{**given, name: caches[1]}) - x, x))
        pairs = zip(memories[0].tensors(), memories[1].tensors(), strict=True)
        found += [(one.float(), two.float(), one.float()) for (_, one), (_, two) in pairs if one.numel()]
    except Exception as error:
        return f"a kernel fails on this GPU: {(str(error).splitlines() or [type(error).__name__])[0]}"
    share = _TOLERANCE.get(drawn.dtype, _HALF_TOLERANCE)
    for plain, ours, whole in found:
        rounding = 2 * torch.finfo(drawn.dtype).eps * float(whole.abs().max())
        worst = float((plain.float() - ours.float()).abs().max())
        allowed = share * float(plain.abs().max()) + rounding
        if not worst <= allowed:
            return f"their short form is off by {worst:.1e} on this GPU, where {allowed:.0e} is allowed"
    return None
