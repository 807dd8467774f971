"""Trains the tiny model of the tests: `python -m tests.made.train FOLDER`, then its weights go into `tiny/` in float16.

A run takes some minutes on two cores. The tests hold for any model that it makes, so bits need not be the same again.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from linearize.data import recalltext
from tests.made.data import alpaca
from tests.made.text import book, play, stories, wiki_pages

_UNKNOWN, _START, _END = "<unk>", "<|start_story|>", "<|end_story|>"
_VOCABULARY, _LENGTH = 1024, 288
# Rows per step, learning rates of the first and the last step, and steps.
_PHASES = ((8, 4e-3, 4e-3, 250), (8, 4e-3, 0.0, 150))


def documents(seed: str) -> Iterator[str]:
    """Text of each kind that the data sets have, without end."""
    draw = random.Random(f"mix {seed}")  # noqa: S311 - to be repeated
    scenes = play(f"scenes {seed}", 1_500_000)
    kinds = {
        "play": [scenes[at : at + 1400] for at in range(0, len(scenes), 1400)],
        "wiki": ["\n = The " + page for page in wiki_pages(f"train {seed}", 300).split("\n = The ")],
        "book": book(f"train {seed}", 600_000).split("\n\nCHAPTER"),
    }
    told, asked = stories(f"train {seed}"), alpaca(f"train {seed}")
    while True:
        (kind,) = draw.choices(("story", "play", "wiki", "book", "question"), (45, 20, 13, 12, 10))
        if kind == "story":
            yield next(told)
        elif kind == "question":
            yield "\n".join(next(asked).values())
        else:
            yield draw.choice(kinds[kind])


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE without words' borders, so that some tokens span two words."""
    tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    draw = random.Random(3)  # noqa: S311 - to be repeated

    def text() -> Iterator[str]:
        for document in islice(documents("words"), 600):
            yield from (f" {sentence}" for sentence in document.replace("\n", " \n").split(". "))
        words = (recalltext._WHO, recalltext._DID, recalltext._WHAT, recalltext._WHERE)
        for _ in range(250):  # the words of `source: recall`, of which rows of 256 tokens are to hold some
            yield f" {' '.join(map(draw.choice, words))}."
            yield f" has the {draw.choice(recalltext._THINGS)} {draw.randrange(100, 99_999)}."

    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=[_UNKNOWN, _START, _END], max_token_length=14, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(text(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{_START} $A", special_tokens=[(_START, 1)])
    return tokenizer


def train(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Two layers, 280,000 parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    model, held, text = LlamaForCausalLM(config), list[int](), documents("a")
    for rows, first, last, steps in _PHASES:
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = (first + (last - first) * step / steps) * min(1, (step + 1) / 50)
            while len(held) < rows * _LENGTH:
                held += [*tokenizer.encode(next(text)).ids, 2]
            ids, held = torch.tensor(held[: rows * _LENGTH]).view(rows, _LENGTH), held[rows * _LENGTH :]
            loss = model(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                print(f"step {step}: loss {float(loss.detach()):.3f}", flush=True)
    return model


def main(folder: Path) -> None:
    tokenizer = make_tokenizer()
    model = train(tokenizer)
    model.save_pretrained(folder)
    save_file(
        {name: tensor.half() for name, tensor in model.state_dict().items() if name != "lm_head.weight"},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    ends = {"bos_token": _START, "eos_token": _END, "unk_token": _UNKNOWN, "pad_token": _UNKNOWN}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
