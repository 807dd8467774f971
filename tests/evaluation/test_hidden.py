"""Logits of slices of positions against those of one plain forward pass, and the memory that scoring takes."""

from __future__ import annotations

import copy
import random
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.evaluation.heldout import score_rows
from linearize.evaluation.tasks import hidden
from linearize.evaluation.tasks.prefix import Query, log_likelihoods
from linearize.evaluation.tasks.reading import divergences, losses, write
from linearize.evaluation.tasks.recall import running
from linearize.model import LinearizedForCausalLM, MixerConfig
from tests.model import test_families as families

# Besides those of the families: the scales and caps of logits that are off by default.
SCALED = {
    "granite": {"logits_scaling": 5.0},
    "granitemoe": {"logits_scaling": 5.0},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
}


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make; `peak` is the most that live at one time."""

    def __init__(self, *models: torch.nn.Module) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        tensors = (one for model in models for one in (*model.parameters(), *model.buffers()))
        self._known = {id(one.untyped_storage()): one.untyped_storage() for one in tensors}
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._live and id(storage) not in self._known:
                    self._live.add(id(storage))
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        return out

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


@pytest.mark.parametrize("row", families.ROWS)
@torch.no_grad()
def test_slices_are_the_logits_of_every_family(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = families.build(row), torch.cat(families.text(40, 40))
    for name, value in SCALED.get(model.config.model_type, {}).items():
        setattr(model.config, name, value)
    model = type(model)(model.config).eval()
    monkeypatch.setattr(hidden, "LOGITS", 2 * 7 * 97)
    everything = [MixerConfig(layers=list(range(model.config.num_hidden_layers)), window=9, sinks=2)]
    for one in (model, LinearizedForCausalLM.from_teacher(copy.deepcopy(model), everything)):
        whole = one(ids, use_cache=False).logits
        found = [logits for _, logits in hidden.read(one, ids).slices()]
        assert [logits.shape[1] for logits in found] == [7, 7, 7, 7, 7, 5]
        families.close(torch.cat(found, 1), whole)
        some = hidden.read(one, ids, first=30).logits(torch.tensor([1, 0]), torch.tensor([2, 9]))
        families.close(some, whole[[1, 0], [32, 39]])
        some = hidden.logits_at(one, torch.tensor([1, 0]), torch.tensor([32, 39]), input_ids=ids, use_cache=False)
        families.close(some, whole[[1, 0], [32, 39]])


@torch.no_grad()
def test_a_models_own_forward_is_put_back() -> None:
    """A hook of accelerate sets `forward` on the module itself."""
    model = families.build("llama")
    calls, body = [], model.model
    forward = body.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    body.forward = hooked
    read = hidden.read(model, torch.cat(families.text(20)))
    read.logits(torch.tensor([0]), torch.tensor([3]))
    assert body.forward is hooked and calls == [1]


@torch.no_grad()
def test_a_model_without_a_cache_or_a_body_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = families.build("llama"), torch.cat(families.text(40))
    whole, forward = model(ids).logits, model.forward
    monkeypatch.setattr(hidden, "_SHORTEST", 6)
    monkeypatch.setattr(hidden, "TOKENS", 6)
    families.close(hidden.read(model, ids, first=13).states, hidden.hidden_states(model, input_ids=ids).states[:, 13:])
    monkeypatch.setattr(model, "forward", lambda **inputs: forward(**{**inputs, "use_cache": False}))
    found = torch.cat([logits for _, logits in hidden.read(model, ids, first=13).slices()], 1)
    families.close(found, whole[:, 13:])
    monkeypatch.setattr(model, "base_model_prefix", "")
    found = torch.cat([logits for _, logits in hidden.read(model, ids, first=13).slices()], 1)
    families.close(found, whole[:, 13:])
    rows, columns = torch.tensor([0, 0]), torch.tensor([7, 39])
    families.close(hidden.logits_at(model, rows, columns, input_ids=ids), whole[rows, columns])


VOCABULARY = 152_000


@pytest.fixture(scope="module")
def wide() -> Any:
    """A model of a large vocabulary, of which one page's logits take 0.9 GB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def page(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def rows_of(model: Any, teacher: Any) -> None:
    ids = torch.cat([page(400, seed) for seed in range(4)])
    score_rows(model, {"input_ids": ids, "labels": ids}, teacher=teacher)


def queries_of(model: Any, _: Any) -> None:
    draw, (text,) = random.Random(1), page(1500).tolist()  # noqa: S311
    queries = [Query(tuple(text[:-1]), tuple(text[1:]))]
    queries += [Query((*text[:80], *text[at : at + 99]), tuple(text[at : at + 100])) for at in range(100, 900, 100)]
    queries += [Query(tuple(text[:300]), (draw.randrange(3, VOCABULARY),)) for _ in range(8)]
    log_likelihoods(model, queries, batch_size=8, max_length=4096)


SCORING = {
    "held-out rows": rows_of,
    "continuations": queries_of,
    "long texts": lambda model, _: list(losses(model, page(1500))),
    "divergences": lambda model, teacher: divergences(teacher, model, torch.cat([page(200, s) for s in range(8)]), 20),
    "recall": lambda model, _: running.expected(model, page(1500).tolist() * 2, 400, 0),
    "writing": lambda model, _: write(model, page(200).tolist() * 8, 2, lambda logits, _: logits.argmax(-1)),
    "answers": lambda model, _: running.written(model, page(1500).tolist() * 8, 2, 0),
}


@pytest.mark.check
@pytest.mark.parametrize("kind", SCORING)
def test_scoring_takes_a_fifth_of_a_gigabyte_beside_the_weights(kind: str, wide: Any) -> None:
    teacher = copy.deepcopy(wide)
    with torch.inference_mode(), Peak(wide, teacher) as memory:
        SCORING[kind](wide, teacher)
    print(f"{kind}: {memory.peak / 1e6:.0f} MB")
    assert memory.peak < 200e6
