"""A converted checkpoint's weights as vLLM's own models read them."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import nn

from linearize.model import LinearizedConfig
from linearize.model.quantized import Quantization
from linearize.quantization.rounding import rounded
from linearize.vllm.plugin import HYBRID, ServedConfig, keeps_softmax
from linearize.vllm.weights import bare_weights

TIED = {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 16)])
def test_quantized_layers_become_the_weights_that_they_compute_with(bits: int, group: int | None) -> None:
    torch.manual_seed(0)
    spec, linear, x = Quantization(bits=bits, group=group, kept=0.1), nn.Linear(64, 24), torch.randn(40, 64)
    layer = rounded(linear, spec, torch.rand(64))
    stored = {f"model.layers.0.up_proj.{name}": tensor for name, tensor in layer.state_dict().items()}
    others = {"model.norm.weight": torch.ones(8), "model.layers.0.self_attn.mixer.mix_weight": torch.ones(4)}
    given = dict(bare_weights([*stored.items(), *others.items()], LinearizedConfig(quantized=asdict(spec)), {}))
    assert given.keys() == {*others, "model.layers.0.up_proj.weight", "model.layers.0.up_proj.bias"}
    (weight, bias) = (given[f"model.layers.0.up_proj.{name}"] for name in ("weight", "bias"))
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), layer(x), rtol=0, atol=1e-5)


def test_the_output_head_alone_is_the_embedding_too() -> None:
    head, embedding = torch.ones(2, 2), torch.zeros(2, 2)
    given = dict(bare_weights([("lm_head.weight", head)], LinearizedConfig(), TIED))
    assert given["model.embed_tokens.weight"] is head
    both = dict(bare_weights([("lm_head.weight", head), (TIED["lm_head.weight"], embedding)], LinearizedConfig(), TIED))
    assert both["model.embed_tokens.weight"] is embedding


@pytest.mark.parametrize(
    ("sections", "hybrid"),
    [
        ([{"layers": [0, 1]}], False),
        ([{"layers": [1]}], True),
        ([{"layers": [0, 1], "softmax_heads": [0]}], True),
        ([{"layers": [0, 1], "window": None}], True),
    ],
)
def test_the_architecture_tells_if_a_layer_keeps_softmax(sections: list[dict], hybrid: bool) -> None:
    text = {"model_type": "qwen2", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    written = LinearizedConfig(text_config=text, mixers=sections, architectures=["LinearizedQwen2ForCausalLM"])
    config = ServedConfig.from_dict(written.to_dict())
    assert type(config) is LinearizedConfig and keeps_softmax(config) is hybrid
    assert config.architectures == [(HYBRID if hybrid else "") + "LinearizedQwen2ForCausalLM"]
    assert config.layer_types is None and config.text_config.layer_types == ["full_attention"] * 2
