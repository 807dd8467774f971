"""`linearize bench` as a function: loads the models, measures them, and returns the figures as data."""

from __future__ import annotations

import math
import platform
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from linearize_kernels.products import leave_products, onednn_is_faster, take_products

from linearize.benchmark.running import ahead_from, decode, prefill
from linearize.benchmark.shapes import fewer_layers, named_config
from linearize.benchmark.subjects import Subject, converted_from, cut, random_teacher, sharing, teacher_beside
from linearize.benchmark.training import train
from linearize.checkpoint.write import versions
from linearize.conversion.swap import check_convertible
from linearize.errors import ModelError
from linearize.model import LinearizedForCausalLM
from linearize.quantization.rounding import to_int8
from linearize.report.formatting import readable_bytes
from linearize.runtime.interruption import Interrupted
from linearize.runtime.memory import bandwidth, free_bytes
from linearize.sources.limits import check_length
from linearize.sources.source import DTYPES, Source, default_device, find_source, load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from linearize.recipe import MixerSpec

DECODE_LENGTHS = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
# Reading a long text takes minutes, so longer lengths are read only if the user sets the limit.
PREFILL_UP_TO = {"cpu": 4096, "cuda": 65_536}
GRAPHED = ("cuda",)  # devices on which the teacher also decodes as a CUDA graph
STEPS = {"cpu": 8, "cuda": 128}


@dataclass(frozen=True)
class Plan:
    """Options of a benchmark: lengths, batches and models.

    Attributes:
        lengths: tokens of context, for decoding.
        batches: numbers of sequences.
        prefill_up_to: the longest of `lengths` for the prefill; None is the device's default.
        steps: decoded tokens per run; None is the device's default.
        repeats: runs of each model at each length, of which the median counts.
        teacher: measure the teacher too.
        int8: measure the converted model with int8 weights too.
        train: row lengths of LoRA steps, for model and teacher; empty measures no training.
    """

    lengths: tuple[int, ...] = DECODE_LENGTHS
    batches: tuple[int, ...] = (1,)
    prefill_up_to: int | None = None
    steps: int | None = None
    repeats: int = 5
    teacher: bool = True
    int8: bool = False
    train: tuple[int, ...] = ()


def bench(
    reference: str | None,
    spec: MixerSpec,
    plan: Plan,
    *,
    config: str | None = None,
    layers: int | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure and return the facts: the setting, a row for each model, kind, batch and length, and the length from
    which the converted model is faster.

    SIGINT or SIGTERM ends it after the last length that is measured, if there is one; `stopped_by` is then the signal.

    Args:
        reference: a converted checkpoint, or a pretrained model, which is converted in memory; None with `config`.
        spec: the mixer of the conversion; ignored for a converted checkpoint.
        config: the name of a configuration for random weights.
        layers: the number of first layers to keep; None keeps all.
        dtype: the dtype of weights and caches; `auto` is the checkpoint's own, or for random weights the device's
            default.
        say: called with a line after each length.

    Raises:
        ModelError: the model cannot be read, is not supported, or does not fit into memory.
        DataError: the model has fewer learned positions than the longest length.
    """
    device = default_device()
    teacher, model, setting = _models(reference, spec, config, layers, dtype, device, trust_remote_code)
    if plan.train and model.config.quantized:
        raise ModelError(f"{reference}: its weights are integers, which cannot be trained; leave --train out")
    subjects = [Subject.of("teacher", teacher)] if plan.teacher else []
    if plan.teacher and device in GRAPHED:
        subjects.append(Subject.of("teacher-graph", teacher, graph=True))
    if plan.teacher and device == "cpu" and teacher.dtype == torch.float32 and onednn_is_faster():
        fast = sharing(teacher)
        take_products(fast)
        subjects.append(Subject.of("teacher-onednn", fast))
    subjects.append(Subject.of("model", model))
    trained = [subject for subject in subjects if not subject.graph] if plan.train else []
    if plan.int8:
        subjects.append(Subject.of("int8", to_int8(sharing(model))))
    limit = PREFILL_UP_TO[device] if plan.prefill_up_to is None else plan.prefill_up_to
    steps = plan.steps or STEPS[device]
    # A converted model continues its memory in each repeat, because its memory does not grow.
    check_length(
        model, max(plan.lengths, default=0) + steps * (plan.repeats + 2), "--lengths, measured steps included,"
    )
    check_length(model, max(plan.train, default=0), "--train")
    rows: list[dict[str, Any]] = []
    roof = bandwidth(torch.device(device))
    stopped_by = None
    try:
        with torch.no_grad():
            for batch in plan.batches:
                for tokens in plan.lengths:
                    rows += decode(subjects, batch, tokens, steps=steps, repeats=plan.repeats, say=say)
                for tokens in plan.lengths:
                    if tokens <= limit:
                        rows += prefill(subjects, batch, tokens, repeats=plan.repeats, say=say)
                for tokens in plan.train:
                    rows += train(trained, batch, tokens, repeats=plan.repeats, say=say)
    except (KeyboardInterrupt, Interrupted) as stop:
        if not rows:
            raise
        stopped_by = stop.signum if isinstance(stop, Interrupted) else int(signal.SIGINT)
    for row in rows:
        if row["kind"] == "decode" and "skipped" not in row:
            row["roof_share"] = row["tokens_per_second"] / row["batch"] * row["step_bytes"] / roof
    return {
        **setting,
        "mixers": model.config.mixers,
        "attention": "sdpa",
        "backend": device,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "copy_bytes_per_second": roof,
        "versions": versions(),
        "repeats": plan.repeats,
        "stopped_by": stopped_by,
        "prefill_up_to": limit,
        "weights_bytes": {subject.name: subject.weights_bytes for subject in subjects},
        "rows": rows,
        "ahead_from": {
            subject.name: {
                kind: {str(batch): ahead_from(rows, kind, batch, subject.name) for batch in plan.batches}
                for kind in ("decode", "prefill", *(("train",) if subject in trained else ()))
            }
            for subject in subjects
            if subject.converted and plan.teacher
        },
    }


def _models(
    reference: str | None,
    spec: MixerSpec,
    config: str | None,
    layers: int | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, LinearizedForCausalLM, dict[str, Any]]:
    """The teacher, the converted model on the same weights, and their entries in the facts."""
    if config is not None:
        shape = named_config(config)
        whole = shape.num_hidden_layers
        shape = named_config(config, layers)
        chosen = DTYPES.get(dtype) or (torch.float32 if device == "cpu" else torch.bfloat16)
        check_convertible(shape, Source(config, "hub"), spec)
        _check_weights(shape, chosen, device)
        teacher = random_teacher(shape, chosen, device)
        model = converted_from(teacher, spec)
    else:
        source = find_source(str(reference), trust_remote_code=trust_remote_code)
        loaded: Any = load_model(source, dtype=dtype)
        if isinstance(loaded, LinearizedForCausalLM):
            model, whole = loaded, len(loaded.attention_layers)
            if layers is not None and layers != whole:
                raise ModelError(
                    "--layers cuts pretrained models and configurations; a converted checkpoint stays whole"
                )
            teacher = teacher_beside(model)
        else:
            check_convertible(loaded.config, source, spec)
            leave_products(loaded)  # the teacher runs as in plain transformers
            teacher, whole = loaded, loaded.config.num_hidden_layers
            if layers is not None:
                cut(teacher, fewer_layers(layers, whole))
            model = converted_from(teacher, spec)
    setting = {
        "model": config or reference,
        "weights": "random" if config else "the model's",
        "layers": len(model.attention_layers),
        "layers_of_the_whole": whole,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return teacher, model, setting


def _check_weights(config: Any, dtype: torch.dtype, device: str) -> None:
    """Raises:
    ModelError: the weights do not fit into memory; the text names the number of layers that fit.
    """
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for name, p in model.named_parameters() if ".layers.0." in name)
    free = 0.85 * free_bytes(torch.device(device))
    if parameters * dtype.itemsize <= free:
        return
    rest = parameters - block * config.num_hidden_layers
    fits = math.floor((free / dtype.itemsize - rest) / block)
    hint = f"--layers {fits} would fit" if fits >= 1 else "not even one layer would fit; choose a smaller --config"
    raise ModelError(
        f"{config.num_hidden_layers} layers take {readable_bytes(parameters * dtype.itemsize)} in "
        f"{str(dtype).removeprefix('torch.')} and {readable_bytes(free)} are free; {hint}"
    )


def sequence_of(rows: Sequence[dict[str, Any]], kind: str, system: str, batch: int) -> list[dict[str, Any]]:
    """The rows of one line of a plot, without skipped ones."""
    return [
        row
        for row in rows
        if (row["kind"], row["system"], row["batch"]) == (kind, system, batch) and "skipped" not in row
    ]
