"""Memory told beforehand, by `inspect` and `finetune --dry-run`."""

from __future__ import annotations

import json
import re


def test_inspect_and_a_dry_run_tell_the_same(outcome, tiny_folder, converted):
    small = ("--set", "stages.0.length=64", "--set", "stages.0.batch_tokens=256", "--set", "mixer.window=16")
    status, text, _ = outcome("inspect", tiny_folder, "-r", "window-gla", "--gpus", "4", *small)
    assert status == 0 and "per GPU" not in text and "each GPU, of 4 but for single" in text
    assert re.search(r"│\s+│\s+single │\s+ddp │\s+fsdp2 │\s+zero3", text.replace("┃", "│"))
    for part in ("weights", "trained", "optimizer", "teacher", "activations", "logits", "cache", "fits (GB)"):
        assert f"│ {part}" in text
    told = json.loads(outcome("inspect", tiny_folder, "-r", "window-gla", "--gpus", "4", *small, "--json")[1])[
        "training"
    ]
    dry = ("finetune", "window-gla", "--dry-run", "--gpus", "4", "--set", f"model={tiny_folder}", *small)
    assert json.loads(outcome(*dry, "--json")[1]) == told
    assert set(told[0]["fsdp2"]["fits_gb"]) == {"16", "24", "48", "80", "141"}
    assert outcome(*dry)[1] in text
    # Only where it is asked for.
    assert outcome("inspect", tiny_folder, "-r", "window-gla", "--training", *small)[1].count("stage 1: ") == 1
    assert "stage 1" not in outcome("inspect", tiny_folder, "-r", "window-gla", *small)[1]
    assert "training" not in json.loads(outcome("inspect", tiny_folder, "-r", "window-gla", *small, "--json")[1])
    # A converted model has its own mixer, whatever the recipe says.
    own = ("finetune", "window-gla", "--dry-run", "--json", "--set", f"model={converted}")
    one, other = (json.loads(outcome(*own, "--set", f"mixer.window={window}")[1]) for window in (8, 200))
    assert one == other
