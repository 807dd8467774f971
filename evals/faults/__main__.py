"""Faults planted into jobs on a tiny model: `python -m evals.faults` plants them, `--table` shows what came of it.

Each job is cut short or disturbed, then done again as a person would (finetune with --resume). Lost is: a result that
is not whole, an earlier result that is gone, or another result than without the fault, to the last bit. Full and
read-only disks are small file systems of their own, which take root to mount; elsewhere these rows are left out.
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evals.faults.bench import Job, kill, terminate
from linearize.cli.libraries import quiet_libraries
from linearize.conversion import output
from linearize.training.trainer import StageTrainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
FIGURES = HERE / "faults.json"
ROOM = 64_000_000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=50, help="SIGKILL at so many random moments of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--table", action="store_true", help="print the table of the figures that are here")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(Path(folder), arguments.trials, random.Random(arguments.seed))  # noqa: S311
        FIGURES.write_text(json.dumps({"seed": arguments.seed, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table())


def measure(root: Path, trials: int, moments: random.Random) -> list[dict[str, Any]]:
    """Plants every fault; gives a row for each kind of fault and command."""
    os.environ["LINEARIZE_CACHE"] = str(root / "cache")
    quiet_libraries()
    rows = []

    def row(fault: str, job: Job, found: list[dict[str, Any]]) -> None:
        rows.append(tried(fault, job, found))
        print(row_of(rows[-1]), flush=True)

    for job in make_jobs(root):
        job.prepare()
        undisturbed = job.whole(job.arguments)
        if undisturbed.status:
            raise RuntimeError(f"{job.name} does not run here: {undisturbed.told}")
        seconds = undisturbed.seconds
        job.reference = job.result()
        for fault, share, disturb in DISTURBED:
            count = max(1, round(share * trials))
            plants = (partial(disturb, job, moments.uniform(0, seconds)) for _ in range(count))
            row(fault, job, [one(job, plant, root) for plant in plants])
        for fault, act in PLANTED if job.name == "finetune" else ():
            row(fault, job, [one(job, partial(job.disturbed, 0, nothing, act), root)])
        for fault, plant in DISKS[job.name == "eval" :]:  # a report asks for no room beforehand
            with mounted(job.folder) as usable:
                if usable:
                    row(fault, job, [one(job, partial(plant, job), root, partial(remount, job.folder, "rw"))])
    return rows


def make_jobs(root: Path) -> list[Job]:
    from tests.conftest import random_llama

    plain, old, text = random_llama(root / "plain"), root / "old", root / "text.txt"
    text.write_text("\n\n".join(f"There were {n} small cats and a dog. They ran home." for n in range(400)))
    for name in ("convert", "finetune", "eval"):
        (root / name).mkdir()
    out = {name: str(root / name / "out") for name in ("convert", "finetune", "eval")}
    job = Job("convert", root / "convert", ["convert", str(plain), "-o", str(old), "--set", "mixer.window=8"], list)
    if job.whole(job.arguments).status:
        raise RuntimeError("the tiny model cannot be converted")
    convert = ["convert", str(plain), "-o", out["convert"], "--overwrite", "--set", "mixer.window=16"]
    changes = (
        f"model={plain}", "mixer.window=16", f"stages.0.data.source={text}", "stages.0.data.tokens=4096",
        "stages.0.data.held_out=1", "stages.0.length=64", "stages.0.batch_tokens=256", "stages.0.save_every=2",
    )  # fmt: skip
    settings = [word for change in changes for word in ("--set", change)]
    finetune = ["finetune", "default", "-o", out["finetune"], *settings]
    resumable = root / "finetune" / "out.training" / "recipe.yaml"
    (root / "wikitext2").mkdir()
    pages = "".join(f" = A dog = \n\n There were {n} small cats and a dog .\n They ran home .\n\n" for n in range(40))
    (root / "wikitext2" / "wiki.test.raw").write_text(pages)
    score = [
        "eval",
        str(old),
        "--tasks",
        "wikitext2",
        "--data",
        str(root),
        "--batch-size",
        "1",
        "--report",
        out["eval"],
    ]
    return [
        Job("convert", root / "convert", convert, lambda: convert, lambda: copy(old, Path(out["convert"]))),
        Job(
            "finetune",
            root / "finetune",
            finetune,
            lambda: [*finetune, "--overwrite", *(["--resume"] if resumable.is_file() else [])],
        ),
        Job("eval", root / "eval", score, lambda: score),
    ]


def copy(old: Path, new: Path) -> None:
    shutil.copytree(old, new)


def one(job: Job, plant: Callable[[], Any], root: Path, mend: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """One trial: the fault, then the job again."""
    forget(root, job.name)
    outcome = plant()
    mend()
    wrong = job.lost()
    if not outcome.clean:
        wrong.append("an error that was not expected")
    if outcome.status > 0 and not outcome.told and outcome.status not in (130, 143):
        wrong.append("an error that was not told")
    return {"status": outcome.status, "told": outcome.told, "wrong": wrong}


def forget(root: Path, name: str) -> None:
    """Results of eval are kept beyond a folder; each trial is to make its own."""
    if name == "eval":
        shutil.rmtree(root / "cache" / "evaluation", ignore_errors=True)


def tried(fault: str, job: Job, found: list[dict[str, Any]]) -> dict[str, Any]:
    statuses: dict[str, int] = {}
    for trial in found:
        statuses[str(trial["status"])] = statuses.get(str(trial["status"]), 0) + 1
    told = next((trial["told"] for trial in found if trial["told"]), "")
    wrong = [words for trial in found for words in trial["wrong"]]
    return {
        "fault": fault,
        "command": job.name,
        "tried": len(found),
        "survived": sum(not trial["wrong"] for trial in found),
        "lost": sum(bool(trial["wrong"]) for trial in found),
        "statuses": statuses,
        "told": told.replace(str(job.folder), "").replace(str(job.folder.parent), ""),
        "wrong": wrong,
    }


def killed(job: Job, after: float) -> Any:
    return job.disturbed(after, kill)


def terminated(job: Job, after: float) -> Any:
    return job.disturbed(after, terminate)


def vanished(job: Job, after: float) -> Any:
    """The folder that the job writes into is removed, and made anew once the job has ended."""
    outcome = job.disturbed(after, lambda _: shutil.rmtree(job.folder, ignore_errors=True))
    job.folder.mkdir(exist_ok=True)
    job.prepare()  # what was in it is not the job's to keep
    return outcome


def nothing(_: int) -> None:
    return


def scarce() -> None:
    """Memory runs out in the third pass, as if there were two rows in it."""
    compute = StageTrainer.compute_loss
    passes = itertools.count(1)

    def limited(self: Any, *args: Any, **options: Any) -> Any:
        if next(passes) == 3:
            self._rows = 2
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, *args, **options)

    StageTrainer.compute_loss = limited  # type: ignore[method-assign]


def nan() -> None:
    """The loss of the fifth step is no number."""
    compute = StageTrainer.compute_loss

    def broken(self: Any, *args: Any, **options: Any) -> Any:
        loss = compute(self, *args, **options)
        return self.checked(loss * torch.nan) if self.state.global_step == 4 else loss

    StageTrainer.compute_loss = broken  # type: ignore[method-assign]


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[bool]:
    """A small file system of its own at `folder`, where that can be had."""
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
    """There is less room than the job asks for at its start."""
    job.prepare()
    fill(job.folder, 1_000_000)
    return job.whole(job.arguments)


def full(job: Job) -> Any:
    """There was enough room at its start, and then it is gone."""
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


# How many trials, as a share of those of SIGKILL.
DISTURBED: tuple[tuple[str, float, Callable[[Job, float], Any]], ...] = (
    ("SIGKILL", 1, killed),
    ("SIGTERM", 0.2, terminated),
    ("the folder vanishes", 0.1, vanished),
)
PLANTED = (("out of memory", scarce), ("NaN in the loss", nan))
DISKS = (("a disk that is too small", small), ("a disk that fills up", full), ("a read-only disk", sealed))


def table() -> str:
    """The figures as Markdown."""
    rows = json.loads(FIGURES.read_text(encoding="utf-8"))["rows"]
    heads = ("fault", "command", "tried", "struck before its end", "survived", "data lost", "exit status (times)")
    lines = [f"| {' | '.join(heads)} |", f"|---|---{'|---:' * 4}|---|"]
    return "\n".join([*lines, *map(row_of, rows)])


def row_of(row: dict[str, Any]) -> str:
    ends = ", ".join(f"{status} ({times})" for status, times in sorted(row["statuses"].items()))
    # A job that was killed too late has ended with 0; one that rides out a fault that was surely there has, too.
    at_random = row["fault"] in {fault for fault, _, _ in DISTURBED}
    struck = row["tried"] - row["statuses"].get("0", 0) if at_random else row["tried"]
    counts = (row["tried"], struck, row["survived"], row["lost"])
    return f"| {row['fault']} | {row['command']} | {' | '.join(map(str, counts))} | {ends} |"


if __name__ == "__main__":
    main()
