"""The configuration of a converted model: the base model's own, and one `mixer` section per kind of layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils.logging import get_logger

from linearize.model.positions import settle_rotary

if TYPE_CHECKING:
    from linearize.families.base import AttentionLayer

_LOG = get_logger(__name__)
Mix = Literal["fixed", "learned", "softmax"]
Covers = Literal["all", "evicted"]
FeatureMap = Literal["softmax", "exp", "elu", "identity", "learned"]
LandmarkScore = Literal["novelty", "learned"]
GateSource = Literal["k", "q", "v", "random"]
MemoryDtype = Literal["auto", "int8", "int4"]
CODING = (".mixer.key_scale", ".mixer.key_shift")
"""Name endings of the parameters that scale and shift keys before they are coded."""
BLOCK = 32
"""The number of tokens that leave the window together and are merged into the landmarks at once."""


def room(window: int) -> int:
    """The capacity in tokens of a window with landmarks: a block stays until its last token is W tokens old."""
    return window + BLOCK - 1


@dataclass
class MixerConfig:
    """The mixer options of the layers of one kind.

    Attributes:
        layers: the layers of this kind, counted from 0.
        recurrence: the name of a registered recurrence, or `none` for the window alone.
        window: tokens of the softmax window, the current one included; None keeps the pretrained attention, over
            the whole past or over the layer's own sliding window.
        sinks: the number of first tokens that every later query reads exactly.
        mix: the combination of window and recurrence. `fixed` 0.5/0.5 (Liger); `learned` a weight per head and channel
            that starts at 0; `softmax` one shared normaliser with a weight per head that starts at 0.
        covers: the tokens that the state holds: `all`, or those `evicted` from the window (sinks excluded).
        feature_map: the map of keys and queries before the state: `softmax` over a head's channels, `exp`
            (Hedgehog's [softmax(x), softmax(-x)]), `elu` (plus 1), `identity`, or `learned` (`exp` of a learned linear
            map that starts as the identity).
        rope: give the recurrence queries and keys with the model's rotary positions.
        qk_norm: scale queries and keys to length 1 before the feature map.
        normalize: divide the recurrence's output by its mass, if it has one.
        gate_source: the tensor that gates are computed from: the token's key, query (averaged over the heads that
            share a key) or value, or `random`, a random linear map of the key.
        gate_scale, gate_bias, gate_divisor: the gate's input is scale * Pool(source) + bias, and its log-gate usually
            logsigmoid(input) / divisor. None is the recurrence's own start.
        gate_learned: train scale and bias, one of each per gate.
        lower_bound: the minimum of the gate in the last layer; it is 0 in the first and grows linearly with depth.
        slots: the number of slots of `gsa`; 0 means the width of a head.
        negative_eigenvalues: write strengths up to 2 instead of 1, for `gated_deltanet` and `kda`.
        landmarks: tokens per key/value head that are kept and read exactly after they leave the window, chosen online;
            a layer with a sliding window of its own has none.
        landmark_score: the static part of a token's rank among the landmarks: its `novelty`, or `learned`.
        memory_dtype: the storage of keys and values. `auto` is the model's dtype; `int8` has one scale per token and
            head; `int4` has landmarks in 4 bits, and window and sinks in 8.
        softmax_heads: key/value heads that keep softmax over the whole past, with the query heads that share them.
    """

    layers: list[int]
    recurrence: str = "gla"
    window: int | None = 64
    sinks: int = 4
    mix: Mix = "learned"
    covers: Covers = "evicted"
    feature_map: FeatureMap = "softmax"
    rope: bool = False
    qk_norm: bool = False
    normalize: bool = True
    gate_source: GateSource = "k"
    gate_scale: float | None = None
    gate_bias: float | None = None
    gate_divisor: float = 1.0
    gate_learned: bool = True
    lower_bound: float = 0.0
    slots: int = 0
    negative_eigenvalues: bool = False
    landmarks: int = 0
    landmark_score: LandmarkScore = "novelty"
    memory_dtype: MemoryDtype = "auto"
    softmax_heads: list[int] = field(default_factory=list)

    @property
    def exact_tokens(self) -> int:
        """The length in tokens up to which a text is read exactly, before the state receives a token."""
        # Landmarks are merged in blocks; the state receives its first token with the block that overfills the slots.
        merged = (self.landmarks // BLOCK + 1) * BLOCK - 1 if self.landmarks else 0
        return (self.window or 1) + self.sinks + merged

    def fitted(self, layer: AttentionLayer) -> MixerConfig:
        """This section limited to `layer`. If its window is at least as wide as the layer's own sliding window, sinks
        and recurrence are dropped, because the pretrained layer never reads beyond its window.

        Raises:
            ValueError: `softmax_heads` names heads that do not exist, or heads of a layer with a sliding window.
        """
        for head in self.softmax_heads:
            if head not in range(layer.key_value_heads):
                raise ValueError(f"there is no key/value head {head}; the layer has 0 to {layer.key_value_heads - 1}")
        # Such a layer stays the pretrained one, so its window stays in the model's dtype.
        bare = replace(
            self, recurrence="none", sinks=0, covers="evicted", landmarks=0, memory_dtype="auto", softmax_heads=[]
        )
        if layer.window is None:
            return replace(bare, window=None) if self.window is None else self
        if self.window is None or self.window >= layer.window:
            return replace(bare, window=layer.window)
        if self.softmax_heads:
            raise ValueError("the layer has a sliding window of its own; keep the whole layer, not single heads")
        # The pretrained layer never reads beyond its sliding window, and a slot may hold an older token.
        return replace(self, landmarks=0)

    def converts(self, layer: AttentionLayer) -> bool:
        """True if any head of `layer` is no longer its pretrained attention."""
        fitted = self.fitted(layer)
        return fitted.window not in (None, layer.window) and len(set(fitted.softmax_heads)) < layer.key_value_heads


class LinearizedConfig(PreTrainedConfig):
    """Configuration of a converted model; unknown attributes are looked up in the base model's configuration.

    Args:
        text_config: the base model's full configuration, under the name by which transformers finds the language model
            inside a composite configuration.
        mixers: the `mixer` sections; layers that no section names keep their pretrained attention.
        quantized: the fields of a `Quantization` for the linear layers; None leaves them unquantized.
    """

    model_type = "linearized"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    mixers: list[Any] | None = None
    quantized: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        base = self.text_config
        if base is None:
            base = {"model_type": "llama"}  # transformers saves the difference to a default instance, built here
        if stored := isinstance(base, dict):
            base = dict(base)
            base = CONFIG_MAPPING[base.pop("model_type")](**base)
        self.mixers = [m if isinstance(m, dict) else asdict(m) for m in self.mixers or []]
        if (told := settle_rotary(base)) and stored:
            _LOG.warning_once(f"linearize: converted by an earlier version, so convert and train again; {told[0]}")
        # Hide `text_config` from transformers meanwhile, or it would copy the base model's attributes to this level.
        self.text_config = None
        super().__post_init__(**kwargs)
        self.text_config = base

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and (base := self.__dict__.get("text_config")) is not None:
            return getattr(base, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def mixer_of(self, layer: int) -> MixerConfig:
        """The mixer section that names `layer`; without one, a section that keeps the pretrained attention."""
        for section in self.mixers or []:
            if layer in section["layers"]:
                return MixerConfig(**section)
        return MixerConfig(layers=[layer], window=None, recurrence="none", sinks=0)


# A copy in a checkpoint has another module name and registers nothing: transformers finds it by `auto_map`.
if __name__ == "linearize.model.configuration":
    AutoConfig.register(LinearizedConfig.model_type, LinearizedConfig, exist_ok=True)
