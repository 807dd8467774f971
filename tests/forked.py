"""Python programs in processes of their own, forked from one that has imported torch and transformers already.

A new interpreter takes seconds for these imports. The server imports nothing of this package, so a program can load a
checkpoint as if the package was not installed.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.forked_imports"])


def run_forked(
    code: str, *arguments: object, environment: Mapping[str, str] | None = None, limit: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs `code` as `python -c` does, with `arguments`, an empty stdin and this process's environment and folder.

    Args:
        environment: variables on top of this process's. transformers reads `HF_MODULES_CACHE` as it is imported; the
            value here is the one it uses all the same.
        limit: seconds after which the process is killed.
    """
    variables = {**os.environ, **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        process = _SERVER.Process(target=_run, args=(code, [*map(str, arguments)], variables, os.getcwd(), folder))
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
        told = [(Path(folder) / name).read_text(encoding="utf-8") for name in ("out", "err")]
    return subprocess.CompletedProcess(["python", "-c", code], process.exitcode or 0, *told)


def _run(code: str, arguments: list[str], variables: dict[str, str], place: str, folder: str) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(place)
    sys.argv = ["-c", *arguments]
    if "HF_MODULES_CACHE" in variables:
        from transformers import dynamic_module_utils, utils

        dynamic_module_utils.HF_MODULES_CACHE = utils.hub.HF_MODULES_CACHE = variables["HF_MODULES_CACHE"]
    status = 1
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
        status = 0
    except SystemExit as asked:
        status = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
