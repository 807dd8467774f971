"""The recipe's schema: one pydantic model per section, every key with its range.

Types are strict: a quoted number is not a number, `true` is not 1, and unknown keys are errors.
A section is immutable once read; only `load_recipe` changes a recipe (`--set`).
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

Objective = Literal["sft", "distill", "align"]
OBJECTIVES: tuple[Objective, ...] = ("sft", "distill", "align")

RecurrenceName = Literal[
    "gla",
    "hgrn2",
    "gsa",
    "gated_retention",
    "retention",
    "mamba2",
    "mlstm",
    "rwkv6",
    "rwkv7",
    "gated_deltanet",
    "kda",
    "gateloop",
    "lightnet",
    "rg_lru",
    "mingru",
    "linear",
    "none",
]

BUILTIN, SELF, STUDENT, RECALL = "builtin", "self", "student", "recall"
ENDLESS = (SELF, STUDENT, RECALL)
"""Sources that are generated on demand."""
SELF_TOKENS = 200_000
"""The token budget of these sources when the recipe names none."""

GONE: dict[tuple[str | int, ...], str] = {
    ("mixer", "reach"): "gone; use mixer.landmarks_by or mixer.keep.budget",
}
"""Path of a key of version 0.1.0 -> the error for it. All recipes saved by that version contain the key; null is
dropped, because it has no effect."""

BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%|[kmg]?i?b)?\s*", re.IGNORECASE)


def _refusal(message: str, needs: str | None = None) -> PydanticCustomError:
    """An error of one key; `needs` names the key beside it whose value is at fault."""
    # pydantic prefixes the message of a ValueError and fills in braces of a template, so the text is passed as data.
    return PydanticCustomError("recipe", "{message}", {"message": message, "needs": needs})


def _objective(value: Any) -> Any:
    """One objective, or a mapping of objectives to weights.

    A plain validator, because pydantic would put the name of a union's branch into the error's path.
    """
    names, mixed = (" or ".join((", ".join(known[:-1]), known[-1])) for known in (OBJECTIVES, OBJECTIVES[:2]))
    if isinstance(value, str) and value in OBJECTIVES:
        return value
    if not isinstance(value, dict) or not value:
        raise _refusal(f"expected {names}, or a mapping of {mixed} to weights, got {value!r}")
    for name, weight in value.items():
        if name not in OBJECTIVES:
            raise _refusal(f"unknown objective {name!r}; expected {mixed}")
        if name == "align":
            raise _refusal("align looks at layers and not at what they come to; give it a stage of its own")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise _refusal(f"expected a weight > 0 for {name}, got {weight!r}")
    return {name: float(weight) for name, weight in value.items()}


def _budget(value: Any) -> Any:
    """A share such as `10%`, or bytes: a number, or `2MB`."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    match = BUDGET.fullmatch(text) if isinstance(text, str) else None
    if value is not None and (match is None or float(match[1]) <= 0 or (match[2] == "%" and float(match[1]) > 100)):
        raise _refusal(f"expected a share of the teacher's cache or bytes, such as 10% or 2MB, got {value!r}")
    return text


class Section(BaseModel):
    """Base class of all sections: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # for the JSON schema
    )


class GateSpec(Section):
    """The gate built from pretrained projections. Its input is scale * Pool(source) + bias, and for most recurrences
    log g = logsigmoid(input) / divisor."""

    source: Literal["k", "q", "v", "random"] = "k"
    """The token's key, query or value, or a random linear map of the key."""
    scale: float | None = None
    """Null means the recurrence's own start, which decays slowly."""
    bias: float | None = None
    divisor: float = Field(default=1.0, gt=0)
    learned: bool = True
    """Train scale and bias, one per gate."""
    lower_bound: float = Field(default=0.0, ge=0, lt=1)
    """The minimum of the gate in the last layer; it is 0 in the first and grows linearly with depth."""


class KeepSpec(Section):
    """Layers or heads that keep softmax attention over the whole past, and therefore a growing cache."""

    layers: list[int] = []
    """Whole layers, counted from 0."""
    every: int | None = Field(default=None, ge=2)
    """N keeps every N-th layer whole: layers N - 1, 2N - 1 and so on, in addition to `layers`."""
    heads: dict[int, list[int]] = {}
    """Layer -> key/value heads in it, each with the query heads that share it."""
    budget: Annotated[str | None, PlainValidator(_budget)] = None
    """Bytes of caches, or a share of the teacher's. `convert` then chooses more layers or heads to keep, by the damage
    of windowing them; the recipe saved with the result names its choice."""
    by: Literal["recall", "loss"] = "recall"
    """The damage that counts: `recall` adds loss of recall to loss on text, `loss` is that on text alone."""
    unit: Literal["layers", "heads"] = "layers"
    """Unit of the choice: whole layers, or key/value heads."""
    context: int | None = Field(default=None, ge=1)
    """Tokens of a sequence at which the budget holds; null means the length that the model was trained on."""

    @field_validator("layers", "heads")
    @classmethod
    def _counts_from_0(cls, value: Any) -> Any:
        numbers = [*value, *(head for heads in value.values() for head in heads)] if isinstance(value, dict) else value
        if any(number < 0 for number in numbers):
            raise _refusal(f"expected layers and heads counted from 0, got {min(numbers)}")
        return value

    def whole(self, count: int) -> set[int]:
        """Indexes of the layers that are kept whole, of `count` layers."""
        return {*self.layers, *(range(self.every - 1, count, self.every) if self.every else ())}


class MixerSpec(Section):
    """The layer that replaces an attention block: a softmax window with sinks, beside a recurrence."""

    recurrence: RecurrenceName = "gla"
    window: int = Field(default=64, ge=1)
    """Most recent tokens under softmax attention."""
    windows: dict[int, Annotated[int, Field(ge=1)]] = {}
    """Layer -> its window, if it differs from `window`. Recipes that version 0.1.0 saved with its checkpoints contain
    this key, and `linearize export` reads those recipes."""
    sinks: int = Field(default=4, ge=0)
    """First tokens of the text that stay under softmax attention."""
    mix: Literal["fixed", "learned", "softmax"] = "learned"
    covers: Literal["all", "evicted"] = "evicted"
    feature_map: Literal["softmax", "exp", "elu", "identity", "learned"] = "softmax"
    """Feature map of queries and keys before the state; exp and learned are Hedgehog's pair of softmaxes."""
    rope: bool = False
    """Apply rotary positions in the recurrence; the window always has them."""
    qk_norm: bool = False
    """Scale queries and keys to length 1 before the feature map."""
    normalize: bool = True
    """Divide the output by its mass, if the recurrence has one."""
    slots: int = Field(default=0, ge=0)
    """Slots of gsa; 0 means the head width."""
    negative_eigenvalues: bool = False
    """Write strengths up to 2, for gated_deltanet and kda."""
    gate: GateSpec = GateSpec()
    landmarks: int = Field(default=0, ge=0)
    """Tokens per key/value head that stay under softmax attention after they leave the window, chosen online."""
    landmark_layers: dict[int, int] = {}
    """Layer -> its own number of landmarks, instead of `landmarks`."""
    landmarks_by: Literal["recall", "loss"] | None = None
    """`convert` redistributes the landmarks among the layers, by the loss of each layer with fewer of them; the total
    is at most `landmarks` per layer. `recall` counts loss of recall in addition to loss on text. The saved recipe names
    the numbers in `landmark_layers`."""
    landmark_score: Literal["novelty", "learned"] = "novelty"
    """The static part of a token's rank: `novelty`, or `learned`, a map of keys and values that `convert` fits."""
    memory_dtype: Literal["auto", "int8", "int4"] = "auto"
    """Storage of keys and values in the memory: `auto` in the model's dtype; `int8` with one scale per token and head;
    `int4` with landmarks in 4 bits and window and sinks in 8. `convert` also fits a scale per channel of the keys: with
    `int4` always, with `int8` if it reads text for another choice."""
    keep: KeepSpec = KeepSpec()

    @field_validator("windows")
    @classmethod
    def _counts_from_0(cls, value: dict[int, int]) -> dict[int, int]:
        if any(layer < 0 for layer in value):
            raise _refusal(f"expected layers counted from 0, got {min(value)}")
        return value

    @field_validator("landmark_layers")
    @classmethod
    def _numbers_from_0(cls, value: dict[int, int]) -> dict[int, int]:
        if any(number < 0 for pair in value.items() for number in pair):
            raise _refusal("expected layers counted from 0, each with a number of landmarks")
        return value

    @field_validator("landmark_score")
    @classmethod
    def _scores_landmarks(cls, value: str, info: ValidationInfo) -> str:
        if value == "learned" and not (
            info.data.get("landmarks") or any(info.data.get("landmark_layers", {}).values())
        ):
            raise _refusal("there are no landmarks to choose: set mixer.landmarks, or leave this out", "landmarks")
        return value

    @field_validator("landmarks_by")
    @classmethod
    def _has_some_to_share(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not info.data.get("landmarks"):
            raise _refusal("there are no landmarks to share out: set mixer.landmarks, or leave this out", "landmarks")
        return value

    @field_validator("memory_dtype")
    @classmethod
    def _has_slots_to_round(cls, value: str, info: ValidationInfo) -> str:
        if (
            value == "int4"
            and not info.data.get("landmarks")
            and not any(info.data.get("landmark_layers", {}).values())
        ):
            raise _refusal(
                "int4 stores landmarks alone in 4 bits, and there are none: set mixer.landmarks, or use int8",
                "landmarks",
            )
        return value

    @field_validator("normalize")
    @classmethod
    def _softmax_mix_is_normalised(cls, value: bool, info: ValidationInfo) -> bool:
        # One shared normaliser needs the recurrence's mass in addition to the window's log-sum-exp.
        if not value and info.data.get("mix") == "softmax":
            raise _refusal("mix: softmax needs normalize: true")
        return value


_Name = Annotated[str | None, Field(min_length=1)]

RECORD_SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("tools", "system")),
    "prompt": (("prompt", "completion"), ("tools",)),
    "instruction": (("instruction", "output"), ("input", "system", "history")),
    "text": (("text",), ()),
}
"""Shape of a record -> its required and its optional fields. A record has the first shape that fits it."""


class Columns(Section):
    """The fields of a record that linearize reads, if they have other names than the keys here."""

    text: _Name = None
    messages: _Name = None
    """A conversation; found automatically under `messages`, `conversations` and `conversation`."""
    tools: _Name = None
    system: _Name = None
    instruction: _Name = None
    input: _Name = None
    output: _Name = None
    history: _Name = None
    """Earlier turns of an instruction: pairs of a question and its answer."""
    prompt: _Name = None
    completion: _Name = None

    @model_validator(mode="after")
    def _of_one_shape(self) -> Columns:
        if self.named and not self.shapes:
            raise _refusal(f"{', '.join(self.named)} do not belong to one record; expected fields of one of {_SHAPES}")
        return self

    @property
    def named(self) -> dict[str, str]:
        """The fields that the recipe names."""
        return {key: name for key, name in self if name is not None}

    @property
    def shapes(self) -> list[str]:
        """The shapes that contain every field named here."""
        return [shape for shape, (must, may) in RECORD_SHAPES.items() if self.named.keys() <= {*must, *may}]


_SHAPES = "; ".join(", ".join((*must, *may)) for must, may in RECORD_SHAPES.values())


class SourceSpec(Section):
    """A source of text."""

    source: str | None = Field(default=None, min_length=1)
    """`self` (the teacher generates the text), `student` (the model at the start of the stage generates it), `recall`
    (generated questions about facts and pairs), `builtin` (the text that comes with the package: 140,000 tokens of
    English books and reference works), a file (text, .jsonl, .json, .csv, .tsv or .parquet, also compressed), a folder
    of such files or of `datasets`' `save_to_disk`, or a data set id of the Hub."""
    config: str | None = Field(default=None, min_length=1)
    split: str = Field(default="train", min_length=1)
    field: str | None = Field(default=None, min_length=1)
    """Short for `columns: {text: ...}`, or `columns: {messages: ...}` if it holds a list."""
    columns: Columns | None = None
    format: Literal["auto", "text", "instruction"] = "auto"
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of generated text."""
    sample_length: int | None = Field(default=None, ge=1)
    """Tokens of one generated text of `self`, `student` or `recall`; null means the stage's `length`."""

    @field_validator("columns")
    @classmethod
    def _names_fields_once(cls, value: Columns | None, info: ValidationInfo) -> Columns | None:
        if value is not None and info.data.get("field") is not None:
            raise _refusal("expected field or columns, not both; columns says all that field says")
        return value

    @field_validator("format")
    @classmethod
    def _is_the_shape_of_columns(cls, value: str, info: ValidationInfo) -> str:
        if value != "auto" and info.data.get("columns") is not None:
            raise _refusal("columns says the format already; leave format out")
        return value


class MixedSource(SourceSpec):
    """One source of several."""

    weight: float = Field(default=1.0, gt=0)
    """Its share of the rows, against the other sources' weights."""

    @model_validator(mode="after")
    def _is_named(self) -> MixedSource:
        if self.source is None:
            raise _refusal("missing key; expected a source")
        return self


class DataSpec(SourceSpec):
    """Text of a stage: one `source`, or several under `mix`."""

    tokens: int | None = Field(default=None, ge=1)
    """Token budget of the whole data; null takes all of it (`SELF_TOKENS` of a generated source)."""
    held_out: int = Field(default=16, ge=0)
    """Rows of the stage's `length` held out for evaluation."""
    mix: list[MixedSource] = []
    """Several sources instead of one, by weight; needs `tokens`."""

    @field_validator("tokens")
    @classmethod
    def _endless_has_a_budget(cls, value: int | None, info: ValidationInfo) -> int | None:
        return SELF_TOKENS if value is None and info.data.get("source") in ENDLESS else value

    @model_validator(mode="after")
    def _one_source_or_several(self) -> DataSpec:
        if self.source is None and not self.mix:
            raise _refusal("names no text; expected a source, or sources under mix")
        if self.source is not None and self.mix:
            raise _refusal("has both source and mix; keep one of them")
        if self.mix and self.columns is not None:
            raise _refusal("has a mix and columns; move columns to the sources of the mix that need them")
        if self.mix and self.tokens is None:
            raise _refusal("has a mix and no tokens; expected how many there are to be of all sources together")
        return self

    @classmethod
    def of(cls, source: SourceSpec, *, tokens: int, held_out: int) -> DataSpec:
        """The data of one source with a token budget."""
        return cls(**source.model_dump(), tokens=tokens, held_out=held_out)

    @property
    def sources(self) -> list[SourceSpec]:
        """The single source, or all sources of the mix."""
        return list(self.mix) or [self]


class CalibrateSpec(Section):
    """Layer-wise fit by `convert`, without training. Each layer's own parameters and its output projection are fitted
    to the output of the teacher's attention. No gradient passes through more than one layer."""

    tokens: int = Field(default=65_536, ge=1)
    """Tokens of text to fit to; `held_out` more rows of `length` tokens decide which fits are kept."""
    source: str = Field(default=SELF, min_length=1)
    """`builtin` (the text that comes with the package), `self` (the teacher generates the text), a
    .txt/.md/.jsonl/.json/.parquet file, or a data set id of the Hub."""
    config: str | None = Field(default=None, min_length=1)
    split: str = Field(default="train", min_length=1)
    field: str | None = Field(default=None, min_length=1)
    length: int = Field(default=1024, ge=2)
    """Tokens of a row; only tokens beyond window and sinks affect the fit."""
    held_out: int = Field(default=8, ge=2)
    """Rows, and the same number of texts with needles, that decide which fits are kept."""
    inputs: Literal["student", "teacher"] = "student"
    """Inputs of a layer during its fit: the outputs of the converted layers below it, or the teacher's."""
    steps: int = Field(default=100, ge=0)
    """Gradient steps of each layer's own parameters, one row each; 0 stops after the closed forms."""
    step_size: float = Field(default=0.03, gt=0)
    """Step size of the first step; cosine decay to 0."""
    ridge: bool = True
    """Fit the output projection too, by ridge regression."""

    @property
    def text(self) -> SourceSpec:
        """The source of the text, which `convert` also uses for its choices."""
        return SourceSpec(source=self.source, config=self.config, split=self.split, field=self.field)


class Stage(Section):
    """One pass of training: an objective on some text with its own optimizer settings."""

    objective: Annotated[Objective | dict[Objective, float], PlainValidator(_objective)]
    data: DataSpec
    length: int = Field(default=512, ge=2)
    """Tokens of a training row."""
    batch_tokens: int = Field(default=8192, ge=2)
    """Tokens of an optimizer step: a multiple of `length`."""
    micro_batch: int = Field(default=1, ge=1)
    """Rows of a forward pass; a step accumulates gradients over its rows."""
    train: Literal["lora", "mixer", "full"] = "lora"
    """Trained parameters: adapters and the layer's own parameters; the layer's own parameters only; or every weight,
    without adapters."""
    optimizer: Literal["adamw", "adafactor", "adamw8bit"] = "adamw"
    """`adamw8bit` needs a GPU and bitsandbytes."""
    lr: float = Field(default=1e-3, ge=0)
    """Peak learning rate of the adapters or, under `train: full`, of the pretrained weights."""
    mixer_lr: float = Field(default=1e-2, ge=0)
    """Peak learning rate of the layer's own parameters."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warm-up; `wsd` stays at the peak and decays, as 1 - sqrt, over the last fifth of the steps."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps."""
    epochs: float = Field(default=1.0, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, ge=0)
    """Maximum gradient norm; 0 does not clip."""
    gradient_checkpointing: bool = False
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 means about ten checkpoints in a run."""
    eval_every: int | None = Field(default=None, ge=0)
    """Steps between evaluations on the held-out rows; 0 means none, null a number with little cost, at most 10."""
    keep: Literal["last", "best"] = "last"
    """The stage's final weights: the last ones, or those with the lowest held-out loss."""
    patience: int | None = Field(default=None, ge=1)
    """The stage ends after this many evaluations without a lower held-out loss; null disables it."""
    skip_bad_batches: int = Field(default=0, ge=0)
    """Optimizer steps that may be skipped because of a loss or gradient that is not finite; one more ends the run."""
    temperature: float = Field(default=1.0, gt=0)
    """Softening of both distributions under `distill`."""
    top_k: int | None = Field(default=None, ge=1)
    """Under `distill`, the number of the teacher's most likely tokens whose probabilities are compared; all other
    tokens count as one."""
    teacher_at: Literal["device", "cpu", "disk"] = "device"
    """Location of the teacher: on the student's device; in CPU memory, moved layer by layer; or on disk, as its `top_k`
    log-probabilities, which are written before the stage begins."""
    hide_window: float = Field(default=0.0, ge=0, le=1)
    """Probability that a layer's window is masked except for its last token and the sinks, so that the output needs the
    recurrence; drawn for each layer and forward pass."""
    beyond: float = Field(default=0.5, ge=0, le=1)
    """Under `align`, the share of first steps in which the recurrence alone is trained, on the attention output beyond
    the window; later steps train the layer's whole output."""

    @field_validator("batch_tokens")
    @classmethod
    def _whole_rows(cls, value: int, info: ValidationInfo) -> int:
        length = info.data.get("length")
        if length is not None and value % length:
            raise _refusal(f"expected a multiple of length ({length}), got {value}")
        return value

    @field_validator("keep", "patience")
    @classmethod
    def _is_evaluated(cls, value: str | int | None, info: ValidationInfo) -> str | int | None:
        data = info.data.get("data")
        held_out = data.held_out if isinstance(data, DataSpec) else None
        if value not in ("last", None) and (info.data.get("eval_every") == 0 or held_out == 0):
            raise _refusal("looks at held-out losses; expected data.held_out and eval_every not to be 0")
        return value

    @field_validator("teacher_at")
    @classmethod
    def _kept_logits_are_few(cls, value: str, info: ValidationInfo) -> str:
        objective = info.data.get("objective", ())
        if value == "disk" and "distill" not in ([objective] if isinstance(objective, str) else objective):
            raise _refusal("disk keeps the teacher's logits, which distill alone looks at; expected device or cpu")
        if value == "disk" and info.data.get("top_k") is None:
            raise _refusal("disk has room for the teacher's most likely tokens only; set top_k, for example to 64")
        return value

    @property
    def weights(self) -> dict[Objective, float]:
        """Each objective of the stage with its weight in the loss."""
        return dict(self.objective) if isinstance(self.objective, dict) else {self.objective: 1.0}


class LoraSpec(Section):
    """Low-rank adapters on the projections; `lora: null` trains the layer's own parameters only."""

    kind: Literal["lora", "rslora", "dora", "pissa", "miss"] = "lora"
    """As in peft; `miss` was called Bone, and has no alpha."""
    rank: int = Field(default=8, ge=1)
    alpha: int = Field(default=8, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] = Field(default=["q", "k", "v"], min_length=1)
    """Short names (q, k, v, o, gate, up, down) or the last component of a module's name."""
    four_bit: bool = False
    """Frozen weights in 4 bits (NF4) while adapters train, as in QLoRA; the checkpoint has full weights. Needs
    bitsandbytes."""


class EvaluateSpec(Section):
    """Evaluation after the last stage, and its baselines."""

    tasks: list[str] = []
    limit: int | None = Field(default=None, ge=1)
    """Examples per task; null takes all."""
    baselines: list[Literal["teacher", "window", "window_bytes", "no_recurrence"]] = [
        "teacher",
        "window_bytes",
        "no_recurrence",
    ]
    """`window_bytes` is the teacher with a window alone, of as many bytes as the model's memory; `window` has the
    model's own window and sinks; `no_recurrence` is the trained model with its recurrence off."""


class Recipe(Section):
    """A whole experiment: the model, its mixer, and the training stages."""

    description: str = ""
    measured: str = ""
    """Measured figures of the recipe, and its cost."""
    model: str | None = Field(default=None, min_length=1)
    teacher: str | None = Field(default=None, min_length=1)
    """Null means the model's own base."""
    mixer: MixerSpec = MixerSpec()
    calibrate: CalibrateSpec | None = None
    """Null skips the fit: the layer starts as its window and sinks."""
    stages: list[Stage] = []
    lora: LoraSpec | None = LoraSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    seed: int = Field(default=0, ge=0, lt=2**32)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers that training reports to, in addition to its metrics.jsonl; each needs its own package."""
