"""GGUF files: rotary scaling and end tokens are those of the same model in safetensors, and headers are read alone."""

from __future__ import annotations

import copy
import math
import struct
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from linearize.cli.app import run
from linearize.conversion.inspection import rotary_scaling
from linearize.errors import ModelError
from linearize.jobs.convert import convert_into
from linearize.recipe import load_recipe
from linearize.sources import ggufconfig
from linearize.sources.gguf import read_head
from linearize.sources.source import find_source, load_config, load_model, load_tokenizer
from tests.conversion.gguf_kit import TOKENS, tiny, write_gguf
from tests.tables import first_of

LENGTH = 300
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8_192,
}  # fmt: skip
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 256}


def llama3_factors(theta: float, width: int = 32, **changes) -> list[float]:
    """`rope_freqs.weight` as llama.cpp's converter computes it."""
    rope = {**LLAMA3, **changes}
    found = []
    for index in range(0, width, 2):
        wavelength = 2 * math.pi * theta ** (index / width)
        smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        smooth = min(max(smooth, 0.0), 1.0)
        found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return found


SLOW = [1.0 + index / 3 for index in range(16)]
LONG, SHORT = [1.5 + index for index in range(16)], [1.0 + index / 8 for index in range(16)]
LONGROPE = {"rope_type": "longrope", "short_factor": SLOW, "long_factor": SLOW, "attention_factor": 1.0}
YARN_SCALE = 1 + 0.1 * math.log(4)

SCALINGS = {
    "linear": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}, {"rope_type": "linear", "factor": 4.0},
    ),
    "linear is the default": ({"rope.scaling.factor": 4.0}, {}, {"rope_type": "linear", "factor": 4.0}),
    "linear, the old key": ({"rope.scale_linear": 2.0}, {}, {"rope_type": "linear", "factor": 2.0}),
    "yarn": (YARN, {}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}),
    "yarn, all keys": (
        {
            **YARN, "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0,
            "rope.scaling.attn_factor": 1.25, "rope.scaling.yarn_attn_factor": YARN_SCALE,
            "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.finetuned": True,
        },
        {},
        {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 16.0,
            "beta_slow": 2.0, "attention_factor": 1.25 * YARN_SCALE,
        },
    ),
    "llama 3": ({}, {"rope_freqs.weight": llama3_factors(1e4)}, LLAMA3),
    "llama 3.2": ({}, {"rope_freqs.weight": llama3_factors(1e4, factor=32.0)}, {**LLAMA3, "factor": 32.0}),
    "factors of no known rule": (
        {}, {"rope_freqs.weight": SLOW}, {**LONGROPE, "original_max_position_embeddings": 16_384},
    ),
    "factors beside a linear scale": (
        {"rope.scaling.factor": 2.0},
        {"rope_freqs.weight": SLOW},
        {
            **LONGROPE, "short_factor": [2 * each for each in SLOW], "long_factor": [2 * each for each in SLOW],
            "original_max_position_embeddings": 16_384,
        },
    ),
    "longrope, both tables": (
        {
            "rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.25,
            "rope.scaling.original_context_length": 2_048,
        },
        {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
        {
            "rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT, "attention_factor": 1.25,
            "original_max_position_embeddings": 2_048,
        },
    ),
}  # fmt: skip


def logits(model, ids):
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_positions_are_those_of_the_model_in_safetensors(name, tmp_path):
    """The teacher from the file, its conversion with a window over everything, and that checkpoint read again."""
    keys, tensors, rope = SCALINGS[name]
    plain = tiny("llama")
    expected = tiny("llama", rope_parameters={**rope, "rope_theta": 1e4})
    ids = torch.randint(0, len(TOKENS), (1, LENGTH), generator=torch.Generator().manual_seed(1))
    wanted = logits(expected, ids)
    assert (logits(plain, ids) - wanted).abs().max() > 0.05, "the scaling has to matter"
    source = find_source(str(write_gguf(tmp_path / "m.gguf", plain, keys, tensors)))
    teacher = load_model(source)
    torch.testing.assert_close(logits(teacher, ids), wanted, atol=1e-4, rtol=0)
    if "long_factor" in rope:  # a conversion has one table for texts of all lengths
        rope = {**rope, "short_factor": rope["long_factor"]}
        wanted = logits(tiny("llama", rope_parameters={**rope, "rope_theta": 1e4}), ids)
    (tmp_path / "out").mkdir()
    start = convert_into(source, load_recipe("window-gla", [f"mixer.window={LENGTH}"]), tmp_path / "out")
    torch.testing.assert_close(logits(start.model, ids), wanted, atol=1e-4, rtol=0)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(again, ids), wanted, atol=1e-4, rtol=0)
    written = load_config(find_source(str(tmp_path / "out"))).text_config.rope_parameters
    for key, value in rope.items():
        assert written[key] == (value if isinstance(value, str) else pytest.approx(value)), key


def test_gemma_3_scales_its_global_layers_alone(tmp_path):
    sizes = {"num_hidden_layers": 6, "sliding_window": 8, "initializer_range": 0.1}
    plain = tiny("gemma3_text", **sizes)
    rope = copy.deepcopy(plain.config.rope_parameters)
    rope["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    expected = tiny("gemma3_text", rope_parameters=rope, **sizes)
    ids = torch.randint(0, len(TOKENS), (1, 64), generator=torch.Generator().manual_seed(1))
    assert (logits(plain, ids) - logits(expected, ids)).abs().max() > 0.01
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    source = find_source(str(write_gguf(tmp_path / "m.gguf", plain, keys)))
    assert load_config(source).rope_parameters == rope
    torch.testing.assert_close(logits(load_model(source), ids), logits(expected, ids), atol=1e-4, rtol=0)
    (found,) = rotary_scaling(load_config(source))
    assert (found["layers"], found["type"], found["factor"]) == ("full_attention", "linear", 8.0)


def test_phi_3_keeps_its_partial_rotation_and_its_two_tables(tmp_path):
    short, long = [1.0 + index / 8 for index in range(12)], [2.0 + index for index in range(12)]
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "short_factor": short,
        "long_factor": long, "attention_factor": 1.19, "original_max_position_embeddings": 128,
    }  # fmt: skip
    sizes = {"rope_parameters": rope, "original_max_position_embeddings": 128, "sliding_window": None}
    expected = tiny("phi3", **sizes)
    keys = {"rope.scaling.attn_factor": 1.19, "rope.scaling.original_context_length": 128}
    tensors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    source = find_source(str(write_gguf(tmp_path / "m.gguf", expected, keys, tensors)))
    config = load_config(source)
    assert config.rope_parameters["partial_rotary_factor"] == 0.75
    teacher = load_model(source)
    for length in (100, 200):
        ids = torch.randint(0, len(TOKENS), (1, length), generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(logits(teacher, ids), logits(expected, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("keys", "tensors", "told"),
    [
        ({"rope.scaling.type": "su", "rope.scaling.factor": 2.0}, {}, "llama.rope.scaling.type cannot be applied (su)"),
        ({"rope.scaling.type": "longrope"}, {}, "longrope without the tensors"),
        ({"rope.scaling.alpha": 1000.0}, {}, "llama.rope.scaling.alpha cannot be applied"),
        ({**YARN, "rope.scaling.yarn_log_multiplier": 0.1}, {}, "llama.rope.scaling.yarn_log_multiplier cannot be"),
        ({**YARN, "rope.scaling.yarn_ext_factor": 0.5}, {}, "llama.rope.scaling.yarn_ext_factor cannot be"),
        ({**YARN, "rope.scaling.yarn_attn_factor": 0.7}, {}, "llama.rope.scaling.yarn_attn_factor cannot be"),
        ({"rope.scaling.attn_factor": 1.2}, {}, "llama.rope.scaling.attn_factor cannot be"),
        ({"rope.scaling.factor": "four"}, {}, "llama.rope.scaling.factor cannot be applied (four)"),
        ({"rope.scaling.factor": float("nan")}, {}, "llama.rope.scaling.factor cannot be applied (nan)"),
        ({"rope.scaling.factor": -2.0}, {}, "llama.rope.scaling.factor cannot be applied (-2.0)"),
        ({"rope.freq_base": 0.0}, {}, "llama.rope.freq_base cannot be applied (0.0)"),
        (YARN, {"rope_freqs.weight": SLOW}, "rope_freqs.weight cannot be applied (together with yarn)"),
        ({}, {"rope_freqs.weight": SLOW[:8]}, "rope_freqs.weight cannot be applied (8 factors for 16 pairs"),
        ({}, {"rope_freqs.weight": [0.0, *SLOW[1:]]}, "rope_freqs.weight cannot be applied (factors that are not"),
        ({}, {"rope_freqs.weight": [1 / each for each in SLOW]}, "rope_freqs.weight cannot be applied (numbers below"),
        ({}, {"rope_factors_long.weight": LONG}, "rope_factors_long.weight cannot be applied (without rope_factors_sh"),
        (
            {}, {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
            "rope_factors_long.weight cannot be applied (without llama.rope.scaling.original_context_length)",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_applied_is_refused_by_its_name(keys, tensors, told, tmp_path, capfd):
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), keys, tensors)
    assert run(["convert", str(path), "-o", str(tmp_path / "out"), "-r", "window-gla"]) == 1
    error = capfd.readouterr().err
    assert told in error and error.count("\n") == 1 and "Traceback" not in error
    assert [one.name for one in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("gemma2", {"num_hidden_layers": 46, "query_pre_attn_scalar": 8, "num_attention_heads": 8}),
        ("gemma3_text", {"num_hidden_layers": 62, "query_pre_attn_scalar": 8, "num_attention_heads": 8}),
    ],
)
@torch.no_grad()
def test_what_no_key_states_is_known_by_tensors_and_layers(model_type, settings, tmp_path):
    model = tiny(model_type, **settings)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    found = load_model(find_source(str(write_gguf(tmp_path / "model.gguf", model))), device="cpu")
    ids = torch.arange(10, 90)[None]
    expected = model(ids).logits
    # Another scale or no bias makes a difference as large as the logits; rounding adds up over so many layers.
    assert float((found(ids).logits - expected).abs().max()) < 1e-3 * float(expected.abs().max())


def test_a_tensor_without_a_place_is_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny("llama"), tensors={"blk.1.attn_post.weight": [1.0] * 64})
    with pytest.raises(ModelError, match=r"1 weight has no place in the model \(blk\.1\.attn_post\.weight\)"):
        load_model(find_source(str(path)), device="cpu")


@pytest.mark.parametrize(
    "keys",
    [
        {"rope.scaling.type": "none", "rope.scaling.factor": 8.0},
        {"rope.scaling.factor": 0.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0},
        {"rope.scaling.finetuned": True, "rope.scaling.attn_factor": 1.0},
    ],
)
def test_what_scales_nothing_changes_nothing(keys, tmp_path):
    config = load_config(find_source(str(write_gguf(tmp_path / "m.gguf", tiny("llama"), keys))))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}
    assert rotary_scaling(config) == []


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("without", [(), ("vocab_size",)])
def test_the_header_alone_gives_transformers_own_configuration(model_type, without, tmp_path):
    changes = {"num_hidden_layers": 6} if model_type == "gemma3_text" else {}
    model = tiny(model_type, **changes)
    arch = model_type.removesuffix("_text")
    path = write_gguf(tmp_path / "m.gguf", model, without=[f"{arch}.{key}" for key in without])
    expected = AutoConfig.from_pretrained(str(tmp_path), gguf_file="m.gguf")
    found = load_config(find_source(str(path)))
    assert found.to_dict() == expected.to_dict() and found.name_or_path == expected.name_or_path
    assert found.vocab_size == len(TOKENS)


def test_a_vocabulary_is_counted_and_not_read(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"))
    head = read_head(path)
    small = head.without_vocabulary("llama.vocab_size")
    assert head.values["tokenizer.ggml.tokens"] == len(TOKENS) and b"<|im_end|>" in path.read_bytes()
    (tmp_path / "small.gguf").write_bytes(small)
    fields = gguf.GGUFReader(tmp_path / "small.gguf").fields
    assert "tokenizer.ggml.tokens" not in fields and "tokenizer.chat_template" in fields
    assert fields["llama.vocab_size"].contents() == len(TOKENS)


def test_arrays_that_no_configuration_has_are_skipped_and_change_nothing(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"))
    source, reader, fields = find_source(str(path)), gguf.GGUFReader, []

    def read():
        with ggufconfig.short_reading():
            fields.append(gguf.GGUFReader(path).fields)
        return load_model(source), load_tokenizer(source)

    model, tokenizer = read()
    monkeypatch.setattr(ggufconfig, "_LONGEST_LIST", 10)
    short, same = read()
    assert gguf.GGUFReader is reader and fields[0].keys() == fields[1].keys()
    skipped = {key for key in fields[0] if fields[0][key].data and not fields[1][key].data}
    assert skipped == {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type"}
    assert model.config.to_dict() == short.config.to_dict() and tokenizer.get_vocab() == same.get_vocab()
    torch.testing.assert_close(dict(short.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


ENDS = [
    ({"tokenizer.ggml.eot_token_id": 2}, [0, 2]),
    ({"tokenizer.ggml.eom_token_id": 2, "tokenizer.ggml.eot_token_id": 1}, [0, 1, 2]),
    ({"tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.eom_token_id": 2}, [0, 2]),
    ({"tokenizer.ggml.eot_token_id": 0}, 0),
    ({"tokenizer.ggml.eot_token_id": 2**32 - 1}, 0),
    ({}, 0),
]


@pytest.mark.parametrize(("keys", "ends"), first_of(ENDS, 2))
def test_every_end_token_ends_what_a_model_writes(keys, ends, tmp_path):
    source = find_source(str(write_gguf(tmp_path / "m.gguf", tiny("llama"), keys)))
    assert load_model(source).generation_config.eos_token_id == ends
    (tmp_path / "out").mkdir()
    convert_into(source, load_recipe("window-gla"), tmp_path / "out")
    converted = find_source(str(tmp_path / "out"))
    assert load_model(converted).generation_config.eos_token_id == ends
    # A folder that the GGUF was saved as is converted from file to file.
    load_model(source).save_pretrained(tmp_path / "folder")
    load_tokenizer(source).save_pretrained(tmp_path / "folder")
    (tmp_path / "streamed").mkdir()
    convert_into(find_source(str(tmp_path / "folder")), load_recipe("window-gla"), tmp_path / "streamed")
    assert load_model(find_source(str(tmp_path / "streamed"))).generation_config.eos_token_id == ends


def certain(path: Path, token: int, **keys) -> Path:
    """A model that writes `token` whatever it reads."""
    model = tiny("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight[token] = 1.0
    return write_gguf(path, model, keys)


def test_a_chat_stops_at_the_end_of_the_turn(tmp_path, capfd):
    path = certain(tmp_path / "m.gguf", 2, **{"tokenizer.ggml.eot_token_id": 2})
    assert run(["convert", str(path), "-o", str(tmp_path / "out"), "-r", "window-gla"]) == 0
    for model in (path, tmp_path / "out"):
        capfd.readouterr()
        assert run(["generate", str(model), "hello", "--chat", "-n", "9", "--temperature", "0", "--json"]) == 0
        assert '"new_tokens": 1,' in capfd.readouterr().out


def test_self_written_conversations_end_with_the_end_of_the_turn(tmp_path):
    from linearize.data.selftext import _Pace, _Writer

    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), {"tokenizer.ggml.eot_token_id": 2})
    source = find_source(str(path))
    model, tokenizer = load_model(source), load_tokenizer(source)
    writer = _Writer(model, tokenizer, 32, 2, 1.0, _Pace(lambda *_: None, 1))
    assert writer.ends == [0, 2]


@pytest.mark.parametrize("flag", [True, False])
def test_a_start_token_is_added_where_the_file_says_so(flag, tmp_path):
    keys = {"tokenizer.ggml.add_bos_token": flag, "tokenizer.ggml.bos_token_id": 1}
    source = find_source(str(write_gguf(tmp_path / "m.gguf", tiny("llama"), keys)))
    tokenizer = load_tokenizer(source)
    assert (tokenizer("abc").input_ids[0] == 1) == flag
    tokenizer.save_pretrained(tmp_path / "t")
    assert AutoTokenizer.from_pretrained(tmp_path / "t")("abc").input_ids == tokenizer("abc").input_ids


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("command", [["inspect"], ["convert", "-o", "out"]])
def test_a_part_of_a_split_file_is_called_one(number, command, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"tiny-0000{number + 1}-of-00003.gguf"
    write_gguf(tmp_path / name, tiny("llama"), {"split.no": number, "split.count": 3})
    assert run([command[0], name, *command[1:]]) == 1
    error = capfd.readouterr().err
    assert f"part {number + 1} of 3 of a split GGUF model" in error and error.count("\n") == 1
    assert "llama-gguf-split --merge tiny-00001-of-00003.gguf tiny.gguf" in error
    assert not (tmp_path / "out").exists()


def test_a_split_file_without_tensors_is_called_one(tmp_path):
    """The first part of `llama-gguf-split --no-tensor-first-split`."""
    pairs = b"".join(
        struct.pack("<Q", len(key)) + key + struct.pack("<IH", 2, value)
        for key, value in ((b"split.no", 0), (b"split.count", 2))
    )
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + pairs)
    with pytest.raises(ModelError, match="part 1 of 2 of a split GGUF model"):
        find_source(str(tmp_path / "m.gguf"))


def test_a_file_that_is_not_split_is_read(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), {"split.no": 0, "split.count": 1})
    assert load_config(find_source(str(path))).num_hidden_layers == 2


def test_inspect_tells_the_scaling_of_any_source(tmp_path, capfd):
    keys, tensors, _ = SCALINGS["llama 3.2"]
    path = write_gguf(tmp_path / "m.gguf", tiny("llama", max_position_embeddings=131_072), keys, tensors)
    load_model(find_source(str(path))).save_pretrained(tmp_path / "folder")
    assert run(["inspect", str(path)]) == 0
    assert "rotary    llama3 by 32: from 8,192 to 131,072 tokens\n" in capfd.readouterr().out
    assert run(["inspect", str(tmp_path / "folder")]) == 0
    assert "rotary    llama3 by 32: from 8,192 to 131,072 tokens\n" in capfd.readouterr().out
    write_gguf(tmp_path / "plain.gguf", tiny("llama"))
    assert run(["inspect", str(tmp_path / "plain.gguf")]) == 0
    assert "rotary" not in capfd.readouterr().out
