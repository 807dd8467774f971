"""C functions for the CPU (`native/*.c`), compiled by the system's compiler when they are first needed, and kept in the
cache folder. Without a compiler plain torch runs.

A call takes one struct of 8-byte fields: first whole numbers and addresses, then floating-point numbers. Calls release
the GIL, and share their work among torch's number of threads.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
_SECONDS = 120.0  # a compiler may take


class NoNativeError(Exception):
    """The C functions cannot be used; the text is the reason."""


@cache
def native_refusal() -> str | None:
    """The reason that there are no C functions; None if they are loaded. The first call compiles them."""
    try:
        _library()
    except NoNativeError as error:
        logging.getLogger("linearize_kernels").debug("landmarks run in plain torch on the CPU: %s", error)
        return str(error)
    return None


def packed(*fields: int | float | Tensor | None) -> bytes:
    """Fields of a struct: whole and floating-point numbers, and contiguous tensors on the CPU for their addresses; None
    is a null pointer."""
    import struct

    values = [x.data_ptr() if isinstance(x, Tensor) else 0 if x is None else x for x in fields]
    return struct.pack("=" + "".join("d" if type(x) is float else "q" for x in values), *values)


def launch(function: str, given: bytes) -> None:
    """Run a C function on torch's number of threads.

    Args:
        given: its struct, as `packed` makes it. Its tensors must live until the call returns.

    Raises:
        MemoryError: there is none for the function's own tables.
        ValueError: the fields are not those of the struct.
    """
    call, size = _function(function)
    if len(given) != size:
        raise ValueError(f"{function} takes {size} bytes of arguments, and these are {len(given)}")
    if call(given, torch.get_num_threads()):
        raise MemoryError(f"no memory for the tables of {function}")


@cache
def _function(name: str) -> tuple[Callable[[bytes, int], int], int]:
    """A C function, and the size of its struct."""
    return getattr(_library(), name), int(getattr(_library(), f"{name}_bytes")())


@cache
def _library() -> ctypes.CDLL:
    sources = sorted(Path(__file__).with_name("native").glob("*.[ch]"))
    if not sources:
        raise NoNativeError("the C sources are not here; linearize has them")
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        raise NoNativeError("addresses have not 64 bits")
    path = _compiled(sources)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoNativeError(f"{path} cannot be loaded: {error}") from None
    for name in ("prompt", "step", "product"):
        getattr(library, name).argtypes = (ctypes.c_char_p, ctypes.c_int64)
        getattr(library, f"{name}_bytes").restype = ctypes.c_int64
    return library


def _compiled(sources: list[Path]) -> Path:
    """The compiled sources, in the cache folder under a name that depends on all that they depend on."""
    import hashlib
    import shutil
    import subprocess
    import tempfile

    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NoNativeError("there is no C compiler: install gcc or clang")
    try:
        told = subprocess.run([compiler, "--version"], capture_output=True, timeout=_SECONDS).stdout  # noqa: S603
        depends = [repr((compiler, FLAGS)).encode(), told, _machine(), *(x.read_bytes() for x in sources)]
        folder = _cache() / "native"
        target = folder / f"{hashlib.sha256(b'/'.join(depends)).hexdigest()[:24]}.so"
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as staged:
            made = Path(staged) / target.name
            files = [str(x) for x in sources if x.suffix == ".c"]
            command = [compiler, *FLAGS, *files, "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)  # noqa: S603
            if done.returncode:
                first = next((line for line in done.stderr.splitlines() if "error" in line), f"exit {done.returncode}")
                raise NoNativeError(f"{compiler} cannot compile the C sources: {first}")
            made.replace(target)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoNativeError(f"the C sources cannot be compiled: {error}") from None
    return target


def _machine() -> bytes:
    """The processor's name and features, on which `-march=native` depends."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    except OSError:
        lines = []
    kinds = (b"model name", b"flags", b"Features", b"CPU part")
    return repr((platform.machine(), platform.processor(), [x for x in lines if x.startswith(kinds)])).encode()


def _cache() -> Path:
    """As `linearize.runtime.folders.cache_folder`."""
    chosen, base = os.environ.get("LINEARIZE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(chosen) if chosen else (Path(base) if base else Path.home() / ".cache") / "linearize"
    except RuntimeError:
        raise NoNativeError("there is no home folder for what is compiled; set HOME, or LINEARIZE_CACHE") from None
