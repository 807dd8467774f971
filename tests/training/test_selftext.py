"""Text written by the teacher: what it contains, that a seed decides it, and that the cache never gives other text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.data import selftext
from linearize.data.selftext import (
    _Pace,
    _Writer,
    chat_pieces,
    self_written_documents,
    start_token,
)
from linearize.errors import ModelError
from linearize.sources.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}U: {{ m.content }}{{ eos_token }}"
    "{% else %}A: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path))
    return tmp_path / "self-text"


@pytest.fixture
def teacher(tiny_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.fixture
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder)


def write(teacher, tokenizer, tokens=300, seed=0, **options):
    options = {"sample_length": 48, "batch_size": 8, **options}
    return self_written_documents(teacher, tokenizer, tokens=tokens, seed=seed, **options)


def test_documents_have_the_asked_for_tokens_and_end_once(teacher, tokenizer):
    documents = write(teacher, tokenizer, 2000, sample_length=200)
    assert sum(map(len, documents)) == 2000
    assert all(d[0] == tokenizer.bos_token_id and len(d) <= 200 for d in documents)
    assert any(d[-1] == tokenizer.eos_token_id for d in documents)
    assert all(tokenizer.eos_token_id not in d[:-1] and tokenizer.bos_token_id not in d[1:-1] for d in documents)
    assert any("Once upon a time" in tokenizer.decode(document) for document in documents)


def test_a_seed_decides_the_text_and_leaves_the_global_generator_alone(teacher, tokenizer, cache):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = write(teacher, tokenizer)
    assert torch.equal(torch.rand(3), expected)
    for file in cache.iterdir():
        file.unlink()
    assert write(teacher, tokenizer) == first
    assert write(teacher, tokenizer, seed=1) != first


def test_the_cache_gives_what_was_sampled_without_sampling(teacher, tokenizer, cache, monkeypatch):
    fresh = write(teacher, tokenizer)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(teacher, "generate", None)
    lines: list[str] = []
    assert write(teacher, tokenizer, progress=lines.append) == fresh
    assert lines == ["self text: 300 tokens, written before"]


@pytest.mark.parametrize(
    "change",
    [{"tokens": 301}, {"seed": 1}, {"temperature": 0.5}, {"sample_length": 40}, {"batch_size": 4}],
    ids=lambda change: next(iter(change)),
)
def test_every_argument_is_in_the_key(teacher, tokenizer, cache, change):
    write(teacher, tokenizer)
    write(teacher, tokenizer, **change)
    assert len(list(cache.iterdir())) == 2


def test_weights_config_and_tokenizer_are_in_the_key(teacher, tokenizer, cache):
    write(teacher, tokenizer)
    with torch.no_grad():
        teacher.model.layers[1].mlp.down_proj.weight.mul_(1.001)
    write(teacher, tokenizer)
    assert len(list(cache.iterdir())) == 2
    before = fingerprint(teacher)
    teacher.config.rope_parameters = {**teacher.config.rope_parameters, "rope_theta": 5e4}
    assert fingerprint(teacher) != before
    tokenizer.chat_template = "{{ messages[0].content }}"
    write(teacher, tokenizer)
    assert len(list(cache.iterdir())) == 3


def test_the_folder_that_a_teacher_came_from_is_not_in_the_key(teacher):
    before = fingerprint(teacher)
    teacher.config._name_or_path = "elsewhere"
    assert fingerprint(teacher) == before


@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(f.read_bytes()[:-20]), lambda f: f.write_bytes(b"")])
def test_a_damaged_cache_file_is_written_again(teacher, tokenizer, cache, damage):
    fresh = write(teacher, tokenizer)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    damage(file)
    assert write(teacher, tokenizer) == fresh
    assert [f.name for f in cache.iterdir()] == [file.name]
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_nothing_but_the_cache(teacher, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "file"))
    lines: list[str] = []
    assert sum(map(len, write(teacher, tokenizer, progress=lines.append))) == 300
    assert "not kept for the next run" in lines[-1]


def test_a_full_disk_costs_nothing_but_the_cache(teacher, tokenizer, cache, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")  # as safetensors says it

    lines: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(selftext, "save_file", full)
        documents = write(teacher, tokenizer, progress=lines.append)
    assert "not kept for the next run; " in lines[-1] and "no space left on device" in lines[-1]
    assert not cache.exists() and write(teacher, tokenizer) == documents
    assert len(list(cache.iterdir())) == 1


def test_the_models_own_generation_settings_and_mode_do_not_matter_and_stay(teacher, tokenizer, cache):
    first = write(teacher, tokenizer)
    next(cache.iterdir()).unlink()
    own = teacher.generation_config
    own.top_p, own.repetition_penalty, own.temperature = 0.1, 1.9, 0.1
    teacher.train()
    assert write(teacher, tokenizer) == first
    assert teacher.generation_config is own
    assert teacher.training


def test_sampling_follows_the_models_distribution(teacher, tokenizer):
    with torch.no_grad():
        expected = teacher(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1].softmax(-1)
    documents = write(teacher, tokenizer, 6000, sample_length=3, batch_size=512)
    second = torch.bincount(torch.tensor([d[1] for d in documents if len(d) > 1]), minlength=len(expected))
    frequency = second / second.sum()
    likely = expected > 0.01
    assert torch.allclose(frequency[likely], expected[likely], atol=5 * (0.25 / len(documents)) ** 0.5)


def test_a_chat_model_writes_questions_and_answers(teacher, tokenizer, monkeypatch):
    monkeypatch.setattr(selftext, "LONGEST_QUESTION", 250)  # this one's "questions" are whole stories
    tokenizer.chat_template = CHAT
    before, after = chat_pieces(tokenizer)
    documents = write(teacher, tokenizer, 1600, sample_length=440)
    chats = [d for d in documents if d[: len(before)] == before]
    assert sum(map(len, documents)) == 1600
    assert sum(map(len, chats)) == 800
    # One conversation, wherever the shuffle put it, is cut to the number of tokens.
    whole = [d for d in chats if tokenizer.eos_token_id in d[:-1]]
    assert len(whole) >= len(chats) - 1
    for document in whole:
        end = document.index(tokenizer.eos_token_id)
        cut = document[end : end + len(after)]
        assert end > len(before)
        assert cut == after[: len(cut)]


def test_a_chat_whose_questions_never_end_becomes_plain_text(teacher, tokenizer, monkeypatch):
    tokenizer.chat_template = CHAT
    monkeypatch.setattr(selftext, "LONGEST_QUESTION", 1)
    monkeypatch.setattr(selftext, "SHORTEST_QUESTION", 1)
    documents = write(teacher, tokenizer)
    assert sum(map(len, documents)) == 300
    before = chat_pieces(tokenizer).before
    assert not any(d[: len(before)] == before for d in documents)


def test_templates_that_cannot_be_cut(tokenizer):
    assert chat_pieces(tokenizer) is None
    for template in ("{{ messages[0].content | upper }}", "{{ messages[0].content }} then what", "U: {{ eos_token }}"):
        tokenizer.chat_template = template
        assert chat_pieces(tokenizer) is None


def test_the_start_token_is_no_marker_of_turns(tokenizer):
    assert start_token(tokenizer) == tokenizer.bos_token_id
    tokenizer.chat_template = CHAT
    assert start_token(tokenizer) == tokenizer.bos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert start_token(tokenizer) == tokenizer.unk_token_id
    tokenizer.chat_template = None
    tokenizer.bos_token = None
    assert start_token(tokenizer) == tokenizer.eos_token_id


def test_a_teacher_that_ends_every_text_at_once(teacher, tokenizer):
    with torch.no_grad():
        teacher.model.norm.weight.zero_()
        head = torch.nn.Linear(teacher.config.hidden_size, teacher.config.vocab_size)
        head.weight.zero_()
        head.bias.zero_()
        head.bias[tokenizer.eos_token_id] = 100.0
        teacher.lm_head = head
    with pytest.raises(ModelError, match="ends every text at once") as caught:
        write(teacher, tokenizer)
    assert "\n" not in str(caught.value)


def test_progress_tells_how_far_it_is(teacher, tokenizer, monkeypatch):
    monkeypatch.setattr(selftext, "seconds_between_lines", lambda: 0.0)
    lines: list[str] = []
    write(teacher, tokenizer, progress=lines.append)
    assert len(lines) > 10
    assert lines[-1].startswith("self text: 300 of 300 tokens, ")
    assert lines[-1].endswith(" tok/s, 0 s left")
    # Half of a chat model's text is conversations, and their batches are cut at the end.
    monkeypatch.setattr(selftext, "LONGEST_QUESTION", 250)
    tokenizer.chat_template = CHAT
    lines.clear()
    write(teacher, tokenizer, 1600, sample_length=440, progress=lines.append)
    written = [int(line.split()[2].replace(",", "")) for line in lines]
    assert written == sorted(written) and written[-1] == 1600
    assert any(400 < tokens <= 800 for tokens in written)


def test_rows_that_leave_a_batch_do_not_change_the_others(teacher, tokenizer):
    """At a temperature near 0 every row has one likely answer, alone or in a batch whose other rows end early."""
    prompts = [tokenizer(text).input_ids for text in ("Once upon a time", "The dog ran to", "Lily was sad because she")]
    writer = _Writer(teacher, tokenizer, 128, 8, 1e-3, _Pace(1, lambda _: None))
    free = writer._continue(prompts, 40, [teacher.config.vocab_size - 1])
    ends = [free[0][9], free[1][24]]  # tokens that two of the rows come to in the middle
    together = writer._continue(prompts, 40, ends)
    assert len({len(answer) for answer in together}) > 1  # they do end at different times
    assert together == [writer._continue([prompt], 40, ends)[0] for prompt in prompts]
