"""Load models from a Hub id, a folder or a GGUF file, and turn any loading error into a one-line `ModelError`.

transformers' modeling modules and tokenizers are lazy imports, because they take seconds and a configuration needs
neither.
"""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError
from linearize_kernels.products import take_products
from transformers import AutoConfig
from transformers.utils import cached_file

from linearize.errors import ModelError, counted
from linearize.model.configuration import CODING  # also registers converted checkpoints with AutoConfig
from linearize.sources.gguf import MAGIC, read_head
from linearize.sources.ggufconfig import dropped_tensors, gguf_config, short_reading
from linearize.sources.limits import guard_embeddings
from linearize.sources.modelfiles import check_config, check_weights
from linearize.sources.names import nearest, on_disk
from linearize.sources.validators import import_validators

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager

    from transformers import BitsAndBytesConfig, PreTrainedModel


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """The location of a model.

    Attributes:
        reference: the user's own string for a Hub id; an absolute path for a local model.
        kind: `hub` id, local `folder`, or `gguf` file.
        trust_remote_code: True if the user allowed the model's own Python code to run.
    """

    reference: str
    kind: Literal["hub", "folder", "gguf"]
    trust_remote_code: bool = False

    @property
    def name(self) -> str:
        """A short name for messages and cards."""
        return self.reference if self.kind == "hub" else Path(self.reference).name

    def arguments(self) -> tuple[str, dict[str, Any]]:
        """The positional and keyword arguments of transformers' `from_pretrained`."""
        keywords: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.kind == "gguf":
            path = Path(self.reference)
            return str(path.parent), {**keywords, "gguf_file": path.name}
        return self.reference, keywords

    @cached_property
    def is_converted(self) -> bool:
        """True if `linearize convert` wrote this model.

        Raises:
            ModelError: the Hub cannot be reached, or has no such model.
        """
        with reading(self):
            return _is_ours(_json_at(self, "config.json"))


def find_source(reference: str, *, trust_remote_code: bool = False) -> Source:
    """Resolve `reference`. A path is checked on disk; a Hub id is not checked yet.

    Raises:
        ModelError: the path does not exist, the folder has no configuration, or the file is not GGUF or is damaged.
    """
    folder, file = on_disk(reference)
    path = Path(reference).expanduser()
    if folder:
        if not (path / "config.json").is_file():
            raise ModelError(f"{reference}: the folder has no config.json; {_hint(path)}")
        check_config(path)
        return Source(str(path.resolve()), "folder", trust_remote_code)
    if file:
        with _opening(reference), path.open("rb") as opened:
            if opened.read(4) != MAGIC:
                raise ModelError(f"{reference}: not a GGUF file; give a Hub id, a model's folder, or a .gguf file")
        read_head(path.resolve())
        return Source(str(path.resolve()), "gguf", trust_remote_code)
    return Source(reference, "hub", trust_remote_code)


def load_config(source: Source) -> Any:
    """Load the model's configuration, without its weights.

    Raises:
        ModelError: the configuration is missing or cannot be read.
    """
    import_validators()
    reference, keywords = source.arguments()
    with reading(source):
        if source.kind == "gguf":
            return gguf_config(Path(source.reference))
        return AutoConfig.from_pretrained(reference, **keywords)


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def has_tokenizer(source: Source) -> bool:
    """True if the model has tokenizer files. A GGUF file is assumed to hold a tokenizer.

    Raises:
        ModelError: the Hub cannot be reached.
    """
    if source.kind == "gguf":
        return True
    if source.kind == "folder":
        return any((Path(source.reference) / name).is_file() for name in _TOKENIZER_FILES)
    with reading(source):
        found = (
            cached_file(source.reference, name, _raise_exceptions_for_missing_entries=False)
            for name in _TOKENIZER_FILES
        )
        return any(file is not None for file in found)


def load_tokenizer(source: Source) -> Any:
    """Load the model's tokenizer.

    Raises:
        ModelError: the model has no tokenizer, or it cannot be read.
    """
    if not has_tokenizer(source):
        raise ModelError(
            f"{source.reference}: has no tokenizer (no tokenizer.json), and text cannot be read without; save the one "
            "that it was trained with into the folder"
        )
    from transformers import AutoTokenizer

    reference, keywords = source.arguments()
    with reading(source), _from_gguf(source):
        return AutoTokenizer.from_pretrained(reference, **keywords)


def load_model(
    source: Source, *, dtype: str = "auto", device: str | None = None, four_bit: bool = False
) -> PreTrainedModel:
    """Load the model in eval mode.

    Args:
        dtype: a key of `DTYPES`; `auto` for the checkpoint's own dtype (float32 for GGUF, because its weights are
            dequantized); `int8` for the checkpoint's own dtype with int8 weights in linear layers, for decoding on a
            CPU.
        device: the model's device; by default the first GPU, or the CPU.
        four_bit: load the weights of linear layers in 4 bits (NF4), for training adapters.

    Raises:
        ModelError: the model cannot be read, or cannot be loaded in 4 bits.
    """
    if dtype == "int8":
        from linearize.quantization.rounding import to_int8  # lazy, because only int8 needs it

        return to_int8(load_model(source, device=device))
    from transformers import AutoModelForCausalLM, GgufConfig

    reference, keywords = source.arguments()
    if source.kind == "gguf":
        # Without this argument the model stays marked as quantized, and `save_pretrained` fails.
        keywords["quantization_config"] = GgufConfig(dequantize=True)
        keywords["config"] = load_config(source)
        dtype = "float32" if dtype == "auto" else dtype
    else:
        keywords["use_safetensors"] = True  # unpickling a file can run any code
    if source.kind == "folder":
        check_weights(Path(reference))
    if four_bit:
        keywords["quantization_config"] = _four_bits(source, DTYPES.get(dtype))
        keywords["device_map"] = {"": device or default_device()}
    model: PreTrainedModel
    watched = dropped_tensors() if source.kind == "gguf" else nullcontext(set[str]())
    with reading(source), _from_gguf(source), watched as dropped:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            reference, dtype=DTYPES.get(dtype, "auto"), output_loading_info=True, **keywords
        )
    _check_loaded(model, {**loaded, "unexpected_keys": [*loaded["unexpected_keys"], *dropped]}, source)
    take_products(model)
    guard_embeddings(model)
    return model.eval() if four_bit else model.eval().to(device or default_device())


def _four_bits(source: Source, dtype: torch.dtype | None) -> BitsAndBytesConfig:
    """Raises:
    ModelError: bitsandbytes is not installed, or the model is not stored as safetensors.
    """
    if source.kind == "gguf":
        raise ModelError(f"{source.name}: a GGUF file is not read in 4 bits; take the safetensors model it was made of")
    if find_spec("bitsandbytes") is None:
        raise ModelError("lora.four_bit: needs bitsandbytes; pip install bitsandbytes, or set it to false")
    if dtype is None:
        own = getattr(load_config(source), "dtype", None)
        dtype = own if isinstance(own, torch.dtype) else torch.float32
    from transformers import BitsAndBytesConfig

    # Double quantization costs no accuracy (Dettmers et al. 2023, arXiv 2305.14314). A mixer's layers are too small to
    # gain.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head", "embed_out", "mixer"],
    )


def _check_loaded(model: PreTrainedModel, loaded: dict[str, Any], source: Source) -> None:
    """Refuse faults that transformers only logs: missing weights (initialized at random), unexpected weights, and
    values that are not finite.

    Raises:
        ModelError: names the first such weight.
    """
    unexpected = list(map(str, loaded["unexpected_keys"]))
    missing = sorted(loaded["missing_keys"])
    if missing and missing == sorted(name for name in model.state_dict() if name.endswith(CODING)):
        raise ModelError(
            f"{source.reference}: has no {missing[0]}, which a memory in 8 or 4 bits needs; if an earlier version of "
            "linearize converted it, convert the pretrained model again, and if config.json was edited, set its "
            "memory_dtype back to auto"
        )
    if missing and _wrapped(unexpected) is None:
        number = counted(len(missing), "weight is", "weights are")
        raise ModelError(
            f"{source.reference}: {number} not there, {missing[0]} among them; the files are of another model, or a "
            "part of them was not fetched"
        )
    check_taken(unexpected, source)
    for name, tensor in model.state_dict().items():
        check_finite(tensor, name, source.reference)


# Buffers that older versions of transformers saved and newer ones compute: rotary frequencies, positions, causal masks.
_COMPUTED = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|cos_cached|sin_cached|position_ids|attn\.bias|attn\.masked_bias)$"
)
_SCALES = re.compile(r"scale|qweight|qzeros|absmax|quant_map|weight_packed|zero_point|amax")


def check_taken(unexpected: Iterable[str], source: Source) -> None:
    """Refuse unexpected weights, because transformers drops them without an error.

    Args:
        unexpected: `unexpected_keys` of `from_pretrained`, which leaves out the keys in
            `_keys_to_ignore_on_load_unexpected`.

    Raises:
        ModelError: gives the number of unexpected weights and the first three names.
    """
    left = sorted(name for name in map(str, unexpected) if not _COMPUTED.search(name))
    if not left:
        return
    if (wrapped := _wrapped(left)) is not None:
        why = wrapped
    elif source.kind == "gguf":
        why = "the reader of this architecture knows no such tensors; take the safetensors model it was made of"
    elif any(_SCALES.search(name.rpartition(".")[2]) for name in left if ".mixer." not in name):
        why = "its weights are quantized, and nothing in config.json unpacks them; take the unquantized model"
    elif any(name.startswith(("score.", "classifier.", "v_head.")) for name in left):
        why = "it is a classifier or a reward model; take the language model that it was made of"
    else:
        why = "config.json announces none, so the model would be another without them; correct it, or fetch both again"
    named = ", ".join(left[:3])
    number = counted(len(left), "weight has", "weights have")
    raise ModelError(f"{source.reference}: {number} no place in the model ({named}): {why}")


def _wrapped(names: Iterable[str]) -> str | None:
    """Name the wrapper that renamed the weights (peft, torch.compile) and the fix; None if no name matches."""
    for name in names:
        if name.startswith("base_model.model.") or ".lora_" in name or ".base_layer." in name:
            return "adapters of peft are in it; merge them first (model.merge_and_unload()) and save that model"
        if "_orig_mod." in name:
            return "it was saved within torch.compile; save model._orig_mod instead"
    return None


def check_finite(tensor: torch.Tensor, name: str, where: str) -> None:
    """Raises:
    ModelError: the weight `name` of the model at `where` has values that are not finite.
    """
    if not tensor.is_floating_point() or not tensor.numel() or tensor.dtype.itemsize == 1:  # float8 has no reductions
        return
    # `aminmax` reads the tensor once without a copy; NaN and infinities propagate to its result.
    if not all(map(math.isfinite, torch.aminmax(tensor))):
        raise ModelError(f"{where}: {name} has values that are not finite; fetch the weights again")


def default_device() -> str:
    """The first GPU, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


_NAME_ONE = "name the teacher with --teacher ID|FOLDER"


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turn any library exception about a model into a one-line `ModelError`; `LINEARIZE_DEBUG=1` keeps the original."""
    try:
        if source.kind == "hub":
            _reach(source.reference)
        yield
    except ModelError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        if os.environ.get("LINEARIZE_DEBUG") == "1":
            raise
        raise ModelError(f"{source.reference}: {_reason(error, source)}") from error


@cache
def _reach(reference: str) -> None:
    """Ask the Hub once for a model that is not in the cache. The libraries ask six times, which takes 24 seconds
    without a network.

    Raises:
        OSError: the Hub cannot be reached.
    """
    if constants.HF_HUB_OFFLINE or try_to_load_from_cache(reference, "config.json") is not None:
        return
    try:
        get_hf_file_metadata(hf_hub_url(reference, "config.json"), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HfHubHTTPError, FileMetadataError, ValueError):
        return  # an answer, or no name of the Hub: the call for the file itself says which
    except Exception as error:  # of the HTTP library, which is another one in other versions of the client
        raise OSError(f"the Hub cannot be reached: {error}") from error


def _from_gguf(source: Source) -> AbstractContextManager[None]:
    return short_reading() if source.kind == "gguf" else nullcontext()


def _reason(error: Exception, source: Source) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines)
    if "trust_remote_code" in text:
        return "the model brings its own Python code; pass --trust-remote-code if you trust its author"
    if source.kind == "hub" and "named model.safetensors" in text:
        return "the Hub has no safetensors weights of it; convert them where you trust them, with save_pretrained"
    if source.kind == "hub" and isinstance(error, OSError):
        near = nearest(Path(source.reference))
        if "is not a valid model identifier" in text or "404" in text or "gated" in text.lower():
            return f"no local folder or file of this name, and the Hub has no such model (or wants you to log in){near}"
        return (
            "no local folder or file of this name, and the Hub cannot be reached to look for it there; check the name, "
            f"or the network, or fetch it where there is one (hf download) and name the folder{near}"
        )
    if source.kind == "hub" and "Repo id" in text:
        return "neither a local folder or file nor a Hub id (those look like owner/name)"
    if "ignore_mismatched_sizes" in text:
        return "its weights are not of the shapes that config.json asks for; they are of another model"
    if "Float8" in text:
        return "its weights are float8, and config.json names no dtype; add one, or pass --set dtype=bfloat16"
    # The first line of this error has no details.
    told = text if type(error).__name__.startswith("StrictDataclass") else lines[0]
    return f"cannot be read as a model: {type(error).__name__}: {told[:300]}"


def _hint(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter; merge it into its model first, in Python with peft: merge_and_unload()"
    ggufs = sorted(folder.glob("*.gguf"))
    return f"name the file: {ggufs[0]}" if ggufs else "is this a model's folder?"


@contextmanager
def _opening(reference: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"{reference}: cannot be read: {(error.strerror or str(error)).lower()}") from error


def _json_of(source: Source, name: str) -> dict[str, Any]:
    """Read a JSON file of the model; an empty mapping if it is missing or cannot be read."""
    try:
        return _json_at(source, name)
    except (OSError, ValueError, RecursionError):  # the Hub client's errors are subclasses of these
        return {}


def _is_ours(config: dict[str, Any]) -> bool:
    return bool(config.get("model_type") == "linearized")


def _json_at(source: Source, name: str) -> dict[str, Any]:
    if source.kind == "hub":
        _reach(source.reference)
        path = cached_file(source.reference, name)
    else:
        path = str(Path(source.reference) / name) if source.kind == "folder" else None
    found = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    return found if isinstance(found, dict) else {}


def open_model(reference: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any, Source]:
    """Load a pretrained or converted model, its tokenizer and its `Source`."""
    source = find_source(reference, trust_remote_code=trust_remote_code)
    load_config(source)  # an unknown Hub id then costs one request; the calls below would request several files
    tokenizer = load_tokenizer(source)
    return load_model(source, dtype=dtype), tokenizer, source
