"""The interface of a family: the projections, layer geometry and positions of an architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from linearize_kernels.products import is_plain, product
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linearize_kernels.block import Turn


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention, apart from its weights.

    Attributes:
        query_heads, key_value_heads: H and K; groups of H / K neighbouring query heads share a key/value head.
        key_width, value_width: D and V, per head.
        scale: the factor of q·k.
        softcap: scores become `softcap * tanh(scores / softcap)`; None means no cap.
        window: the number of last tokens that the layer attends to, the current one included; None means all.
        rotary: True if queries and keys get the model's rotary positions.
    """

    query_heads: int
    key_value_heads: int
    key_width: int
    value_width: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    rotary: bool = True

    @property
    def flops_per_key(self) -> int:
        """Floating-point operations of softmax attention per token and visible key, all query heads together: a
        multiply-add (2) for each channel of the key and of the value."""
        return 2 * self.query_heads * (self.key_width + self.value_width)


class Projections(NamedTuple):
    """Queries, keys and values that the pretrained weights project from T tokens, before any attention.

    Attributes:
        q, k, v: `[B, T, H, D]`, `[B, T, K, D]`, `[B, T, K, V]`, with biases and q/k norms, without positions.
        q_rotated, k_rotated: q and k with the family's position encoding; the same tensors if it has none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_rotated: Tensor
    k_rotated: Tensor


class Family(ABC):
    """One architecture; stateless.

    Attributes:
        model_types: the `model_type`s of its transformers configurations.
        blocks: the path of the list of layers in the model.
        attention: the name of the attention module in a layer.
        projections: short names of linear modules, used in recipes -> the ends of the modules' names. If one module
            computes queries, keys and values, all three map to it.
        norms: names of a layer's norms before and after attention, and before and after the feed-forward network; empty
            or missing ones are left out. Without one before the network, it reads what attention reads. None: the
            layer is built otherwise.
        turn: the channels that `rotate` turns together.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    blocks: ClassVar[str] = "model.layers"
    attention: ClassVar[str] = "self_attn"
    norms: ClassVar[tuple[str, str, str, str] | None] = None
    turn: ClassVar[Turn] = "halves"
    projections: ClassVar[dict[str, str]] = {
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "o": "o_proj",
        "gate": "gate_proj",
        "up": "up_proj",
        "down": "down_proj",
    }

    def refusal(self, config: Any) -> str | None:
        """The reason why a model of this configuration cannot be converted, in a few words; None if it can."""
        return None

    @abstractmethod
    def layer(self, config: Any, index: int) -> AttentionLayer:
        """The attention of layer `index`, from the configuration alone."""

    @abstractmethod
    def project(self, attention: Any, layer: AttentionLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, T, H, D]`, k `[B, T, K, D]` and v `[B, T, K, V]` of `hidden_states` `[B, T, width]`: with biases and
        q/k norms, without positions. `attention` has the submodules of the family's attention module."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` `[B, T, heads, D]` with the positions of the rotary table cos, sin `[B or 1, T, R]`, R <= D."""
        return rotate_halves(x, cos, sin)

    def output(self, attention: Any, heads: Tensor) -> Tensor:
        """The output projection of `heads` `[B, T, H, V]`."""
        projected: Tensor = getattr(attention, self.projections["o"])(heads.flatten(2))
        return projected

    def layers(self, config: Any) -> list[AttentionLayer]:
        """The attention of every layer."""
        return [self.layer(config, index) for index in range(config.num_hidden_layers)]

    def attention_modules(self, model: nn.Module) -> list[tuple[nn.Module, str]]:
        """For each layer the module that owns the attention, and the attention's attribute name in it."""
        blocks: Any = model.get_submodule(self.blocks)
        return [(block, self.attention) for block in blocks]


def project_jointly(x: Tensor, modules: Sequence[nn.Module]) -> list[Tensor]:
    """Apply several modules to `x` `[B, T, width]`. For one token, plain linear layers run as one product, because each
    launch costs as much as a small product."""
    if x.shape[1] == 1 and x.is_contiguous() and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        whole = side_by_side(modules)
        if whole is not None:
            # With 2-d operands the product needs no reshape.
            projected = product(x.view(-1, x.shape[2]), whole).view(x.shape[0], 1, -1)
            return list(projected.split([module.out_features for module in modules], -1))
    return [module(x) for module in modules]


def side_by_side(modules: Sequence[nn.Module], *, biases: bool = False) -> Tensor | None:
    """The weights of linear layers as one matrix; the layers' weights become views of it, so memory holds them once.
    None if a module is more than its weight, for example one with an adapter, a hook or, without `biases`, a bias."""
    for module in modules:
        if not is_plain(module) or module._forward_hooks or module._forward_pre_hooks:
            return None
        if module.bias is not None and not biases:
            return None
        if "forward" in module.__dict__ or type(module.weight) is not nn.Parameter:
            return None
    weights: list[Any] = [module._parameters["weight"] for module in modules]
    first, width = weights[0], weights[0].shape[1]
    rows = sum(weight.shape[0] for weight in weights)
    end, size = first.data_ptr(), first.element_size()
    room = first.untyped_storage().nbytes() - first.storage_offset() * size
    for weight in weights:
        if weight.data_ptr() != end or room < rows * width * size or not weight.is_contiguous():
            break
        end += weight.numel() * size
    else:
        joint: Tensor = first.as_strided((rows, width), (width, 1))
        return joint
    if any(weight.is_shared() or weight.shape[1] != width or weight.dtype != first.dtype for weight in weights):
        return None
    if first.is_inference():  # an inference tensor cannot become a view of a normal tensor
        return None
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, whole.split([weight.shape[0] for weight in weights]), strict=True):
            weight.data = part
    return whole


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (RoPE, arXiv 2104.09864) on the first R of the D channels of `x` `[B, T, heads, D]`, channel i
    paired with i + R/2; cos, sin `[B or 1, T, R]`."""
    first, second = x[..., : cos.shape[-1]].chunk(2, dim=-1)
    return _rotate(x, torch.cat((-second, first), dim=-1), cos, sin)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rotate_halves`, with channel 2i paired with 2i + 1; cos, sin `[B or 1, T, R]` repeat each value twice."""
    first, second = x[..., : cos.shape[-1]].unflatten(-1, (-1, 2)).unbind(-1)
    return _rotate(x, torch.stack((-second, first), dim=-1).flatten(-2), cos, sin)


def _rotate(x: Tensor, partner: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    # Some families keep the table in float32 for half-precision queries and keys.
    turned = (x[..., :width] * cos.unsqueeze(2) + partner * sin.unsqueeze(2)).to(x.dtype)
    return torch.cat((turned, x[..., width:]), dim=-1) if width < x.shape[-1] else turned


def head_width(config: Any) -> int:
    """`head_dim` if the configuration has it, otherwise the model's width divided by the number of heads."""
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width


def own_window(config: Any, index: int) -> int | None:
    """The sliding window of layer `index` for configurations with `layer_types`."""
    sliding = getattr(config, "layer_types", None) and config.layer_types[index] == "sliding_attention"
    return int(config.sliding_window) if sliding else None
