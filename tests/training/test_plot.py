"""The plot of a training."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

from linearize.training.plot import draw_training


def test_a_line_per_stage(tmp_path):
    steps = [(0, step, 4.0 - step / 100) for step in range(1, 101)] + [(1, step, 2.5) for step in range(1, 4)]
    lines = [{"stage": stage, "step": step, "tokens": 64 * step, "loss": loss} for stage, step, loss in steps]
    lines.insert(0, {"note": "something else"})
    lines.append({"stage": 1, "step": 4, "tokens": 256, "loss": float("nan")})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_training(tmp_path / "metrics.jsonl", tmp_path / "training.svg")
    text = (tmp_path / "training.svg").read_text()
    root = ElementTree.fromstring(text)  # noqa: S314 - written a line above
    assert ">stage 1<" in text and ">stage 2<" in text and ">loss, nats per token<" in text
    # Three steps are a point: the first of stage 1 is their mean, the last of stage 2 lies behind all of stage 1.
    [described] = [element.text for element in root.iter("{http://www.w3.org/2000/svg}desc")]
    first, second = described.split(". stage 2: ")
    assert first.startswith("stage 1: 3.98 at 128, ")
    assert second == "2.5 at 6,464, 2.5 at 6,528, 2.5 at 6,592."
    points = [path.count("L") + 1 for path in re.findall(r'<path d="([^"]+)"[^>]*stroke-width: 2', text)]
    assert 34 in points and 3 in points
    assert "nan" not in text


def test_held_out_losses_are_a_line_of_their_own(tmp_path):
    lines = [{"stage": 0, "step": step, "tokens": 64 * step, "loss": 3.0} for step in range(1, 5)]
    lines[1] |= {"held_out_loss": 7.5, "held_out_objective": 3.5}
    lines[3] |= {"held_out_loss": 7.25, "held_out_objective": float("nan")}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_training(tmp_path / "metrics.jsonl", tmp_path / "training.svg")
    text = (tmp_path / "training.svg").read_text()
    assert ">stage 1, held out<" in text and ". stage 1, held out: 3.5 at 128.<" in text


def test_no_step_no_picture(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("\n")
    draw_training(tmp_path / "metrics.jsonl", tmp_path / "training.svg")
    assert not (tmp_path / "training.svg").exists()
