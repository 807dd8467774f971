"""The kernels' machine code for Hopper, compiled ahead of time on a machine without a GPU, and a model of its cycles.

`launches` records the calls of a forward and a backward pass on tensors without storage. `compile_launch` compiles a
recorded call as a launch on a GPU would specialise it: operand types, pointers aligned to 16 bytes, divisible integers.
Registers, spills, shared memory and instructions are those of the program. Cycles are an estimate: for each loop of the
code, the cycles that the busiest pipe of a quarter of a multiprocessor needs for one warp.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TARGET = 90
REGISTERS, SHARED_MEMORY, WARPS = 65536, 233472, 64  # of a multiprocessor
BLOCK_SHARED_MEMORY = 232448  # bytes that one block may allocate
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """A recorded call of a kernel.

    Attributes:
        signature, constants, attributes: the specialisation, as `triton.compiler.ASTSource` takes it.
    """

    kernel: Any
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def key(self) -> str:
        """Equal for calls that share one compiled program."""
        parts = (self.signature, {k: str(v) for k, v in self.constants.items()}, self.attributes, self.options)
        return self.name + str([sorted(part.items()) for part in parts])


@dataclass(frozen=True)
class Loop:
    """One pass through a loop's own instructions: the cycles of each pipe, and how many there are of each name; `start`
    is -1 for those outside of loops."""

    start: int
    cycles: Counter[str]
    instructions: Counter[str]


@dataclass(frozen=True)
class Program:
    """The machine code of a launch; `spills` and `shared` in bytes."""

    name: str
    warps: int
    registers: int
    spills: int
    shared: int
    instructions: Counter[str] = field(repr=False)
    loops: tuple[Loop, ...] = field(repr=False)

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps)
        return max(1, min(by_registers, SHARED_MEMORY // (self.shared + 1024), WARPS // self.warps, 32))

    @property
    def tensor_cores(self) -> str:
        return "wgmma" if self.instructions["HGMMA"] else "mma.sync" if self.instructions["HMMA"] else "none"

    def cycles(self, trips: Sequence[float]) -> float:
        """Estimated cycles of a warp, where its loops, in the order of the code, run `trips` times."""
        counts = (1.0, *trips)
        total = 0.0
        for index, loop in enumerate(self.loops):
            total += max(loop.cycles.values(), default=0) * (counts[index] if index < len(counts) else 1.0)
        return total


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Replace every launch of a Triton kernel by a record of it."""
    # Launching modules are imported before the checks are replaced, as they take `interpreted` over by name.
    from linearize_kernels import (  # noqa: F401
        block_triton,
        dispatch,
        landmark_pool_triton,
        landmark_text_triton,
        landmark_triton,
        liger,
        liger_autograd,
        step_triton,
    )
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        values = dict(zip((p.name for p in kernel.params), args, strict=False)) | named
        size = grid({p.name: values.get(p.name, p.default) for p in kernel.params}) if callable(grid) else grid
        found.append(_specialised(kernel, tuple(size), values, options))

    # Only the checks of the device are replaced, so operands are those of a GPU.
    checks = (mock.patch.object(module, "interpreted", lambda: True) for module in (liger, dispatch))
    with mock.patch.object(JITFunction, "run", record), next(checks), next(checks):
        yield found


def _specialised(kernel: Any, grid: tuple[int, ...], values: dict[str, Any], options: dict[str, Any]) -> Launch:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = values.get(name, parameter.default)
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = _POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return Launch(kernel, grid, signature, constants, attributes, options)


def launches(
    heads: int,
    groups: int,
    width: int,
    tokens: int,
    *,
    rows: int = 1,
    window: int = 64,
    sinks: int = 4,
    mix: str = "learned",
    gates: str = "key",
    dtype: torch.dtype = torch.bfloat16,
    gradients: bool = True,
) -> tuple[list[Launch], list[Launch]]:
    """The launches of a forward pass, and of its backward pass, on `rows` texts of `tokens` tokens."""
    from linearize_kernels.liger import liger_attention
    from linearize_kernels.liger_options import Columns, Gate, LigerOptions

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=of, device="meta", requires_grad=gradients)

    total = tokens * rows
    gate: Any = empty(total, groups, width if gates == "channel" else 1, of=torch.float32)
    if gates == "key":
        gate = Gate(*(empty(groups, width, of=torch.float32) for _ in range(2)))
    weight = None if mix == "fixed" else empty(heads, *([width] if mix == "learned" else []), of=torch.float32)
    q_rotated, q = (empty(total, heads, width) for _ in range(2))
    k_rotated, v, k = (empty(total, groups, width) for _ in range(3))
    columns = Columns(*(empty(rows, sinks, groups, width) for _ in range(2)), sinks) if sinks else None
    options = LigerOptions(window, width**-0.5, mix=mix)  # type: ignore[arg-type]
    with recording() as found:
        outputs, _ = liger_attention(
            q_rotated, k_rotated, v, q, k, gate, options, mix_weight=weight, columns=columns, rows=rows
        )
        ahead = list(found)
        if gradients:
            outputs.backward(torch.empty_like(outputs))
    return ahead, found[len(ahead) :]


_PROGRAMS: dict[str, Program] = {}


def compile_launch(launch: Launch) -> Program:
    """The program of a launch; compiled once per specialisation."""
    if launch.key not in _PROGRAMS:
        _PROGRAMS[launch.key] = _compile(launch)
    return _PROGRAMS[launch.key]


def _compile(launch: Launch) -> Program:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, signature=launch.signature, constexprs=launch.constants, attrs=launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", TARGET, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        Path(binary.name).write_bytes(compiled.asm["cubin"])
        used, code = _tool("cuobjdump", "--dump-resource-usage", binary.name), _tool("nvdisasm", "-c", binary.name)
    registers = re.search(r"REG:(\d+)", used)
    if registers is None:
        raise RuntimeError(f"{launch.name}: cuobjdump prints no registers: {used}")
    instructions, loops, spills = read_code(code)
    return Program(
        launch.name,
        launch.options.get("num_warps", 4),
        int(registers[1]),
        spills,
        compiled.metadata.shared,
        instructions,
        loops,
    )


def _tool(name: str, *arguments: str) -> str:
    command = [str(_tools() / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603


@cache
def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?)([A-Z][A-Za-z0-9_.]+)\s*(.*?);")
_LABEL = re.compile(r"^(\.L_\w+):")


def read_code(text: str) -> tuple[Counter[str], tuple[Loop, ...], int]:
    """Instructions by name, the loops of a listing of `nvdisasm` in the order of their starts, and the bytes that one
    thread spills: those of all stores to its own memory and all loads from it."""
    code: list[tuple[str, str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.search(line):
            code.append((found[2].strip(), found[3], found[4]))
    ends: dict[int, int] = {}
    for index, (_, name, rest) in enumerate(code):
        target = re.search(r"`\((\.L\w+)\)", rest) if name.startswith("BRA") else None
        if target and labels.get(target[1], index) < index:
            start = labels[target[1]]
            ends[start] = max(index, ends.get(start, 0))
    loops = sorted(ends.items())
    # An instruction belongs to the innermost loop around it.
    owner = [-1] * len(code)
    for start, end in sorted(loops, key=lambda loop: loop[0] - loop[1]):
        owner[start : end + 1] = [start] * (end + 1 - start)
    cycles: dict[int, Counter[str]] = {start: Counter() for start in (-1, *sorted(ends))}
    held: dict[int, Counter[str]] = {start: Counter() for start in cycles}
    for start, (_, name, _) in zip(owner, code, strict=True):
        cycles[start].update(_pipes(name))
        held[start][name.split(".")[0]] += 1
    names = sum(held.values(), Counter())
    spills = sum(4 * _width(name) for _, name, _ in code if name.split(".")[0] in ("STL", "LDL"))
    return names, tuple(Loop(start, cycles[start], held[start]) for start in cycles), spills


_FLOATS = {"FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FFMA32I", "FSWZADD", "FCHK"}
# Instructions that take two cycles of a pipe of 16 lanes.
_HALVES = {
    *("F2F", "I2F", "F2I", "F2FP", "I2FP", "IADD3", "ISETP", "FSETP", "FSEL", "FMNMX", "LOP3", "SHF", "SEL", "PRMT"),
    *("LEA", "PLOP3", "IMNMX", "VIADD", "VIMNMX", "IABS", "FRND", "BMSK", "SGXT", "LOP", "IADD", "VOTE", "R2P", "P2R"),
    *("POPC", "MOV"),
}
_MEMORY = {"LDS", "STS", "LDL", "STL", "LDG", "STG", "LDGSTS"}
_SHAPES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}


def _pipes(name: str) -> dict[str, float]:
    """Cycles that an instruction of one warp takes of each pipe."""
    base = name.split(".")[0]
    pipes = {"issue": 1.0}
    if base in _FLOATS:
        pipes["float"] = 1
    elif base == "MUFU":
        pipes["special"] = 8
    elif base in _HALVES:
        pipes["integer"] = 2
    elif base == "IMAD":
        pipes["multiply"] = 2
    elif base == "SHFL":
        pipes["memory"] = 4
    elif base in _MEMORY:
        pipes["memory"] = 4 * _width(name)
    elif base in ("LDSM", "STSM"):
        pipes["memory"] = 16
    elif base == "HGMMA":
        rows, columns, depth = (int(x) for x in re.findall(r"\d+", name)[:3])
        pipes["tensor"] = rows * columns * depth / (1024 if "TF32" in name else 2048) / 4
    elif base == "HMMA":
        # mma.sync reaches about 60 % of the rate of wgmma.
        pipes["tensor"] = _SHAPES[name.split(".")[1]] * 4 / (512 if "TF32" in name else 1024)
    return pipes


def _width(name: str) -> int:
    """Words of four bytes that an instruction moves per thread."""
    return 4 if ".128" in name else 2 if ".64" in name else 1
