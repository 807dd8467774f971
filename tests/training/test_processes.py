"""Training in two processes is training in one: the same losses and weights, also where it was interrupted."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linearize.cli import app
from linearize.errors import LinearizeError, RecipeError
from linearize.jobs.stages import run_stages
from linearize.recipe import dump_recipe, load_recipe
from linearize.runtime import processes
from linearize.training.checkpoints import newest
from linearize.training.sharding import check_shardable
from tests.conftest import random_llama

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "LINEARIZE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment.update(variables)
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


def losses(metrics: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return list({line["step"]: line[name] for line in lines}.values())


def check_evaluation(first: list, second: list) -> None:
    """Both have all results, each has computed half of those that were not kept, and none twice."""
    asked = [part["asked"] for part in (*first, *second)]
    assert [len(part) for part in asked] == [5, 45, 0, 5, 45, 0]
    assert sorted(index for part in asked for index in part) == list(range(100))
    assert [part["items"] for part in first] == [part["items"] for part in second]
    assert first[1]["items"] == first[2]["items"] == [index + 0.5 for index in range(100)]


@pytest.mark.check
def test_interrupted_runs_of_two_processes_are_a_run_of_one(tiny_folder, tmp_path, monkeypatch):
    """Each process with the whole model or with a part of it, and a run that begins the one way goes on the other."""
    stories = tmp_path / "stories.txt"
    stories.write_text(
        "\n\n".join(f"Once upon a time there were {n} cats and {n % 7} dogs. They ran." for n in range(900))
    )
    changes = [
        f"model={tiny_folder}", "mixer.window=16", f"stages.0.data.source={stories}", "stages.0.data.tokens=1536",
        "stages.0.data.held_out=2", "stages.0.length=64", "stages.0.batch_tokens=256", "stages.0.save_every=4",
    ]  # fmt: skip
    settings, aligning = (
        load_recipe("window-gla", [*changes, "stages.0.epochs=2", "stages.0.objective={distill: 0.5, sft: 0.5}"]),
        load_recipe("window-gla", [*changes, "stages.0.objective=align", "stages.0.epochs=0.5"]),
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(settings))
    (tmp_path / "align.yaml").write_text(dump_recipe(aligning))
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    for name in ("one", "align-one", "align-two"):
        (tmp_path / name).mkdir()
    one = run_stages(settings, tmp_path / "one", say=lambda _: None)
    expected = losses(tmp_path / "one" / "metrics.jsonl")
    run_stages(aligning, tmp_path / "align-one", say=lambda _: None)

    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    cut = run(tmp_path, *launcher, "tests.training.cut_finetune", str(tmp_path))
    assert cut.returncode == 0, cut.stderr[:6000]
    alone, together = (losses(tmp_path / f"align-{name}" / "metrics.jsonl") for name in ("one", "two"))
    assert len(alone) == 3
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    # As accelerate's configuration has it; --shard is the same.
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    check_evaluation(*(json.loads((tmp_path / f"evaluated.{rank}").read_text()) for rank in (0, 1)))
    for name, variables in (("whole", fsdp), ("split", {})):
        out, kept = tmp_path / name, tmp_path / f"{name}.training"
        assert len(losses(kept / "metrics.jsonl")) == 5
        assert [path.name for path in (kept / "stage-0").iterdir()] == ["checkpoint-4"]
        assert len(list((kept / "stage-0" / "checkpoint-4").glob("random-*.safetensors"))) == 2
        recipe = str(tmp_path / "recipe.yaml")
        done = run(tmp_path, "linearize", "finetune", recipe, "-o", str(out), "--launch", "2", "--resume", **variables)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout == f"{out}\n"
        assert done.stderr.count("next: linearize eval") == 1
        assert not kept.exists()
        assert len(expected) == 12
        torch.testing.assert_close(losses(out / "metrics.jsonl"), expected, rtol=1e-5, atol=0)
        assert "FSDP" not in (out / "config.json").read_text()
        state = one.model.state_dict()
        for weight, tensor in load_file(out / "model.safetensors").items():
            torch.testing.assert_close(tensor, state[weight], rtol=0, atol=1e-5)


@pytest.fixture
def small_recipe(tmp_path):
    """A recipe file of 32 short steps, one of which may be skipped."""
    stories = tmp_path / "stories.txt"
    stories.write_text("\n\n".join(f"There were {n} small cats and a dog." for n in range(399)))
    settings = load_recipe("window-gla", [
        f"model={random_llama(tmp_path / 'tiny')}", "mixer.window=8", f"stages.0.data.source={stories}",
        "stages.0.data.tokens=4096", "stages.0.data.held_out=0", "stages.0.length=32", "stages.0.batch_tokens=128",
        "stages.0.skip_bad_batches=1", "stages.0.warmup=0", "stages.0.save_every=8",
    ])  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(dump_recipe(settings))
    return tmp_path / "recipe.yaml"


@pytest.mark.check
def test_the_last_step_of_an_epoch_reads_no_row_twice(small_recipe, tmp_path, monkeypatch):
    """Also where one process has fewer rows than the other, or none; a run goes on within such an epoch, from the
    checkpoint that the first process finds."""
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    expected = {}
    for name, rows, *changes in (
        ("align", 7, "objective=align", "micro_batch=2"),
        ("mixed", 7, "objective={distill: 0.5, sft: 0.5}", "micro_batch=2"),
        ("one-row", 5, "objective=distill", "top_k=8", "teacher_at=disk"),
        ("kept-logits", 7, "objective=distill", "top_k=8", "teacher_at=disk", "micro_batch=2"),
        ("odd-steps", 5, "objective=distill", "top_k=8", "batch_tokens=96", "micro_batch=2"),
    ):
        evaluated = ("data.held_out=3", "eval_every=1")
        common = (f"data.tokens={32 * rows}", "epochs=2", "save_every=1", *evaluated, *changes)
        settings = load_recipe(str(small_recipe), [f"stages.0.{change}" for change in common])
        (tmp_path / "uneven").mkdir(exist_ok=True)
        (tmp_path / "uneven" / f"{name}.yaml").write_text(dump_recipe(settings))
        for count in ("one", "two"):
            (tmp_path / "uneven" / f"{name}-{count}").mkdir()
        run_stages(settings, tmp_path / "uneven" / f"{name}-one", say=lambda _: None)
        expected[name] = losses(tmp_path / "uneven" / f"{name}-one" / "metrics.jsonl")
        assert len(expected[name]) == 4
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    done = run(tmp_path, *launcher, "tests.training.uneven", str(tmp_path / "uneven"))
    assert done.returncode == 0, done.stderr[:6000]
    for name, alone in expected.items():
        together = losses(tmp_path / "uneven" / f"{name}-two" / "metrics.jsonl")
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
        held_out = [
            losses(tmp_path / "uneven" / f"{name}-{n}" / "metrics.jsonl", "held_out_loss") for n in ("one", "two")
        ]
        assert len(held_out[0]) == 4
        torch.testing.assert_close(*held_out, rtol=1e-5, atol=0)


@pytest.mark.check
def test_a_loss_that_is_no_number_in_one_process_is_skipped_in_all(small_recipe, tmp_path):
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    done = run(tmp_path, *launcher, "tests.training.bad_loss", str(small_recipe), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[:6000]
    told = [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1)]
    assert told[0]["said"] == told[1]["said"] == ["step 2 was skipped (1 of at most 1)"]
    assert told[0]["weights"] == told[1]["weights"]
    assert told[0]["error"] == told[1]["error"]
    assert "the loss became nan at step 4, first in" in told[1]["error"] and ".o_proj (1 such" in told[1]["error"]


@pytest.mark.check
def test_a_signal_to_who_started_them_ends_the_same_step_in_all(small_recipe, tmp_path):
    out, work = tmp_path / "out", tmp_path / "out.training"
    path = os.pathsep.join([str(ROOT), *sys.path])
    command = ("linearize", "finetune", str(small_recipe), "-o", str(out), "--launch", "2")
    with subprocess.Popen(
        [sys.executable, "-m", *command], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    ) as started:
        while started.poll() is None and not (work / "metrics.jsonl").is_file():
            time.sleep(0.02)
        started.send_signal(signal.SIGTERM)
        _, told = started.communicate(timeout=300)
    saved = r"^interrupted: SIGTERM after step (\d+) of 32, which is saved; go on with --resume$"
    (step,) = re.findall(saved, told, re.MULTILINE)
    assert started.returncode == 143
    checkpoint = newest(work / "stage-0")
    assert checkpoint.name == f"checkpoint-{step}" and len(list(checkpoint.glob("random-*.safetensors"))) == 2
    assert len(losses(work / "metrics.jsonl")) == int(step)
    assert not out.exists() and {path.name for path in tmp_path.iterdir()} >= {"out.training", "recipe.yaml"}


def test_what_several_processes_cannot_do_is_told(monkeypatch):
    with pytest.raises(LinearizeError, match="there is one process only; add --launch N"):
        check_shardable(load_recipe("window-gla", []))
    monkeypatch.setenv("WORLD_SIZE", "3")
    for change, told in (
        ("stages.0.objective=align", "align runs layers one by one"),
        ("stages.0.teacher_at=cpu", "--shard splits the teacher as well"),
        ("stages.0.data.source=student", "writes no text"),
        ("stages.0.optimizer=adamw8bit", "take adamw or adafactor"),
        ("lora.kind=pissa", "take lora, rslora or dora"),
    ):
        with pytest.raises(RecipeError, match=told):
            check_shardable(load_recipe("window-gla", [change]))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(LinearizeError, match="set fsdp_version: 2"):
        processes.join()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(LinearizeError, match="DeepSpeed is not supported"):
        processes.join()


@pytest.mark.check
def test_one_that_fails_ends_the_others(capfd, tmp_path, monkeypatch):
    assert processes.launch(2, ["recipes", "show", "no-such-recipe"]) == 1
    told = capfd.readouterr().err
    assert "no-such-recipe" in told and "Traceback" not in told
    # Those that ignore SIGTERM, as in a collective whose other side is gone, are killed, all after one wait.
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\ntest $RANK = 1 && exit 3\ntrap '' TERM\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    began = time.monotonic()
    assert processes.launch(4, []) == 3
    assert time.monotonic() - began < 20


@pytest.mark.check
def test_the_first_process_alone_tells_that_a_change_does_not_go_with_resume(small_recipe, tmp_path):
    (tmp_path / "out.training").mkdir()
    shutil.copy(small_recipe, tmp_path / "out.training")
    command = ("linearize", "finetune", str(small_recipe), "-o", str(tmp_path / "out"), "--launch", "2", "--resume")
    done = run(tmp_path, *command, "--set", "seed=9")
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1 and "and --set changes seed in it" in done.stderr


def test_a_process_that_another_one_left_says_so(monkeypatch, capsys):
    def left() -> None:
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:33666. GLHF!")

    monkeypatch.setattr(app, "build_app", lambda: lambda **_: left())
    assert app.run([]) == 1
    assert capsys.readouterr().err.startswith("error: another process of this run ended, and this one cannot go on")


ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
machine_rank: 0
main_process_ip: 127.0.0.1
main_process_port: {port}
mixed_precision: 'no'
"""


@pytest.mark.check
def test_accelerate_starts_two_processes_that_calibrate_once(tmp_path, monkeypatch):
    """They start, and end, where one process does; its configuration for GPUs starts them on CPUs as well."""
    stories = tmp_path / "stories.txt"
    stories.write_text("\n\n".join(f"{n}: {'the cat saw a dog and a cow ' * 6}" for n in range(99)))
    settings = load_recipe("train", [
        f"model={random_llama(tmp_path / 'tiny')}", "mixer.window=8",
        f"calibrate={{source: {stories}, tokens: 512, length: 128, held_out: 2, steps: 4}}",
        f"stages=[{{objective: sft, data: {{source: {stories}, tokens: 256, held_out: 0}}, length: 64, "
        "batch_tokens: 128, lr: 0.001, mixer_lr: 0.001}]",
    ])  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(dump_recipe(settings))
    (tmp_path / "one").mkdir()
    one = run_stages(settings, tmp_path / "one", say=lambda _: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "accelerate.yaml").write_text(ACCELERATE.format(port=free.getsockname()[1]))
    command = ("linearize", "finetune", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "two"))
    done = run(tmp_path, *command, "--accelerate-config", str(tmp_path / "accelerate.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{tmp_path / 'two'}\n"
    assert done.stderr.count("calibrate: layer 1 of 2") == 1
    told = json.loads((tmp_path / "two" / "linearize.json").read_text())["start"]["calibration"]
    assert told[1:] == one.start["calibration"][1:]  # the first line has the seconds
    expected, found = losses(tmp_path / "one" / "metrics.jsonl"), losses(tmp_path / "two" / "metrics.jsonl")
    assert len(expected) == 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    state = one.model.state_dict()
    for weight, tensor in load_file(tmp_path / "two" / "model.safetensors").items():
        torch.testing.assert_close(tensor, state[weight], rtol=0, atol=1e-5)


@pytest.mark.check
def test_an_accelerate_configuration_that_would_start_one_process_is_refused(small_recipe, tmp_path):
    configuration = tmp_path / "accelerate.yaml"
    configuration.write_text(ACCELERATE.replace("MULTI_GPU", "MULTI_CPU").format(port=29500) + "use_cpu: true\n")
    command = ("linearize", "finetune", str(small_recipe), "-o", str(tmp_path / "out"))
    done = run(tmp_path, *command, "--accelerate-config", str(configuration))
    assert done.returncode == 1
    assert "asks for 2 processes" in done.stderr and "pass --launch 2" in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()
    for content in ("num_processes: [", "- 2"):
        configuration.write_text(content)
        with pytest.raises(LinearizeError, match=r"accelerate\.yaml: "):
            processes.launch_with(configuration, ["finetune"])


def test_options_that_do_not_go_together(tmp_path):
    both = run(tmp_path, "linearize", "finetune", "window-gla", "--launch", "2", "--accelerate-config", "x.yaml")
    assert both.returncode == 2 and "give one of them" in both.stderr
