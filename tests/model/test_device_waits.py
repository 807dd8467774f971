"""A forward in plain torch on a GPU reads no value back: each one would make the host wait for the device.

There is no GPU here. `AsOnGpu` has tensors of the CPU say that they are on one, and a dispatch mode sees each operation
that reads a value.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.conversion.swap import convert_model
from linearize.recipe import load_recipe
from tests.made import LANDMARKS
from tests.model.test_families import build

_READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.masked_select", "aten.equal")


class AsOnGpu(TorchFunctionMode):
    """Tensors are said to be on a GPU; what is to be made there is made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cuda", 0)
        return func(*map(self._here, args), **{name: self._here(value) for name, value in (kwargs or {}).items()})

    def _here(self, value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


class Reads(TorchDispatchMode):
    """Counts operations that read a value, or whose shape depends on one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        boolean = str(func).startswith("aten.index.") and any(
            x is not None and x.dtype == torch.bool for x in args[1] if isinstance(x, torch.Tensor)
        )
        self.count += boolean or str(func).startswith(_READS)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gates", ["weak", "strong"])
@pytest.mark.parametrize("name", ["window-gla", "kda", "gsa", "gated-deltanet", "rwkv7", "liger-gla", LANDMARKS])
def test_no_value_is_read_and_the_numbers_are_the_cpus(name, gates, monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", "torch")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    changes = ["mixer.landmarks=32"] if name == LANDMARKS else []
    torch.manual_seed(0)
    model = convert_model(build("llama"), load_recipe(name, ["mixer.window=8", *changes]).mixer).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("mix_weight"):
            parameter.data.fill_(0.5)
        elif gates == "strong" and "gate" in parameter_name:
            parameter.data.mul_(30).sub_(3)
    ids = torch.randint(5, 97, (2, 150))

    def forwards() -> list[torch.Tensor]:
        whole = model(input_ids=ids, use_cache=False).logits
        prompt = model(input_ids=ids[:, :100], use_cache=True)
        more = model(input_ids=ids[:, 100:], past_key_values=prompt.past_key_values, use_cache=True)
        step = model(input_ids=ids[:, :1], past_key_values=more.past_key_values, use_cache=True)
        return [whole, prompt.logits, more.logits, step.logits]

    with torch.no_grad():
        expected = forwards()
        with AsOnGpu(), Reads() as reads:
            assert ids.device.type == "cuda"
            found = forwards()
    assert reads.count == 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_what_the_dispatch_mode_counts():
    x = torch.arange(4.0)
    with Reads() as reads:
        x[x > 1]
        x.sum().item()
        bool((x > 1).any())
        torch.equal(x, x)
    assert reads.count >= 4
