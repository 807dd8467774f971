"""Answers of the pretrained model whose cache a kvpress press has cut. It runs in the environment that has kvpress:

    PYTHON evals/slots/press_worker.py MODEL DTYPE

reads requests from its standard input and writes a reply to each, one JSON object a line; `presses.py` is the other
end. So the two environments may have other versions of transformers. It imports nothing of this project.

A request has `press` (a name of kvpress's classes without `Press`, or null), `budget` (tokens of the context that stay
per key/value head, on average), `context` and `question` (token ids), and `new_tokens`, or `targets`: then the reply
has the loss of the question's tokens from the second on. kvpress's own protocol: the whole context is read with full
attention, then cut; the question and the answer are read and kept beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


def press_of(name: str | None, budget: int, context: int) -> Any:
    """The press that leaves `budget` of `context` tokens, or a context manager that changes nothing."""
    if name is None or budget >= context:
        return contextlib.nullcontext
    import kvpress

    # Presses keep int(tokens * (1 - ratio)).
    return getattr(kvpress, f"{name}Press")(compression_ratio=1 - (budget + 0.5) / context)


@torch.inference_mode()
def reply(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    context, question = (torch.tensor([request[name]]) for name in ("context", "question"))
    cache, read = DynamicCache(), context.shape[1]
    with press_of(request["press"], request["budget"], read)(model):
        model.model(input_ids=context, past_key_values=cache)
    kept = cache.get_seq_length()
    positions = torch.arange(read, read + question.shape[1])[None]
    logits = model(input_ids=question, past_key_values=cache, position_ids=positions).logits[0]
    if request.get("targets"):
        loss = torch.nn.functional.cross_entropy(logits[:-1].float(), question[0, 1:])
        return {"loss": float(loss), "kept": kept}
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    ids = [int(logits[-1].argmax())]
    while len(ids) < request["new_tokens"] and ids[-1] not in ends:
        positions = positions[:, -1:] + 1
        logits = model(input_ids=torch.tensor([ids[-1:]]), past_key_values=cache, position_ids=positions).logits[0]
        ids.append(int(logits[-1].argmax()))
    return {"ids": ids, "kept": kept}


def main() -> None:
    folder, dtype = sys.argv[1:]
    # Libraries print to what was the standard output; replies alone go there.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with tempfile.TemporaryDirectory() as plain:
        # KVzip reads a chat's prefix from the tokenizer; prompts here are plain text.
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(plain)
        model.config._name_or_path = plain
        for line in sys.stdin:
            try:
                answer = reply(model, json.loads(line))
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"[:300]}
            out.write(json.dumps(answer) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
