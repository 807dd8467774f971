"""The shared part of the experiments on single recurrences: a one-layer model, its training, and the output of results.

The layer is the smallest that compares every recurrence: an embedding, a short causal convolution (so a key can come
from one token and its value from the next without a second layer), q/k/v projections, the recurrence of a converted
model, an output projection on a residual, and a linear head. Only convolution and recurrence mix tokens.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from linearize_kernels import full_attention
from torch import Tensor, nn

from linearize.families.base import AttentionLayer
from linearize.model.configuration import MixerConfig
from linearize.model.recurrences import build_recurrence

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(__file__).parent
SOFTMAX = "softmax"  # the ceiling row: attention over the whole past


class ToyModel(nn.Module):
    """One layer of the named recurrence, or of softmax attention.

    Args:
        recurrence: a name of `RECURRENCES`, or `softmax`.
        vocabulary, classes: the number of input tokens, and of output classes at every token.
        width: width of the residual stream.
        heads: key/value heads, each with one query head.
        head_width: width of keys and of values.
        convolution: tokens in the convolution's kernel; 1 is none.
        options: keys of the mixer section.
    """

    def __init__(
        self,
        recurrence: str,
        *,
        vocabulary: int,
        classes: int,
        width: int,
        heads: int,
        head_width: int,
        convolution: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        self.layer = AttentionLayer(heads, heads, head_width, head_width, scale=head_width**-0.5)
        self.embedding = nn.Embedding(vocabulary, width)
        self.convolution = nn.Conv1d(width, width, convolution, groups=width) if convolution > 1 else None
        self.norm = nn.RMSNorm(width)
        self.projections = nn.ModuleList(nn.Linear(width, heads * head_width, bias=False) for _ in range(3))
        self.recurrence = None
        if recurrence != SOFTMAX:
            config = MixerConfig(layers=[0], recurrence=recurrence, **options)
            self.recurrence = build_recurrence(config, self.layer, depth=1.0)
        self.read_norm = nn.RMSNorm(head_width)
        self.output = nn.Linear(heads * head_width, width, bias=False)
        self.head = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, classes))

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, T]` to logits `[B, T, classes]`."""
        x = self.embedding(tokens)
        mixed = x
        if self.convolution is not None:
            padded = F.pad(x.transpose(1, 2), (self.convolution.kernel_size[0] - 1, 0))
            mixed = self.convolution(padded).transpose(1, 2)
        mixed = self.norm(mixed)
        q, k, v = (p(mixed).unflatten(-1, (self.layer.key_value_heads, -1)) for p in self.projections)
        if self.recurrence is None:
            read = full_attention(q, k, v, scale=self.layer.scale)
        else:
            read, _ = self.recurrence(q, k, v, k, None, None)
        logits: Tensor = self.head(x + self.output(self.read_norm(read).flatten(2)))
        return logits

    def state_floats(self) -> int | None:
        """Floats in the state of one head, all parts together; None for attention, whose cache grows."""
        if self.recurrence is None:
            return None
        parts = self.recurrence.state(1, torch.device("cpu"))
        return sum(part.numel() for part in parts.values()) // self.layer.key_value_heads


def train(
    model: nn.Module,
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float,
    own_lr: float,
    seed: int,
) -> list[float]:
    """AdamW with a short warm-up and a cosine to 0, on new text in each step; returns the loss of every step.

    Args:
        batch: draws tokens and targets `[B, T]`; targets of -100 are ignored.
        own_lr: the learning rate of the recurrence's own parameters (gates, write strengths).
    """
    own = [p for name, p in model.named_parameters() if name.startswith("recurrence.")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("recurrence.")]
    optimizer = torch.optim.AdamW([{"params": rest, "lr": lr}, {"params": own, "lr": own_lr}], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr, own_lr], total_steps=steps, pct_start=0.1)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        tokens, targets = batch(generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, tokens: Tensor, targets: Tensor) -> float:
    """The share of the targets whose class is the most likely one."""
    asked = targets != -100
    return (model(tokens).argmax(-1)[asked] == targets[asked]).float().mean().item()


def surroundings() -> dict[str, Any]:
    """Versions and settings that the figures depend on."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    module = ".".join(Path(sys.argv[0]).with_suffix("").parts[-3:])
    return {
        "command": " ".join(["python -m", module.removesuffix(".__main__"), *sys.argv[1:]]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write JSON atomically."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def markdown(rows: list[dict[str, str]]) -> str:
    """A table of rows with the same keys."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([row[head] for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
