"""Converted checkpoints in vLLM write what transformers writes: chunked prompts, requests that come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

vllm = pytest.importorskip("vllm")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from linearize.model import LinearizedForCausalLM, MixerConfig  # noqa: E402
from tests.model.test_families import ROWS, build  # noqa: E402
from tests.model.test_layer import KINDS, converted  # noqa: E402
from tests.vllm.kit import differences, served, write  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.vllm

LENGTHS = (1, 2, 15, 21, 40, 64, 80, 33)  # of the prompts: shorter and longer than window and sinks
NEW = 24


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    torch.manual_seed(0)
    # Layers and heads that keep softmax are paged, for which vLLM's CPU kernels need heads of 32 or wider.
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=256, initializer_range=0.2, bos_token_id=0,
        eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(vocabulary: int = 97) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


def saved(model: LinearizedForCausalLM, folder: Path) -> LinearizedForCausalLM:
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_writes_as_in_transformers(teacher, kind, tmp_path: Path) -> None:
    """Eight requests on four places, so they wait, come and go; prompts in chunks of what is left of 32 tokens."""
    model = saved(converted(teacher, **KINDS[kind]), tmp_path)
    with served(tmp_path, max_num_batched_tokens=32) as llm:
        texts = write(llm, prompts(), NEW)
    assert differences(model, prompts(), texts) == []


@pytest.mark.parametrize("options", [{"max_num_batched_tokens": 2048, "max_num_seqs": 8}, {"max_num_seqs": 1}])
def test_whole_prompts_together_and_one_after_the_other(teacher, options, tmp_path: Path) -> None:
    model = saved(converted(teacher, landmarks=24), tmp_path)
    with served(tmp_path, **options) as llm:
        texts = write(llm, prompts(), NEW)
        assert write(llm, prompts()[::-1], NEW) == texts[::-1]  # on pages that other texts have used
    assert differences(model, prompts(), texts) == []


# Architectures, and options of others, that vLLM has no model of its own for.
ABSENT = ("ministral", "olmo", "olmo2", "olmo3", "smollm3", "glm", "starcoder2", "phi", "gpt_neox")
OTHER = (
    "qwen2, mixed", "qwen3, mixed, biases", "stablelm, all options", "gpt2, scaled by layer", "cohere",
    "gemma2, untied embeddings", "qwen2_moe, mixed",
)  # fmt: skip
FAMILIES = [row for row, (model_type, _) in ROWS.items() if model_type not in ABSENT and row not in OTHER]
# vLLM's CPU kernel for experts needs widths that are multiples of 32, and its model of granitemoe has no biases.
WIDE = {"hidden_size": 96, "head_dim": 16, "moe_intermediate_size": 32}
EXPERTS = {
    "mixtral": WIDE, "qwen2_moe": {**WIDE, "shared_expert_intermediate_size": 32}, "qwen3_moe": WIDE,
    "granitemoe": {**WIDE, "attention_bias": False},
}  # fmt: skip


@pytest.mark.parametrize("row", FAMILIES)
def test_every_family_that_vllm_has(row: str, tmp_path: Path) -> None:
    teacher = build(row, **EXPERTS.get(ROWS[row][0], {}))
    layers = list(range(teacher.config.num_hidden_layers))
    model = LinearizedForCausalLM.from_teacher(teacher, [MixerConfig(layers=layers, window=12, sinks=3)])
    for name, parameter in model.named_parameters():
        if name.endswith("mix_weight"):
            parameter.data.fill_(0.4)
    saved(model, tmp_path)
    asked = [prompt[:60] for prompt in prompts()]
    with served(tmp_path, max_num_batched_tokens=32) as llm:
        texts = write(llm, asked, NEW)
    assert differences(model, asked, texts) == []


def test_a_tied_checkpoint_that_stores_the_output_head_alone(teacher, tmp_path: Path) -> None:
    model = saved(converted(teacher), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with served(tmp_path) as llm:
        assert differences(model, prompts(), write(llm, prompts(), NEW)) == []


@pytest.mark.parametrize("bits", [8, 4])
def test_linearize_s_own_quantization_is_unpacked(teacher, bits: int, tmp_path: Path) -> None:
    saved(converted(teacher), tmp_path / "whole")
    export(tmp_path / "whole", tmp_path / "int", bits)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "int", dtype=torch.float32).eval()
    with served(tmp_path / "int") as llm:
        assert differences(model, prompts(), write(llm, prompts(), NEW)) == []


def test_an_adapter_of_peft(teacher, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    model = saved(converted(teacher), tmp_path / "base")
    torch.manual_seed(5)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    with served(tmp_path / "base", enable_lora=True, max_lora_rank=8) as llm:
        request = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
        asked = [{"prompt_token_ids": prompt} for prompt in prompts()]
        texts = [list(answer.outputs[0].token_ids) for answer in llm.generate(asked, greedy, lora_request=request)]
    assert differences(adapted, prompts(), texts) == []


def export(folder: Path, into: Path, bits: int) -> None:
    from dataclasses import asdict

    from linearize.model.quantized import Quantization, linear_layers
    from linearize.quantization.rounding import rounded

    model = LinearizedForCausalLM.from_pretrained(folder)
    spec = Quantization(bits=bits, group=None if bits == 8 else 32, kept=0.05)
    for owner, name, linear in list(linear_layers(model, head=False)):
        setattr(owner, name, rounded(linear, spec, torch.ones(linear.in_features)))
    model.config.quantized = asdict(spec)
    model.save_pretrained(into)


@pytest.mark.parametrize("kind", ["default", "landmarks", "softmax layer"])
def test_a_prefix_is_read_once(teacher, kind: str, tmp_path: Path) -> None:
    """A page is kept at the end of a prompt's chunk, and a later prompt with the same beginning goes on from it."""
    model = saved(converted(teacher, **KINDS[kind]), tmp_path)
    asked = [prompts()[6] + more for more in ([], [7, 8, 9], prompts()[3])]
    with served(tmp_path, enable_prefix_caching=True, max_num_batched_tokens=64, block_size=16) as llm:
        for prompt in asked:
            assert differences(model, [prompt], write(llm, [prompt], NEW)) == []
        assert read_before(llm, asked[2]) >= 32


@pytest.mark.parametrize("kind", ["landmarks", "landmarks, a learned score", "softmax layer"])
def test_two_tensor_parallel_ranks_have_half_the_heads_each(teacher, kind: str, tmp_path: Path) -> None:
    """Two processes over gloo; memory per rank is half of what one rank would need."""
    model = saved(converted(teacher, **KINDS[kind]), tmp_path)
    with served(tmp_path, tensor_parallel_size=2, distributed_executor_backend="mp", max_num_batched_tokens=32) as llm:
        texts = write(llm, prompts(), NEW)
    assert differences(model, prompts(), texts) == []


def read_before(llm, prompt: list[int]) -> int:
    """The number of tokens of a prompt that are not read again."""
    from vllm import SamplingParams

    (answer,) = llm.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=1, detokenize=False))
    return answer.num_cached_tokens


def test_the_cache_of_a_request_does_not_grow(teacher, tmp_path: Path) -> None:
    from evals.vllm.__main__ import used

    saved(converted(teacher, landmarks=24), tmp_path)
    held = set()
    with served(tmp_path, max_model_len=256) as llm:
        from vllm import SamplingParams

        for length in (3, 100, 250):
            prompt = {"prompt_token_ids": [5] * length}
            llm.llm_engine.add_request(str(length), prompt, SamplingParams(max_tokens=3, detokenize=False))
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
                held.add(used(llm))
    held.discard(0)  # after the last token
    assert len(held) == 1


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (
            "default",
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative decoding takes back",
        ),
        ("softmax head", {"tensor_parallel_size": 2}, "single heads keep softmax"),
        ("retention", {"tensor_parallel_size": 2}, "a head's decay in retention depends on its number"),
        ("default", {"tensor_parallel_size": 3}, "whole key/value heads, and the model has 4"),
    ],
)
def test_is_refused_with_the_reason(teacher, kind: str, options: dict, reason: str, tmp_path: Path) -> None:
    saved(converted(teacher, **KINDS[kind]), tmp_path)
    with pytest.raises(Exception, match=reason), served(tmp_path, **options):
        pass


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("olmo2", "no model of its own for 'olmo2'"),
        ("stablelm, all options", "has no qk_layernorm or use_parallel"),
        ("gemma2, untied embeddings", "ties its embeddings"),
        ("cohere", "has no attention_bias"),
    ],
)
def test_a_model_that_vllm_does_not_compute_is_refused(row: str, reason: str, tmp_path: Path) -> None:
    saved(LinearizedForCausalLM.from_teacher(build(row), [MixerConfig(layers=[0, 1], window=12)]), tmp_path)
    with pytest.raises(Exception, match=reason), served(tmp_path):
        pass
