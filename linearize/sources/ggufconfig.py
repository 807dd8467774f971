"""The configuration of a GGUF file: transformers' own mapping, completed by the rotary keys and end tokens it drops,
and by what llama.cpp knows without a key: biases, and the attention scale of Gemma's 27B models.

transformers ignores `ARCH.rope.scaling.*`, the tensors `rope_freqs.weight` and `rope_factors_{long,short}.weight`, and
all end tokens except one. This module reads them with llama.cpp's meaning (`load_hparams`, `llama_context`,
`ggml_rope_ext`) and writes `rope_parameters` and `eos_token_id`, which transformers' models read. A key that
`rope_parameters` cannot express raises an error that names it, because positions would be wrong without it.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from linearize.errors import ModelError
from linearize.sources.gguf import GgufHead, read_head

if TYPE_CHECKING:
    from collections.abc import Iterator

_ARCHITECTURE = "general.architecture"
_ENDS = ("eos", "eot", "eom")
"""`tokenizer.ggml.*_token_id`: the ends of a text, a turn and a message. Generation stops at each of them."""

_FREQS, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_TABLES, _OLD_TABLE = (_FREQS, _LONG, _SHORT), ".attn_rot_embd.weight"  # the old one is computed from the keys
_SCALING = {
    "type", "factor", "attn_factor", "original_context_length", "finetuned", "yarn_ext_factor", "yarn_attn_factor",
    "yarn_beta_fast", "yarn_beta_slow",
}  # fmt: skip
_PARTIAL = {"phi3", "stablelm"}
"""Model types whose models read `partial_rotary_factor`."""

_BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
"""Settings of a configuration that no key states -> a tensor that is there where they are true."""
_LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}
"""Model type -> layers of the one size whose attention scale is not by the key width; llama.cpp knows it by them."""

_LLAMA3_CONTEXTS = (8_192, 4_096, 16_384, 32_768, 2_048, 65_536, 131_072)
"""Candidate original lengths; the published one comes first."""
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0
"""`low_freq_factor` and `high_freq_factor` of all published models; other values become explicit factors."""
_LONGEST_LIST = 1024
"""Longer arrays are of the vocabulary: tokens, their scores and types, merges."""
_SAME = 1e-6
"""Maximum difference between the frequencies of recovered parameters and those of the tensor, relative to the unscaled
frequencies."""


def gguf_config(path: Path) -> Any:
    """Read the configuration of the model in a GGUF file, without its weights.

    Raises:
        ModelError: the file is damaged, or has a key that cannot be applied.
    """
    head = read_head(path)
    if not isinstance(head.values.get(_ARCHITECTURE), str):
        raise ModelError(f"{path}: cannot be read as a model: it has no {_ARCHITECTURE}; fetch the file again")
    config = _mapped(head)
    stated = [head.values.get(f"tokenizer.ggml.{end}_token_id") for end in _ENDS]
    # An id outside the vocabulary means "no such token"; some writers store 2**32 - 1.
    if ends := list(dict.fromkeys(end for end in stated if isinstance(end, int) and 0 <= end < config.vocab_size)):
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if getattr(config, "rope_parameters", None):
        _Rotary(head, config).apply()
    for name, tensor in _BIASES.items():
        if hasattr(config, name):
            setattr(config, name, tensor in head.tensors)
    if config.num_hidden_layers == _LAYERS_OF_27B.get(config.model_type):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    return config


def _mapped(head: GgufHead) -> Any:
    """transformers' own configuration, read from a header without the vocabulary because gguf's reader takes seconds
    for a large one."""
    size_key = f"{head.values[_ARCHITECTURE]}.vocab_size"
    with TemporaryDirectory(prefix="linearize-") as folder:
        (Path(folder) / head.path.name).write_bytes(head.without_vocabulary(size_key))
        config = AutoConfig.from_pretrained(folder, gguf_file=head.path.name)
    size = head.values.get(size_key, head.values.get("tokenizer.ggml.tokens"))
    if size is not None:  # transformers maps no size key for gpt2 and starcoder2
        config.vocab_size = size
    config.name_or_path = str(head.path.parent)
    return config


@contextmanager
def short_reading() -> Iterator[None]:
    """Let transformers read a GGUF file without what it does not use.

    `gguf.GGUFReader` makes numpy arrays of every token and merge, which takes seconds, and transformers builds gguf's
    table of tensor names again for each module of the model.
    """
    import gguf
    from transformers.integrations import gguf as integration

    if not hasattr(integration, "get_gguf_tokenizer"):  # this version makes the tokenizer of the reader's arrays
        yield
        return

    class ShortReader(gguf.GGUFReader):
        def __init__(self, path: Path | str, mode: str = "r") -> None:
            self.ends = sorted(end for _, end in read_head(Path(path)).pairs.values())
            super().__init__(path, mode)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type == gguf.GGUFValueType.ARRAY and self._get(orig_offs + 4, "uint64")[0] > _LONGEST_LIST:
                end = next(end for end in self.ends if end > orig_offs)
                return end - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]
            found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return found

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = ShortReader, cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before


@contextmanager
def dropped_tensors() -> Iterator[set[str]]:
    """The tensors of a GGUF file that transformers drops in silence, as the model has no weight for them.

    Rotary factors, which `gguf_config` reads, are not among them.
    """
    from transformers import modeling_gguf_pytorch_utils as reading

    dropped: set[str] = set()

    class Names(dict[str, str]):
        def __contains__(self, name: object) -> bool:
            found = super().__contains__(name)
            # A tensor without a name was split and taken: experts.
            if not found and isinstance(name, str) and name not in _TABLES and not name.endswith(_OLD_TABLE):
                dropped.add(name)
            return found

    before = reading.get_gguf_hf_weights_map
    reading.get_gguf_hf_weights_map = lambda *args, **settings: Names(before(*args, **settings))
    try:
        yield dropped
    finally:
        reading.get_gguf_hf_weights_map = before


class _Rotary:
    """The rotary keys and tensors of a file.

    Attributes:
        parameters: the `rope_parameters` with scaling: of all layers, or of Gemma 3's global layers.
        sliding: the `rope_parameters` of Gemma 3's sliding layers, which are never scaled; empty for other models.
    """

    def __init__(self, head: GgufHead, config: Any) -> None:
        self.head, self.config = head, config
        self.prefix = f"{head.values[_ARCHITECTURE]}.rope."
        rope = config.rope_parameters
        self.parameters: dict[str, Any] = rope.get("full_attention", rope)
        self.sliding: dict[str, Any] = rope.get("sliding_attention", {})

    def apply(self) -> None:
        """Complete the configuration's `rope_parameters`.

        Raises:
            ModelError: names a key or tensor that cannot be applied.
        """
        if (base := self._base("freq_base")) is not None:
            self.parameters["rope_theta"] = base
        if self.sliding and (base := self._base("freq_base_swa")) is not None:
            self.sliding["rope_theta"] = base
        self._set_width()
        scaling = self._scaling()
        self.parameters.update(scaling)
        original = scaling.get("original_max_position_embeddings")
        if original is not None and hasattr(self.config, "original_max_position_embeddings"):  # Phi-3 reads this one
            self.config.original_max_position_embeddings = original
        self.config.standardize_rope_params()

    @property
    def width(self) -> int:
        """The number of rotated dimensions in a head."""
        config = self.config
        head: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(head * self.parameters.get("partial_rotary_factor", 1.0))

    def _set_width(self) -> None:
        stated = self.head.values.get(self.prefix + "dimension_count")
        if not isinstance(stated, int) or stated == self.width:
            return
        head = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        if self.config.model_type not in _PARTIAL or not 0 < stated <= head:
            raise self._refused(
                self.prefix + "dimension_count", f"{stated} of the {head} dimensions of a head are rotated"
            )
        self.parameters["partial_rotary_factor"] = stated / head

    def _scaling(self) -> dict[str, Any]:
        """The `rope_parameters` that scale positions; empty without scaling."""
        values, prefix = self.head.values, self.prefix + "scaling."
        for key, value in values.items():
            if key.startswith(prefix) and key.removeprefix(prefix) not in _SCALING and value:
                raise self._refused(key, str(value))
        kind = values.get(prefix + "type", "linear")
        if kind not in ("none", "linear", "yarn", "longrope"):
            raise self._refused(prefix + "type", str(kind))
        factor = self._number("scaling.factor", 0.0) or self._number("scale_linear", 0.0) or 1.0
        if kind == "none":
            factor = 1.0
        elif factor < 0:
            raise self._refused(prefix + "factor", f"{factor}")
        attention = self._number("scaling.attn_factor", 1.0)
        if _LONG in self.head.tensors or _SHORT in self.head.tensors:
            return self._long(kind, factor, attention)
        if kind == "longrope":
            raise self._refused(prefix + "type", f"longrope without the tensors {_LONG} and {_SHORT}")
        if kind == "yarn" and factor != 1:
            if _FREQS in self.head.tensors:
                raise self._refused(_FREQS, "together with yarn")
            return self._yarn(factor, attention)
        if _FREQS in self.head.tensors:
            return self._frequencies(factor, attention)
        if attention != 1:
            raise self._refused(prefix + "attn_factor", f"{attention} without yarn")
        return {} if factor == 1 else {"rope_type": "linear", "factor": factor}

    def _yarn(self, factor: float, attention: float) -> dict[str, Any]:
        prefix = self.prefix + "scaling."
        if self.config.model_type == "phi3":  # transformers treats yarn of Phi-3 as longrope
            raise self._refused(prefix + "type", "yarn of phi3")
        extrapolation = self._number("scaling.yarn_ext_factor", 1.0)
        if extrapolation >= 0 and extrapolation != 1:  # a value below 0 means "not set"
            raise self._refused(prefix + "yarn_ext_factor", f"{extrapolation}")
        scale = 1.0 if factor <= 1 else 1.0 + 0.1 * math.log(factor)
        # llama.cpp ignores this key. Its converter writes `attention_factor`, which includes `scale`, or the older
        # `attn_factor`, which multiplies `scale`.
        stated = self._number("scaling.yarn_attn_factor", 1.0)
        if stated != 1 and not math.isclose(stated, scale, rel_tol=1e-4):
            raise self._refused(prefix + "yarn_attn_factor", f"{stated}, and yarn by {factor:g} has {scale:.4f}")
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self._original() or self.config.max_position_embeddings,
            "attention_factor": scale * attention,
            "beta_fast": self._number("scaling.yarn_beta_fast", 32.0),
            "beta_slow": self._number("scaling.yarn_beta_slow", 1.0),
        }

    def _long(self, kind: str, factor: float, attention: float) -> dict[str, Any]:
        prefix = self.prefix + "scaling."
        for name in (_LONG, _SHORT):
            if name not in self.head.tensors:
                raise self._refused(_SHORT if name == _LONG else _LONG, f"without {name}")
        if _FREQS in self.head.tensors:
            raise self._refused(_FREQS, f"together with {_LONG}")
        if kind == "yarn":
            raise self._refused(prefix + "type", f"yarn together with {_LONG}")
        if factor != 1:
            raise self._refused(prefix + "factor", f"{factor:g} together with {_LONG}")
        original = self._original()
        if not original:
            raise self._refused(_LONG, f"without {prefix}original_context_length")
        return self._explicit(self._factors(_SHORT), self._factors(_LONG), attention, original)

    def _frequencies(self, factor: float, attention: float) -> dict[str, Any]:
        """Convert `rope_freqs.weight`, which divides each frequency, to Llama 3's rule if it fits, or else to explicit
        factors."""
        factors = [factor * each for each in self._factors(_FREQS)]
        if attention == 1:
            if all(each == 1 for each in factors):
                return {}
            if all(each == factors[0] for each in factors):
                return {"rope_type": "linear", "factor": factors[0]}
            if (found := self._llama3(factors)) is not None:
                return found
        return self._explicit(factors, factors, attention, self.config.max_position_embeddings)

    def _llama3(self, factors: list[float]) -> dict[str, Any] | None:
        """Llama 3's parameters that reproduce `factors`; None without a match."""
        largest, base = max(factors), self.parameters["rope_theta"]
        for original in _LLAMA3_CONTEXTS:
            worst = 0.0
            for index, each in enumerate(factors):
                turns = original / (2 * math.pi * base ** (2 * index / self.width))
                smooth = min(max((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0), 1.0)
                worst = max(worst, abs((1 - smooth) / largest + smooth - 1 / each))
            if worst <= _SAME:
                return {
                    "rope_type": "llama3",
                    "factor": largest,
                    "low_freq_factor": _LLAMA3_LOW,
                    "high_freq_factor": _LLAMA3_HIGH,
                    "original_max_position_embeddings": original,
                }
        return None

    def _explicit(self, short: list[float], long: list[float], attention: float, original: int) -> dict[str, Any]:
        """`longrope`, transformers' only type with explicit factors; equal lists give one table at any length."""
        return {
            "rope_type": "longrope",
            "factor": max(self.config.max_position_embeddings / original, 1.0),  # has no effect beside `attention`
            "short_factor": short,
            "long_factor": long,
            "attention_factor": attention,
            "original_max_position_embeddings": original,
        }

    def _factors(self, name: str) -> list[float]:
        factors = self.head.floats(name)
        if len(factors) != self.width // 2:
            raise self._refused(name, f"{len(factors)} factors for {self.width // 2} pairs of rotated dimensions")
        if not all(math.isfinite(each) and each > 0 for each in factors):
            raise self._refused(name, "factors that are not positive numbers")
        if name == _FREQS and max(factors) <= 1 and min(factors) < 1:
            # Files of 2023 store Llama 2's frequencies, not factors, under this name.
            raise self._refused(name, "numbers below 1, which are frequencies and no factors")
        return factors

    def _original(self) -> int | None:
        value = self._number("scaling.original_context_length", 0.0)
        return int(value) or None

    def _base(self, key: str) -> float | None:
        """The base of rotary frequencies; None if the file lacks the key."""
        if self.prefix + key not in self.head.values:
            return None
        if (base := self._number(key, 0.0)) <= 0:
            raise self._refused(self.prefix + key, f"{base}")
        return base

    def _number(self, key: str, default: float) -> float:
        value = self.head.values.get(self.prefix + key, default)
        if self.prefix + key in self.head.arrays:
            raise self._refused(self.prefix + key, "an array")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise self._refused(self.prefix + key, str(value)[:40])
        return float(value)

    def _refused(self, key: str, found: str) -> ModelError:
        return ModelError(
            f"{self.head.path}: {key} cannot be applied ({found}), and without it positions would be wrong; convert "
            "the model that the GGUF file was made of"
        )
