"""A state is the text it was read from: saved, loaded, copied and continued, it says what the whole text would say."""

from __future__ import annotations

import copy
import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from linearize import State, __version__
from linearize.errors import DataError, OutputError, StateError
from linearize.generation import statefile
from linearize.generation.text import _turn, continue_text
from linearize.model import LinearizedForCausalLM, MixerConfig
from linearize.sources.fingerprint import fingerprint
from tests.forked import run_forked

PLAIN = [MixerConfig(layers=[0, 1], window=16)]
HYBRID = [
    MixerConfig(layers=[0], window=16, softmax_heads=[0]),
    MixerConfig(layers=[1], window=None, recurrence="none", sinks=0),
]
LANDMARKS = [MixerConfig(layers=[0, 1], window=16, landmarks=24)]
NEW = {"max_new_tokens": 16, "pad_token_id": 0, "eos_token_id": None}
GREEDY = {**NEW, "do_sample": False}


@pytest.fixture(scope="module")
def teacher(tiny_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def models(teacher: PreTrainedModel) -> dict[str, LinearizedForCausalLM]:
    """Converted models whose recurrence has a say, as after training."""
    made = {}
    for name, mixers in {"plain": PLAIN, "hybrid": HYBRID, "landmarks": LANDMARKS}.items():
        made[name] = LinearizedForCausalLM.from_teacher(copy.deepcopy(teacher), mixers).eval()
        for path, parameter in made[name].named_parameters():
            if path.endswith("mix_weight"):
                parameter.data = 0.3 + 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return made


@pytest.fixture(scope="module")
def model(models: dict[str, LinearizedForCausalLM]) -> LinearizedForCausalLM:
    return models["plain"]


@pytest.fixture(scope="module")
def ids(teacher: PreTrainedModel) -> Tensor:
    return torch.randint(5, teacher.config.vocab_size, (2, 120), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(model: LinearizedForCausalLM, ids: Tensor, tmp_path: Path) -> Path:
    """The state of 50 tokens in a file."""
    path = tmp_path / "a.state"
    State.read(model, ids[:1, :50]).save(path, model)
    return path


def held(state: State) -> dict[str, Tensor]:
    tensors = {f"{i}.{name}": x for i, layer in enumerate(state.layers) for name, x in layer.tensors()}
    return {**tensors, "last": state.last}


def same(a: State, b: State) -> bool:
    x, y = held(a), held(b)
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


CONTINUE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from linearize import State
folder, path, question = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder)
state = State.load(path, model)
new = state.generate(model, torch.tensor([question]), max_new_tokens=16, do_sample=False, eos_token_id=None)
print(json.dumps({"tokens": state.tokens.tolist(), "new": new.tolist()}))
"""


def test_a_long_prefix_goes_on_in_another_process(model, tmp_path):
    text = torch.randint(5, model.config.vocab_size, (1, 20_000), generator=torch.Generator().manual_seed(2))
    prefix, question = text[:, :-6], text[:, -6:]
    long, short = State.read(model, prefix), State.read(model, prefix[:, :100])
    assert long.nbytes == short.nbytes
    assert long.save(tmp_path / "long", model) == short.save(tmp_path / "short", model)
    assert long.nbytes < (tmp_path / "long").stat().st_size == (tmp_path / "short").stat().st_size
    model.save_pretrained(tmp_path / "model")
    arguments = [tmp_path / "model", tmp_path / "long", json.dumps(question[0].tolist())]
    done = run_forked(CONTINUE, *arguments)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    whole = model.generate(text, attention_mask=torch.ones_like(text), prefill_chunk_size=2048, **GREEDY)
    assert told == {"tokens": [19_994], "new": whole[:, 20_000:].tolist()}


@pytest.mark.parametrize("kind", ["plain", "hybrid", "landmarks"])
@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        {**GREEDY, "num_beams": 3},
        {**GREEDY, "num_beams": 4, "num_return_sequences": 2},
        {**NEW, "do_sample": True, "num_return_sequences": 3},
    ],
)
def test_generates_what_the_whole_text_would(models, ids, kind, options, tmp_path):
    model = models[kind]
    torch.manual_seed(0)
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]
    state = State.read(model, ids[:, :70])
    state.save(tmp_path / "state", model)
    loaded = State.load(tmp_path / "state", model)
    assert same(loaded, state)
    torch.manual_seed(0)
    assert torch.equal(loaded.generate(model, ids[:, 70:], **options), whole)
    further = State.read(model, ids[:, 70:], state=state)
    assert further.tokens.tolist() == [120, 120] and state.tokens.tolist() == [70, 70]
    torch.manual_seed(0)
    assert torch.equal(further.generate(model, **options), whole)


def test_what_was_generated_goes_on(model, ids):
    whole = State.read(model, ids).generate(model, **GREEDY)
    first = State.read(model, ids).generate(
        model, **{**GREEDY, "max_new_tokens": 6}, return_dict_in_generate=True, output_scores=True
    )
    assert first.sequences.shape == (2, 6) and len(first.scores) == 6
    state = State(first.past_key_values, first.sequences[:, -1:])
    rest = state.generate(model, **{**GREEDY, "max_new_tokens": 10})
    assert torch.equal(torch.cat([first.sequences, rest], 1), whole)


@pytest.mark.parametrize("kind", ["plain", "hybrid", "landmarks"])
def test_forks_are_independent(models, ids, kind):
    model = models[kind]
    state = State.read(model, ids[:, :40])
    before = {name: x.clone() for name, x in held(state).items()}
    fork = state.fork()
    assert same(fork, state)
    fork.generate(model, ids[:, 40:60], **GREEDY)
    model(ids[:, 40:60], past_key_values=fork.cache, use_cache=True)  # writes into the fork itself
    assert not same(fork, state)
    assert all(torch.equal(x, before[name]) for name, x in held(state).items())

    several = state.fork(2)
    questions = torch.stack([ids[0, 60:80], ids[1, 60:80], ids[1, 80:100], ids[0, 80:100]])
    together = several.generate(model, questions, **GREEDY)
    for row, question in enumerate(questions):
        alone = State.read(model, ids[row // 2 : row // 2 + 1, :40]).generate(model, question[None], **GREEDY)
        assert torch.equal(together[row : row + 1], alone)


def padded(rows: list[Tensor], width: int, side: str) -> tuple[Tensor, Tensor]:
    tokens, mask = torch.full((len(rows), width), 3), torch.zeros(len(rows), width, dtype=torch.long)
    for row, text in enumerate(rows):
        first = {"left": width - len(text), "right": 0, "middle": (width - len(text)) // 2}[side]
        tokens[row, first : first + len(text)], mask[row, first : first + len(text)] = text, 1
    return tokens, mask


@pytest.mark.parametrize("kind", ["plain", "hybrid", "landmarks"])
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padded_prompts_are_saved_and_go_on(models, ids, kind, side, tmp_path):
    model = models[kind]
    first, more = [ids[0, :40], ids[1, :23]], [ids[0, 40:45], ids[1, 23:60]]
    State.read(model, *padded(first, 50, side)).save(tmp_path / "state", model)
    state = State.load(tmp_path / "state", model)
    assert state.tokens.tolist() == [40, 23]
    together = state.generate(model, *padded(more, 40, side), **GREEDY)
    straight = state.generate(model, **GREEDY)
    for row in range(2):
        text = torch.cat([first[row], more[row]])[None]
        whole = model.generate(text, attention_mask=torch.ones_like(text), **GREEDY)[:, text.shape[1] :]
        assert torch.equal(together[row : row + 1], whole)
        assert torch.equal(straight[row : row + 1], State.read(model, first[row][None]).generate(model, **GREEDY))


def test_rows_without_tokens(model, ids):
    state = State.read(model, ids[:, :1])  # nothing but the last token: its memory is empty
    assert state.tokens.tolist() == [1, 1]
    mask = torch.tensor([[1] * 9, [0] * 9])
    assert State.read(model, ids[:, 1:10], mask, state).tokens.tolist() == [10, 1]
    assert same(State.read(model, ids[:, 1:1], state=state), state)
    with pytest.raises(DataError, match="row 1"):
        State.read(model, ids[:, 1:10], mask)
    with pytest.raises(DataError, match="fork"):
        state.generate(model, ids[:1])
    with pytest.raises(DataError, match="2 texts"):
        continue_text(model, None, "and then", state=state)


def test_another_model_is_refused(model, teacher, ids, saved):
    twin = copy.deepcopy(model)
    twin.model.layers[1].mlp.up_proj.weight.data[7, 5] += 1e-3
    mixer = MixerConfig(layers=[0, 1], window=16, gate_divisor=2.0)
    other = LinearizedForCausalLM.from_teacher(copy.deepcopy(teacher), [mixer]).eval()
    other.load_state_dict(model.state_dict())
    half = copy.deepcopy(model).to(torch.bfloat16)
    for stranger, told in ((twin, "same weights"), (other, "same configuration)"), (half, "same dtype and weights")):
        with pytest.raises(StateError, match="was saved by another model or configuration") as caught:
            State.load(saved, stranger)
        assert told in str(caught.value) and "read the text again" in str(caught.value)
    with pytest.raises(StateError, match="not a converted model"):
        State.load(saved, teacher)
    with pytest.raises(StateError, match="not a converted model"):
        State.read(teacher, ids)


def test_adapters_count_while_they_are_active(model, ids, saved):
    plain = fingerprint(model)
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    base = tuned.get_base_model()
    assert fingerprint(base)["weights"] != plain["weights"]
    with pytest.raises(StateError, match="same weights"):
        State.load(saved, tuned)
    with tuned.disable_adapter():
        assert fingerprint(base) == plain
        assert torch.equal(
            State.load(saved, tuned).generate(tuned, ids[:1, 50:], **GREEDY),
            State.load(saved, model).generate(model, ids[:1, 50:], **GREEDY),
        )
    active = fingerprint(base)
    tuned.add_adapter("second", LoraConfig(r=4, target_modules=["o_proj"]))
    assert fingerprint(base) == active  # loaded, and not active
    state = State.read(tuned, ids[:, :50])
    assert torch.equal(state.generate(tuned, **GREEDY), tuned.generate(input_ids=ids[:, :50], **GREEDY)[:, 50:])
    merged = copy.deepcopy(tuned).merge_and_unload()
    assert fingerprint(merged) not in (active, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_round_trip(model, ids, dtype, tmp_path):
    half = copy.deepcopy(model).to(dtype)
    state = State.read(half, ids)
    state.save(tmp_path / "state", half)
    assert same(State.load(tmp_path / "state", half), state)


Change = Callable[[dict[str, Tensor], dict[str, str]], object]


def rewrite(path: Path, change: Change) -> None:
    with safe_open(path, "pt") as file:
        tensors, head = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, head)
    save_file(tensors, path, head)


def nan(name: str) -> Change:
    return lambda t, _: t[name].view(-1)[3:4].fill_(float("nan"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t, _: t.pop("layers.1.window.v"), "layers.1.window.v is missing"),
        (lambda t, _: t.update(more=torch.zeros(2)), "'more' does not belong there"),
        (lambda t, _: t.update({"layers.0.window.v": t["layers.0.window.v"][:, 1:].clone()}), "has the shape"),
        (lambda t, _: t.update({"layers.0.window.v": t["layers.0.window.v"].half()}), "is float16, and float32"),
        (lambda t, _: t.update(last=torch.zeros(2, 1, dtype=torch.long)), "last has the shape [2, 1]"),
        (lambda t, _: t["last"].fill_(10**6), "not a token"),
        (nan("layers.0.state.state"), "layers.0.state.state has values that are not finite"),
        (lambda t, _: t["layers.1.sinks.v"].view(-1)[0].add_(0.5), "not what was written"),
        (lambda t, _: t["layers.1.counts"].add_(1), "does not agree with the tokens read"),
        (lambda _, h: h.update(tokens="000000000051"), "does not agree with the tokens read"),
        (lambda _, h: h.update(tokens="000000000050,000000000050"), "has the shape"),
        (lambda _, h: h.update(tokens="many"), "how many tokens"),
        (lambda _, h: h.pop("tokens"), "how many tokens"),
        (lambda _, h: h.pop("sha256"), "not what was written"),
        (lambda _, h: h.pop("weights"), "another model"),
        (lambda _, h: h.update(version="4", linearize="9.0"), "format is 4, which stores the memory in another way"),
        (lambda _, h: h.clear(), "is not a state"),
    ],
)  # fmt: skip
def test_a_changed_file_is_refused(model, saved, change, told):
    rewrite(saved, change)
    with pytest.raises(StateError) as caught:
        State.load(saved, model)
    assert told in str(caught.value) and str(saved) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("version", "linearize"), [("1", "0.1.0"), ("2", __version__)])
def test_a_state_of_an_older_format_is_read_again_into_its_place(model, saved, version, linearize):
    state = State.load(saved, model)
    more = {"layers.0.window.zero": torch.zeros(1)}  # as codes were stored before
    rewrite(saved, lambda tensors, head: tensors.update(more) or head.update(version=version, linearize=linearize))
    why = rf"the state's format is {version}, which stores the memory in another way, and linearize .* reads 3"
    advice = rf"read the text again \(linearize generate MODEL - -n 0 --save-state {saved} < TEXT\)"
    with pytest.raises(StateError, match=rf"^{saved}: {why}; {advice}$"):
        State.load(saved, model)
    state.save(saved, model)
    assert same(State.load(saved, model), state)


def test_files_that_are_no_states_are_refused(model, saved, tmp_path):
    content = saved.read_bytes()
    for number, wrong in enumerate(
        (content[:-1], content[:2000], content[:5], b"", b"Once upon a time", content + b"x")
    ):
        path = tmp_path / f"{number}.state"
        path.write_bytes(wrong)
        with pytest.raises(StateError, match=r"is not a state, or was cut off \(.*\); read the text again"):
            State.load(path, model)
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(StateError, match="no such file"):
            State.load(path, model)


def test_no_flipped_bit_goes_unnoticed(model, saved):
    """Wherever a bit flips, the file is refused, or (in the version that it names) nothing else is read."""
    content, state = saved.read_bytes(), State.load(saved, model)
    accepted = 0
    for place in [*range(0, 1600, 9), *range(1600, len(content), 997)]:
        saved.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            assert same(State.load(saved, model), state)
            accepted += 1
        except StateError as error:
            assert "\n" not in str(error)
    assert accepted <= 3


def test_what_cannot_be_saved(model, models, ids, saved, tmp_path):
    state = State.read(model, ids)
    with pytest.raises(OutputError, match="there is no folder"):
        state.save(tmp_path / "none" / "state", model)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OutputError, match="will not be overwritten"):
        state.save(tmp_path / "notes", model)
    with pytest.raises(OutputError, match="is a folder"):
        state.save(tmp_path, model)
    with pytest.raises(StateError, match="cannot be saved with this model"):
        state.save(saved, models["hybrid"])
    state.layers[0].parts["window"]["v"][0, 0] = float("inf")
    before = saved.read_bytes()
    with pytest.raises(StateError, match="not finite"):
        state.save(saved, model)
    assert saved.read_bytes() == before and (tmp_path / "notes").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"a.state", "notes"}


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
    ],
)
def test_an_interrupted_save_leaves_the_old_file(model, ids, saved, monkeypatch, error, seen):
    def half_way(_: object, path: Path, *__: object) -> None:
        path.write_bytes(b"half of it")
        raise error

    before = saved.read_bytes()
    monkeypatch.setattr(statefile, "save_file", half_way)
    with pytest.raises(seen):
        State.read(model, ids).save(saved, model)
    assert saved.read_bytes() == before and [path.name for path in saved.parent.iterdir()] == ["a.state"]


CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_next_turn_of_a_chat(model, ids, tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    state = State.read(model, ids[:1])
    start, turn = (
        "<|im_start|>system\nBe kind.<|im_end|>\n",
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    )
    assert _turn(tokenizer, "Why?", None) == start + turn
    assert _turn(tokenizer, "Why?", int(state.last)) == "<|im_end|>\n" + turn  # the answer was cut short
    state.last.fill_(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert _turn(tokenizer, "Why?", int(state.last)) == "\n" + turn
    tokenizer.chat_template = "{{ messages | length }}" + CHATML  # what it wrote before changes with every turn
    assert _turn(tokenizer, "Why?", int(state.last)) == "1" + start + turn


def test_reading_takes_the_same_memory_for_a_text_of_any_length(model, monkeypatch):
    """No tensor that grows with the text is made, and under a mask none but a few integers a token."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, Tensor) and (x.is_floating_point() or not masked):
                    self.numbers = max(self.numbers, x.numel())
            return result

    monkeypatch.setattr("linearize.generation.prompt.prefill_chunk", lambda device, rows: 64)
    seen = []
    for masked in (False, True):
        for tokens in (600, 2400):
            text = torch.full((1, tokens), 7)
            mask = (torch.arange(tokens) >= 9)[None] if masked else None
            with Largest() as largest:
                State.read(model, text, mask)
            seen.append(largest.numbers)
    assert seen[0] == seen[1] and seen[2] == seen[3]
