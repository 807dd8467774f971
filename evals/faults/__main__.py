"""Planted faults in jobs on a tiny model: `python -m evals.faults` plants them, `--table` prints the results.

Each job is interrupted or disturbed and then run again as a user would (finetune with --resume). A loss is an
incomplete result, a missing earlier result, or a result that differs by any bit from an undisturbed run. Full and
read-only disks are small file systems, which only root can mount; without root these rows are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evals.faults.bench import Job, Outcome, kill, terminate
from linearize.cli.libraries import quiet_libraries
from linearize.runtime import files as output
from linearize.training.loop import StageLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from linearize.training.steps import Batch

HERE = Path(__file__).parent
FIGURES = HERE / "faults.json"
ROOM = 64_000_000
JOBS = ("convert", "calibrate", "finetune", "eval", "export")
WRITING = "another job is writing there"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=50, help="SIGKILL at so many random moments of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jobs", default=",".join(JOBS), help="of these commands; figures of others stay")
    parser.add_argument("--table", action="store_true", help="print the table of the figures that are here")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            chosen = arguments.jobs.split(",")
            rows = measure(Path(folder), arguments.trials, random.Random(arguments.seed), chosen)  # noqa: S311
        rows += [row for row in json.loads(FIGURES.read_text())["rows"] if row["command"] not in chosen]
        rows.sort(key=lambda row: JOBS.index(row["command"]))
        FIGURES.write_text(json.dumps({"seed": arguments.seed, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table())


def measure(root: Path, trials: int, moments: random.Random, chosen: Sequence[str]) -> list[dict[str, Any]]:
    """Plant every fault into the chosen jobs; returns a row for each kind of fault and command."""
    os.environ["LINEARIZE_CACHE"] = str(root / "cache")
    quiet_libraries()
    rows = []

    def row(fault: str, job: Job, found: list[dict[str, Any]]) -> None:
        rows.append(tried(fault, job, found))
        print(row_of(rows[-1]), flush=True)

    for job in make_jobs(root):
        if job.name not in chosen:
            continue
        job.measure()
        for fault, share, disturb in DISTURBED:
            count = max(1, round(share * job.share * trials))
            row(fault, job, [one(job, partial(strike, job, disturb, n, count, moments)) for n in range(count)])
        for objective, (fault, act) in itertools.product(OBJECTIVES if job.name == "finetune" else (), PLANTED):
            plant = partial(job.disturbed, 0, nothing, partial(act, objective))
            row(f"{fault}, {objective}", job, [one(job, plant)])
        for fault, plant in DISKS:
            with mounted(job.folder) as usable:
                if usable:
                    row(fault, job, [one(job, partial(plant, job), partial(remount, job.folder, "rw"))])
    return rows


def make_jobs(root: Path) -> list[Job]:
    from tests.conftest import random_llama

    plain, old, text = random_llama(root / "plain"), root / "old", root / "text.txt"
    text.write_text("\n\n".join(f"There were {n} small cats and a dog. They ran home." for n in range(400)))
    out = {name: str(root / name / "out") for name in JOBS}
    for name in out:
        (root / name).mkdir()
    made = Job(
        "convert",
        root / "convert",
        ["convert", str(plain), "-o", str(old), "-r", "window-gla", "--set", "mixer.window=8"],
        list,
    )
    if made.whole(made.arguments).status:
        raise RuntimeError("the tiny model cannot be converted")
    convert = ["convert", str(plain), "-o", out["convert"], "--overwrite", "--set", "mixer.window=16"]
    fitted = f"calibrate={{tokens: 1024, source: {text}, length: 128, held_out: 2, steps: 8}}"
    calibrate = ["convert", str(plain), "-o", out["calibrate"], "--overwrite", "--recipe", "train"]
    calibrate += ["--set", fitted, "--set", "mixer.window=16"]
    data = {"source": str(text), "tokens": 1536, "held_out": 1}
    common = {"data": data, "length": 64, "batch_tokens": 256, "save_every": 2}
    stages = [{"objective": name, **common} for name in OBJECTIVES]
    finetune = ["finetune", "window-gla", "-o", out["finetune"], "--set", f"model={plain}", "--set", "mixer.window=16"]
    finetune += ["--set", f"stages={json.dumps(stages)}"]
    resumable = root / "finetune" / "out.training" / "recipe.yaml"
    (root / "wikitext2").mkdir()
    pages = "".join(f" = A dog = \n\n There were {n} small cats and a dog .\n They ran home .\n\n" for n in range(40))
    (root / "wikitext2" / "wiki.test.raw").write_text(pages)
    score = ["eval", str(old), "--tasks", "wikitext2", "--data", str(root), "--batch-size", "1"]
    score += ["--report", out["eval"]]
    export = ["export", str(old), out["export"], "--base", "acme/tiny", "--license", "mit", "--overwrite"]

    def earlier(name: str) -> Callable[[], None]:
        return lambda: copy(old, Path(out[name]))

    def forget() -> None:
        """Remove cached results, so that each trial computes its own."""
        shutil.rmtree(root / "cache" / "evaluation", ignore_errors=True)

    return [
        Job("convert", root / "convert", convert, lambda: convert, earlier("convert")),
        Job("calibrate", root / "calibrate", calibrate, lambda: calibrate, earlier("calibrate"), share=0.2),
        Job(
            "finetune",
            root / "finetune",
            finetune,
            lambda: [*finetune, "--overwrite", *(["--resume"] if resumable.is_file() else [])],
        ),
        Job("eval", root / "eval", score, lambda: score, forget),
        Job("export", root / "export", export, lambda: export, earlier("export"), share=0.2),
    ]


def copy(old: Path, new: Path) -> None:
    shutil.copytree(old, new)


def one(job: Job, plant: Callable[[], Outcome], mend: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """One trial: the fault, then the job again."""
    outcome = plant()
    phase = job.phase()
    mend()
    wrong = job.lost()
    if not outcome.clean:
        wrong.append("an error that was not expected")
    if outcome.status > 0 and not outcome.told and outcome.status not in (130, 143):
        wrong.append("an error that was not told")
    return {"status": outcome.status, "told": outcome.told, "wrong": wrong, "phase": phase}


def strike(job: Job, disturb: Callable[[Job, float], Outcome], number: int, count: int, moments: random.Random) -> Any:
    """Disturb a job at a random moment in the `number`-th of `count` parts of its duration; repeat if it had
    finished."""
    if number % 10 == 9:
        job.measure()  # the machine may be busier now, or less busy
    for _ in range(99):
        outcome = disturb(job, job.seconds * (number + moments.random()) / count)
        if outcome.struck:
            return outcome
        job.seconds = min(job.seconds, outcome.seconds)
    raise RuntimeError(f"{job.name} is over too soon to be disturbed")


def tried(fault: str, job: Job, found: list[dict[str, Any]]) -> dict[str, Any]:
    statuses = Counter(str(trial["status"]) for trial in found)
    phases = Counter(trial["phase"] for trial in found if trial["phase"])
    told = next((trial["told"] for trial in found if trial["told"]), "")
    wrong = [words for trial in found for words in trial["wrong"]]
    return {
        "fault": fault,
        "command": job.name,
        "tried": len(found),
        "survived": sum(not trial["wrong"] for trial in found),
        "lost": sum(bool(trial["wrong"]) for trial in found),
        "statuses": statuses,
        **({"phases": dict(sorted(phases.items()))} if phases else {}),
        "told": told.replace(str(job.folder), "").replace(str(job.folder.parent), ""),
        "wrong": wrong,
    }


def killed(job: Job, after: float) -> Any:
    return job.disturbed(after, kill)


def terminated(job: Job, after: float) -> Any:
    return job.disturbed(after, terminate)


def vanished(job: Job, after: float) -> Any:
    """Remove the job's output folder while it runs, and create it again after the job."""
    outcome = job.disturbed(after, lambda _: shutil.rmtree(job.folder, ignore_errors=True))
    job.folder.mkdir(exist_ok=True)
    job.prepare()  # what was in it is not the job's to keep
    return outcome


def doubled(job: Job, after: float) -> Outcome:
    """Start the same command again while it runs; one of the two must be refused."""
    second: list[Outcome] = []
    first = job.disturbed(after, lambda _: second.append(job.whole(job.arguments)))
    if not second or not any(WRITING in outcome.told for outcome in (first, *second)):
        return replace(first, struck=False)
    done, refused = sorted((first, *second), key=lambda outcome: outcome.status)
    return replace(refused, clean=done.clean and refused.clean and done.status == 0, seconds=first.seconds)


def nothing(_: int) -> None:
    return


def scarce(objective: str) -> None:
    """Memory runs out in the third pass of a stage, as in a pass of two rows."""
    compute, halve = StageLoop.micro_loss, StageLoop._halve
    passes = itertools.count(1)

    def limited(self: StageLoop, batch: Batch) -> Any:
        if objective in self.stage.weights and next(passes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, batch)

    def halved(self: StageLoop, _: int, error: Exception) -> None:
        halve(self, 2, error)

    StageLoop.micro_loss, StageLoop._halve = limited, halved  # type: ignore[method-assign]


def nan(objective: str) -> None:
    """The loss of a stage's fourth step is NaN."""
    compute = StageLoop.micro_loss

    def broken(self: StageLoop, batch: Batch) -> Any:
        loss = compute(self, batch)
        return loss * torch.nan if objective in self.stage.weights and self.progress.step == 3 else loss

    StageLoop.micro_loss = broken  # type: ignore[method-assign]


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[bool]:
    """Mount a small file system at `folder`; yields False if that is not possible."""
    for path in folder.iterdir():
        shutil.rmtree(path)
    made = _mount("-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder))
    try:
        yield made
    finally:
        if made:
            subprocess.run(["umount", str(folder)], check=True)  # noqa: S603, S607


def _mount(*options: str) -> bool:
    try:
        return subprocess.run(["mount", *options], capture_output=True).returncode == 0  # noqa: S603, S607
    except OSError:
        return False


def remount(folder: Path, options: str) -> None:
    if not _mount("-o", f"remount,{options},size={ROOM}", str(folder)):
        raise RuntimeError(f"{folder} cannot be mounted with {options}")
    if options == "rw":
        (folder / "filler").unlink(missing_ok=True)


def small(job: Job) -> Any:
    """The disk has less free space than the job checks for at its start."""
    job.prepare()
    fill(job.folder, 1_000_000)
    return job.whole(job.arguments)


def full(job: Job) -> Any:
    """The disk passes the job's check at its start, and is full afterwards."""
    job.prepare()
    fill(job.folder, 150_000 if job.name != "eval" else 4_000)

    def unasked() -> None:
        output._SPARE = -(10**12)

    return job.whole(job.arguments, unasked)


def sealed(job: Job) -> Any:
    job.prepare()
    remount(job.folder, "ro")
    return job.whole(job.arguments)


def fill(folder: Path, but: int) -> None:
    free = shutil.disk_usage(folder).free
    (folder / "filler").write_bytes(bytes(max(0, free - but)))


# The number of trials as a share of those of SIGKILL.
DISTURBED: tuple[tuple[str, float, Callable[[Job, float], Any]], ...] = (
    ("SIGKILL", 1, killed),
    ("SIGTERM", 0.2, terminated),
    ("the folder vanishes", 0.1, vanished),
    ("the same job again", 0.1, doubled),
)
OBJECTIVES = ("align", "distill", "sft")
PLANTED = (("out of memory", scarce), ("NaN in the loss", nan))
DISKS = (("a disk that is too small", small), ("a disk that fills up", full), ("a read-only disk", sealed))


def table() -> str:
    """The figures as Markdown."""
    rows = json.loads(FIGURES.read_text(encoding="utf-8"))["rows"]
    heads = ("fault", "command", "tried", "survived", "data lost", "exit status (times)")
    lines = [f"| {' | '.join(heads)} |", f"|---|---{'|---:' * 3}|---|"]
    return "\n".join([*lines, *map(row_of, rows)])


def row_of(row: dict[str, Any]) -> str:
    ends = ", ".join(f"{status} ({times})" for status, times in sorted(row["statuses"].items()))
    counts = (row["tried"], row["survived"], row["lost"])
    return f"| {row['fault']} | {row['command']} | {' | '.join(map(str, counts))} | {ends} |"


if __name__ == "__main__":
    main()
