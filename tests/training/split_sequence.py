"""A process of `test_sequence.py`: its part of a text, and what came of it. Run under torch.distributed.run."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from linearize.training.sequence import part_of, split_sequence, sum_gradients
from tests.training.test_sequence import KINDS, TOKENS, build, text


def main(target: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for kind in KINDS:
        model, ids = build(kind), text(TOKENS)
        part, positions, labels = part_of(ids, ids)
        with split_sequence(model, positions) as cache:
            logits = model(part, position_ids=positions, past_key_values=cache).logits
            total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            total.backward()
        sum_gradients(model)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        dist.all_reduce(total)
        states = {f"{i}.{name}": x.detach() for i, m in enumerate(cache.layers) for name, x in m.tensors()}
        found[kind] = {"logits": logits.detach(), "loss": total.detach(), "gradients": gradients, "states": states}
    torch.save(found, f"{target}/{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
