"""A rehearsal of the GPU path without a GPU: a converted model on fake CUDA tensors, in plain torch.

    make rehearse-gpu          python -m evals.kernels.rehearsal; needs a CUDA build of torch, and no driver

Fake tensors have a device and a shape, and no values. Operations between devices fail as on a GPU, and every value that
the host would wait for is seen. It fails on a device mismatch, and on a wait that `ALLOWED` does not name. Values,
kernels and the backward pass are not rehearsed: the backward engine asks the driver, and triton needs a device.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

os.environ["LINEARIZE_KERNELS"] = "torch"

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.conversion.swap import convert_model
from linearize.generation.blocks import Blocks
from linearize.generation.engine import _Rows
from linearize.generation.sampling import Sampling
from linearize.recipe import MixerSpec

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTH = 200
# Function -> how often it may wait in a batch, however many layers there are, and the reason.
ALLOWED = {
    "segments_of (layout.py)": (1, "are there pads or documents"),
    "layout_of (attention.py)": (1, "do rows hold documents"),
    "__init__ (layout.py)": (2, "the number of documents, and the longest"),
}
MIXERS: dict[str, dict[str, Any]] = {
    "gla": {},
    "liger-gla": {"mix": "fixed", "covers": "all", "normalize": False, "sinks": 0},
    "gated delta rule": {"recurrence": "gated_deltanet", "feature_map": "identity"},
    "window": {"recurrence": "none", "window": 32},
    "slots": {"recurrence": "none", "window": 16, "landmarks": 32, "memory_dtype": "int8"},
    "slots and gla": {"window": 16, "landmarks": 32, "rope": True, "mix": "softmax"},
}


class Waits(TorchDispatchMode):
    """Counts the places where the host asks for a value of the device, or copies between devices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(func)
        asks = name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select"))
        there = next((x.device.type for x in tree_leaves(args) if isinstance(x, Tensor)), None)
        wanted = kwargs.get("device")
        moves = name.startswith("aten._to_copy") and wanted is not None and torch.device(wanted).type != there
        if asks or moves:
            frames = [frame for frame in traceback.extract_stack() if "/linearize" in frame.filename]
            where = " < ".join(f"{frame.name} ({os.path.basename(frame.filename)})" for frame in frames[:-4:-1])
            self.seen[name, where] += 1
        # A fake tensor has no value: every answer is yes, which takes the longer way.
        return 1 if name.startswith("aten._local_scalar_dense") else func(*args, **kwargs)


def main() -> None:
    if torch.version.cuda is None:
        sys.exit("error: this build of torch has no CUDA, which fake CUDA tensors need; use `make rehearse-gpu`")
    torch.cuda.is_current_stream_capturing = lambda: False
    print("Two faults that must be seen:")
    with FakeTensorMode():
        there = torch.ones(1, device="cuda")
        if tried("a wait", there.item) or tried("two devices", lambda: there + torch.ones(2)):
            sys.exit("error: a planted fault was not seen")
    print(
        "Waits that are allowed, once in a batch:",
        *(f"{n} in {at}: {why}" for at, (n, why) in ALLOWED.items()),
        sep="\n    ",
    )
    failed = [name for name, mixer in MIXERS.items() if not rehearsed(name, MixerSpec(**mixer))]
    if failed:
        sys.exit(f"error: {', '.join(failed)}: see above")


def rehearsed(name: str, spec: MixerSpec) -> bool:
    """Runs every form of a model with this mixer; False if one failed or waited."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    model = convert_model(LlamaForCausalLM(config).to(torch.bfloat16), spec).eval()
    with FakeTensorMode(allow_non_fake_inputs=False):
        to_gpu(model)
        good = [tried(f"{name}, {form}", call) for form, call in forms(model).items()]
    return all(good)


def forms(model: Any) -> dict[str, Callable[[], Any]]:
    """The calls of a model by name; each reads two rows."""
    ids = torch.ones(2, LENGTH, dtype=torch.long, device="cuda")
    documents = (torch.arange(LENGTH, device="cuda") % 70).expand(2, -1)

    def recorded() -> None:
        """The step that a CUDA graph records: it may not wait at all."""
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True)
            rows = _Rows.around(out.past_key_values, 2, model)
            rule = Sampling(max_new_tokens=4, temperature=0.8, top_k=20)
            rows.ends[rule] = torch.zeros(1, dtype=torch.long, device="cuda")
            with Waits() as waits:
                rows.forward(model, masked=False)
                rows.blocks = Blocks(model, fused=False)
                rows.forward(model, masked=True)
                rows.choose(rule)
            if waits.seen:
                raise RuntimeError(f"the recorded step waits: {dict(waits.seen)}")

    def plain(**given: Any) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False, **given)

        return run

    def training() -> None:
        model.train()
        model(input_ids=ids, position_ids=documents, use_cache=False)
        model.eval()

    def chunks() -> None:
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True)
            model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)

    return {
        "prompt": plain(),
        "padded": plain(attention_mask=torch.ones_like(ids)),
        "packed": plain(position_ids=documents),
        "chunks": chunks,
        "recorded step": recorded,
        "training": training,
    }


def to_gpu(model: nn.Module) -> None:
    """Replaces every weight and buffer by a fake CUDA tensor; those that share memory go on sharing it."""
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            fakes[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
        return fakes[id(tensor)]

    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            cast("dict[str, Any]", kept).update(
                {name: fake(tensor) for name, tensor in kept.items() if tensor is not None}
            )


def tried(label: str, call: Callable[[], Any]) -> bool:
    """Runs `call`; prints its waits that are not allowed, and how many are."""
    waits, problems, allowed = Waits(), list[str](), 0
    try:
        with waits:
            call()
    except Exception as error:
        frames = [f"{os.path.basename(x.filename)}:{x.lineno}" for x in traceback.extract_tb(error.__traceback__)]
        problems.append(f"{type(error).__name__}: {str(error).splitlines()[0]} at {' < '.join(frames[:-5:-1])}")
    for (name, where), count in waits.seen.most_common():
        most = next((ALLOWED[place][0] for place in ALLOWED if where.startswith(place)), 0)
        allowed += min(count, most)
        if count > most:
            problems.append(f"waits {count} times, allowed {most}: {name} in {where}")
    print(
        f"{'FAILED' if problems else 'ok    '}  {label}: {allowed} waits" + "".join(f"\n        {p}" for p in problems)
    )
    return not problems


if __name__ == "__main__":
    main()
