"""`linearize doctor`: installed versions, this machine's devices, and known incompatibilities."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from linearize.cli.console import JsonOption, examples, print_json
from linearize.cli.libraries import quiet_libraries
from linearize.errors import LinearizeError, counted
from linearize.report.formatting import readable_bytes

EPILOG = examples("linearize doctor", "linearize doctor --json > environment.json")


def doctor(as_json: JsonOption = False) -> None:
    """Show versions, devices, kernels in use, the Hub login and caches, and known bad pairs of libraries.

    Reads this machine only: nothing is sent, and the Hub's token is never shown. The exit status is 1 if something is
    missing or incompatible.
    """
    quiet_libraries()
    from linearize.jobs.doctor import examine

    facts = examine()
    if as_json:
        print_json(facts)
    else:
        _show(facts)
    errors = [problem for problem in facts["problems"] if problem["severity"] == "error"]
    if errors:
        more = f" (+{len(errors) - 1} more)" if len(errors) > 1 else ""
        raise LinearizeError(f"{errors[0]['what']}{more}; {errors[0]['remedy']}")


def _show(facts: dict[str, Any]) -> None:
    out = Console(highlight=False, soft_wrap=True)

    def line(name: str, text: str) -> None:
        out.print(f"{name:9} {text}", markup=False)

    line("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    line("system", f"{facts['platform']['system']}, {facts['platform']['cpus']} CPUs, {facts['platform']['python']}")
    if (devices := facts["devices"]) is not None:
        threads = f"{devices['cpu_threads']} threads" if devices["cpu_threads"] > 1 else "1 thread"
        line("CPU", f"{threads}, {readable_bytes(devices['free_bytes'])} of memory free")
        for gpu in devices["gpus"]:
            memory = f"{readable_bytes(gpu['free_bytes'])} of {readable_bytes(gpu['bytes'])} free"
            line("GPU", f"{gpu['name']}, sm_{''.join(map(str, gpu['capability']))}, {memory}, CUDA {devices['cuda']}")
        if not devices["gpus"]:
            line("GPU", "none available to torch" + ("" if devices["cuda"] else " (a build of torch for CPUs)"))
    for device, parts in (facts["kernels"] or {}).items():
        groups: dict[tuple[str, str], list[str]] = {}
        for part, decision in parts.items():
            groups.setdefault((decision["kernels"], decision["why"]), []).append(part)
        told = (f"{', '.join(names)}: {kernels} ({why})" for (kernels, why), names in groups.items())
        line("kernels", f"on {device}: {'; '.join(told)}")
    if (hub := facts["hub"]) is not None:
        login = (
            f"logged in by the token in {hub['token_from']}" if hub["logged_in"] else "no token; hf auth login sets one"
        )
        line("Hub", f"{login}; {hub['endpoint']}{', offline by HF_HUB_OFFLINE' if hub['offline'] else ''}")
    for cache in facts["caches"] or []:
        files = counted(cache["files"], "file", "files")
        line(
            "cache",
            f"{cache['name']}: {readable_bytes(cache['bytes'])} in {files}, {readable_bytes(cache['free_bytes'])} free "
            f"on its disk, {cache['folder']}",
        )
    for problem in facts["problems"]:
        line(problem["severity"], f"{problem['what']}; {problem['remedy']}")
    if not facts["problems"]:
        line("ok", "all requirements are installed, without known incompatibilities")
