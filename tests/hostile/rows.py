"""The table of hostile inputs: a name, how it is made and given to a command, and what the command says.

The faults of GGUF files carry the names that llama.cpp's own tests have for them (tests/test-gguf.cpp).
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.hostile.kit import WEIGHTS, Kit, gguf, pair
from tests.hostile.shared_rows import SHARED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def recipe(content: str | bytes) -> Callable[[Kit], list[Any]]:
    return lambda kit: ["recipes", "check", kit.write("r.yaml", content)]


def convert(make: Callable[[Kit], Path]) -> Callable[[Kit], list[Any]]:
    return lambda kit: ["convert", make(kit), *kit.out, "-r", "window-gla"]


def gguf_file(**fault: Any) -> Callable[[Kit], list[Any]]:
    return lambda kit: ["convert", kit.write("m.gguf", gguf(**fault)), *kit.out, "-r", "window-gla"]


def data(name: str, content: str | bytes) -> Callable[[Kit], list[Any]]:
    return lambda kit: ["finetune", "window-gla", *kit.out, *training(kit, kit.write(name, content))]


def training(kit: Kit, source: Path) -> list[str]:
    changes = (
        f"model={kit.plain}", f"stages.0.data.source={source}", "stages.0.data.tokens=256", "stages.0.length=64",
        "stages.0.batch_tokens=128", "stages.0.data.held_out=1", "mixer.window=16",
    )  # fmt: skip
    return [word for change in changes for word in ("--set", change)]


def state(change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Callable[[Kit], list[Any]]:
    def make(kit: Kit) -> list[Any]:
        with safe_open(kit.state, "pt") as file:
            tensors, head = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        change(tensors, head)
        save_file(tensors, kit.folder / "a.state", head)
        return ["generate", kit.converted, "x", "--load-state", kit.folder / "a.state"]

    return make


class _Trap:
    """Unpickled, it leaves a file behind, which the test looks for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def trapped(kit: Kit, name: str) -> Path:
    model = kit.model()
    (model / WEIGHTS).unlink()
    (model / name).write_bytes(pickle.dumps(_Trap(kit.folder / "trap")))
    return model


def link(path: Path, target: str) -> Path:
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return path.parent


def folder_of(kit: Kit, files: dict[str, str | bytes]) -> Path:
    """A folder of these files."""
    paths = [kit.write(name, content) for name, content in files.items()]
    return paths[0].parent


def nan(name: str, value: float) -> Callable[[Kit], Path]:
    return lambda kit: kit.weights(lambda t: t[name].view(-1)[7:8].fill_(value))


def moved(head: dict[str, Any], begin: int, end: int) -> None:
    head[NORM]["data_offsets"] = [begin, end]


def shards(change: Callable[[dict[str, str], Path], object]) -> Callable[[Kit], list[Any]]:
    return convert(lambda kit: kit.shards(change))


def header(change: Callable[[dict[str, Any]], object], length: int | None = None) -> Callable[[Kit], list[Any]]:
    return convert(lambda kit: kit.header(change, length=length))


def adapter(kit: Kit, folder: Path) -> Path:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/else", "r": 4, "target_modules": ["q"]})
    )
    save_file({"q.lora_A.weight": torch.zeros(4, 4)}, folder / "adapter_model.safetensors")
    return folder


NORM = "model.norm.weight"
PROJECTION = "model.layers.0.self_attn.q_proj.weight"
DEEP = "[" * 100_000
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
I32, U32, STRING, ARRAY = 5, 4, 8, 9
LONG = 100_000_000

RECIPES = [
    ("a key twice", recipe("seed: 1\nseed: 2\n"), "r.yaml:2: seed: key given twice (first on line 1); remove one"),
    ("a tag", recipe("seed: !!python/object/apply:os.system ['true']\n"), "r.yaml:1: tags (!...) are not allowed"),
    ("an alias bomb", recipe(BOMB), "r.yaml:1: anchors and aliases are not allowed in a recipe; write the value out"),
    (
        "a number as a string",
        recipe('seed: "1"\n'),
        "r.yaml:1: seed: expected an integer >= 0 and < 4294967296, got '1'",
    ),
    ("10 MB", recipe(b"description: " + b"x" * 10_000_000), "r.yaml: larger than 1000 kB; this is not a recipe"),
    ("a NUL byte", recipe(b"seed: 1\0\n"), "r.yaml: contains NUL bytes; a recipe is UTF-8 text"),
    ("not UTF-8", recipe("a: ü".encode("latin-1")), "r.yaml:1: not UTF-8 text; save the file as UTF-8"),
    ("nested 100,000 deep", recipe(f"seed: {DEEP}"), "r.yaml: nested too deeply"),
    ("two documents", recipe("seed: 1\n---\nseed: 2\n"), "r.yaml:2: not valid YAML"),
    ("a base that builds on it", recipe("base: r.yaml\n"), "r.yaml builds on this recipe in turn; name another base"),
    (
        "a number of 5,000 digits",
        recipe(f"seed: {'9' * 5000}\n"),
        "r.yaml:1: seed: expected an integer >= 0 and < 4294967296, got '999",
    ),
    (
        "a recipe that is a device",
        lambda kit: ["recipes", "check", "/dev/zero"],
        "/dev/zero: not a regular file",
    ),
    (
        "a link to itself",
        lambda kit: ["recipes", "check", link(kit.folder / "r.yaml", "r.yaml") / "r.yaml"],
        "r.yaml: no such file",
    ),
]

CHECKPOINTS = [
    (
        "weights as a pickle",
        convert(lambda kit: trapped(kit, "pytorch_model.bin")),
        "its weights are a pickle (pytorch_model.bin), which could run any code and is not read",
    ),
    (
        "a pickle named safetensors",
        convert(lambda kit: trapped(kit, WEIGHTS)),
        f"{WEIGHTS}: is damaged or cut off (",
    ),
    (
        "an index that leaves the folder",
        shards(lambda index, _: index.update({NORM: "../../../etc/x.safetensors"})),
        f"'{NORM}' is in '../../../etc/x.safetensors', outside the folder",
    ),
    (
        "an index with an absolute path",
        shards(lambda index, _: index.update({NORM: "/etc/x.safetensors"})),
        "outside the folder",
    ),
    (
        "an index that names a pickle",
        shards(lambda index, _: index.update({NORM: "x.bin"})),
        f"'{NORM}' is in 'x.bin', which is no safetensors file",
    ),
    ("an index of numbers", shards(lambda index, _: index.update({NORM: 7})), f"'{NORM}' is in '7', which is no"),
    ("an index of nothing", shards(lambda index, _: index.clear()), "index.json: has no weight_map"),
    (
        "a missing shard",
        shards(lambda _, model: (model / "model-00002-of-00002.safetensors").unlink()),
        "model-00002-of-00002.safetensors: the shard is missing; fetch it again",
    ),
    (
        "a shard that is a link to itself",
        shards(lambda _, model: link(model / "model-00002-of-00002.safetensors", "model-00002-of-00002.safetensors")),
        "model-00002-of-00002.safetensors: is a link that leads nowhere",
    ),
    (
        "weights that are a link to themselves",
        convert(lambda kit: link(kit.model() / WEIGHTS, WEIGHTS)),
        f"{WEIGHTS}: is a link that leads nowhere; fetch the file again",
    ),
    (
        "a config that is a link to itself",
        convert(lambda kit: link(kit.model() / "config.json", "config.json")),
        "the folder has no config.json",
    ),
    (
        "a folder that is a link to itself",
        lambda kit: ["inspect", kit.write("x/y", "") and link(kit.folder / "m", "m") / "m"],
        "no such folder or file",
    ),
    (
        "overlapping tensors",
        header(lambda head: moved(head, 0, 384)),
        f"{WEIGHTS}: is damaged or cut off (invalid offset",
    ),
    (
        "a tensor beyond the file",
        header(lambda head: moved(head, 2**40, 2**40 + 384)),
        f"{WEIGHTS}: is damaged or cut off",
    ),
    ("a huge header", header(lambda _: None, length=2**62), f"{WEIGHTS}: is damaged or cut off (header too large"),
    ("a header that is not JSON", header(lambda _: None, length=17), f"{WEIGHTS}: is damaged or cut off (invalid"),
    ("a file cut off", convert(lambda kit: cut(kit.model(), WEIGHTS)), f"{WEIGHTS}: is damaged or cut off ("),
    ("an empty file", convert(lambda kit: cut(kit.model(), WEIGHTS, 0)), f"{WEIGHTS}: is damaged or cut off ("),
    ("no weights", convert(lambda kit: without(kit.model(), WEIGHTS)), f"has no weights ({WEIGHTS}); fetch them again"),
    (
        "a wrong shape",
        convert(lambda kit: kit.weights(lambda t: t.update({PROJECTION: t[PROJECTION][:8].clone()}))),
        "its weights are not of the shapes that config.json asks for",
    ),
    (
        "a missing tensor",
        convert(lambda kit: kit.weights(lambda t: t.pop(PROJECTION))),
        f"1 weight is not there, {PROJECTION} among them",
    ),
    (
        "weights of another model",
        convert(lambda kit: kit.weights(lambda t: (t.clear(), t.update(x=torch.zeros(2))))),
        "weights are not there",
    ),
    ("NaN weights", convert(nan(PROJECTION, float("nan"))), f"{PROJECTION} has values that are not finite"),
    ("infinite weights", convert(nan(NORM, float("-inf"))), f"{NORM} has values that are not finite"),
    ("a config that is a list", convert(lambda kit: write(kit.model(), "config.json", "[]")), "expected a JSON object"),
    ("a config nested too deeply", convert(lambda kit: write(kit.model(), "config.json", DEEP)), "nested too deeply"),
    (
        "a config of 20 MB",
        convert(lambda kit: write(kit.model(), "config.json", " " * 20_000_000)),
        "is larger than 16 MB",
    ),
    ("a config that is not UTF-8", convert(lambda kit: write(kit.model(), "config.json", b"\xff\xfe")), "not JSON"),
    (
        "a billion layers",
        convert(lambda kit: kit.config(num_hidden_layers=10**9)),
        "config.json: num_hidden_layers is 1000000000; expected 1 to 4,096",
    ),
    (
        "no heads",
        convert(lambda kit: kit.config(num_attention_heads=0)),
        "config.json: num_attention_heads is 0; expected 1 or more",
    ),
    ("a width of a billion", convert(lambda kit: kit.config(hidden_size=960_000_000)), "are not of the shapes"),
    ("code of its own", convert(lambda kit: own_code(kit)), "pass --trust-remote-code if you trust its author"),
    (
        "a broken tokenizer",
        convert(lambda kit: write(kit.model(), "tokenizer.json", DEEP)),
        "cannot be read as a model",
    ),
    (
        "an adapter alone",
        convert(lambda kit: adapter(kit, kit.write("model/x", "").parent)),
        "it is an adapter; merge it",
    ),
    (
        "an adapter of another model",
        convert(lambda kit: adapter(kit, kit.model())),
        "has an adapter (adapter_config.json)",
    ),
    ("a path with control characters", lambda kit: ["inspect", "./a\0b\x1b[2J"], "./a?b?[2J: no such folder or file"),
    ("a path of 10,000 characters", lambda kit: ["inspect", "./" + "a" * 10_000], "cannot be looked for"),
    (
        "a provenance that is no object",
        lambda kit: [
            *("eval", write(kit.model(kit.converted), "linearize.json", "[1]")),
            *("--tasks", "wikitext2", "--baseline", "teacher"),
        ],
        "needs the teacher of model; name it with --teacher ID|FOLDER",
    ),
]

GGUFS = [
    ("HEADER_BAD_MAGIC", gguf_file(magic=b"FUGG"), "m.gguf: not a GGUF file"),
    ("HEADER_BAD_VERSION_1", gguf_file(version=1), "the GGUF file is of version 1, and 2 and 3 can be read"),
    ("HEADER_BAD_VERSION_FUTURE", gguf_file(version=4), "the GGUF file is of version 4, and 2 and 3 can be read"),
    ("HEADER_BAD_N_TENSORS", gguf_file(tensor_count=2**64 - 1), "18,446,744,073,709,551,615 tensors in"),
    ("HEADER_BAD_N_KV", gguf_file(pair_count=2**64 - 1), "18,446,744,073,709,551,615 key/value pairs in"),
    ("HEADER_EMPTY", gguf_file(names=()), "the GGUF file has no tensors"),
    ("KV_BAD_KEY_SIZE", gguf_file(pairs=(pair("k", U32, bytes(4), length=2**64 - 1),)), "a key of 18,446,744,073,709"),
    ("KV_BAD_TYPE", gguf_file(pairs=(pair("k", 13, b"x"),)), "'k' is of type 13, which there is not"),
    (
        "KV_BAD_VALUE_SIZE",
        gguf_file(pairs=(pair("k", STRING, struct.pack("<Q", 2**64 - 1)),)),
        "cut off at 640 bytes, or a length in it is damaged",
    ),
    ("KV_DUPLICATE_KEY", gguf_file(pairs=(pair("k", I32, bytes(4)),) * 2), "the key 'k' is there twice"),
    (
        "KV_BAD_ALIGN",
        gguf_file(pairs=(pair("general.alignment", U32, struct.pack("<I", 13)),)),
        "general.alignment is 13, which is no power of two",
    ),
    ("TENSORS_BAD_NAME_SIZE", gguf_file(names=("n" * 86,)), "a tensor's name of 86 bytes (at most 64 are allowed)"),
    ("TENSORS_BAD_N_DIMS", gguf_file(dims=5), "the tensor 'a' has 5 dimensions"),
    ("TENSORS_BAD_SHAPE", gguf_file(shape=(-1, -1)), "the tensor 'a' has the shape [-1, -1]"),
    ("TENSORS_NE_TOO_BIG", gguf_file(shape=(4 * (2**31 - 1),) * 2), "the tensor 'a' would take"),
    ("TENSORS_BAD_TYPE", gguf_file(kind=99), "the tensor 'a' is of type 99, which this version does not know"),
    ("TENSORS_BAD_OFFSET", gguf_file(offset=lambda _: -1), "the tensor 'a' starts at 18,446,744,073,709,551,615"),
    ("TENSORS_DUPLICATE_NAME", gguf_file(names=("a", "a")), "the tensor 'a' is there twice"),
    (
        "TENSORS_BAD_ALIGN",
        gguf_file(pairs=(pair("general.alignment", I32, struct.pack("<i", 32)),)),
        "general.alignment is 0, which is no power of two",
    ),
    ("TENSORS_INCONSISTENT_ALIGN", gguf_file(offset=lambda n: 257 * n), "starts at 257, which is no multiple of 32"),
    ("overlapping tensors", gguf_file(offset=lambda _: 0), "the tensor 'b' overlaps another"),
    ("DATA_NOT_ENOUGH_DATA", gguf_file(data=511), "the GGUF file is cut off at 639 of at least 640 bytes"),
    (
        "an array of 2^60 numbers",
        gguf_file(pairs=(pair("k", ARRAY, struct.pack("<IQ", U32, 2**60)),)),
        "cut off at 672 bytes, or a length in it is damaged",
    ),
    (
        "an array of 2^60 strings",
        gguf_file(pairs=(pair("k", ARRAY, struct.pack("<IQ", STRING, 2**60)),)),
        "1,152,921,504,606,846,976 strings of 'k' in",
    ),
    (
        "an array of arrays",
        gguf_file(pairs=(pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1)),)),
        "'k' is an array of type 9, which there is not",
    ),
    ("a key that is not UTF-8", gguf_file(pairs=(pair("k", U32, bytes(4)).replace(b"k", b"\xff"),)), "not UTF-8"),
    ("no architecture", gguf_file(), "cannot be read as a model: it has no general.architecture"),
    (
        "an architecture that is a number",
        gguf_file(pairs=(pair("general.architecture", U32, bytes(4)),)),
        "cannot be read as a model: it has no general.architecture",
    ),
    (
        "a part of 4,294,967,295",
        gguf_file(pairs=(pair("split.count", U32, b"\xff" * 4), pair("split.no", I32, b"\xff" * 4))),
        "part 0 of 4,294,967,295 of a split GGUF model",
    ),
]

DATA = [
    ("a broken JSON line", data("d.jsonl", '{"text": "x"}\n{"text": \n'), "d.jsonl:2: broken JSON ("),
    ("a JSON line nested too deeply", data("d.jsonl", DEEP), "d.jsonl:1: broken JSON (nested too deeply"),
    ("a number of 5,000 digits in JSON", data("d.jsonl", "9" * 5000), "d.jsonl:1: broken JSON ("),
    (
        "UTF-16",
        data("d.txt", ("\ufeff" + "some text " * 99).encode("utf-16-le")),
        "d.txt: not UTF-8 text (byte 0xff at 0)",
    ),
    ("a line of 100 MB", data("d.jsonl", b'{"text": "' + b"x" * LONG + b'"}'), "d.jsonl:1: a record of 100,000,0"),
    ("an empty file", data("d.txt", ""), "d.txt: the file is empty; give one with text in it"),
    ("an empty JSONL file", data("d.jsonl", "\n\n"), "d.jsonl: the file is empty"),
    ("a Parquet file that is none", data("d.parquet", "PAR1"), "d.parquet: not a readable Parquet file"),
    ("no texts but numbers", data("d.jsonl", '{"a": 1}\n'), "d.jsonl:1: the fields of this record are a; expected"),
    ("another kind of file", data("d.pkl", pickle.dumps(1)), "d.pkl: cannot read .pkl; give one of"),
    (
        "a device",
        lambda kit: [
            "finetune",
            "window-gla",
            *kit.out,
            *training(kit, link(kit.folder / "d.txt", "/dev/zero") / "d.txt"),
        ],
        "d.txt: not a regular file",
    ),
    ("a CSV row cut off", data("d.csv", "text,n\nx,1\ny"), "d.csv:3: 1 cell under a header of 2; mend that row"),
    ("a CSV quote that never ends", data("d.csv", 'text\n"x' + "y" * 9), "d.csv:2: not a readable table (a quote"),
    ("a CSV cell of 100 MB", data("d.csv", b"text\n" + b"x" * LONG), "d.csv:2: not a readable table (field larger"),
    ("a gzip bomb", data("d.txt.gz", gzip.compress(bytes(4 * LONG))), "d.txt.gz: unpacks to more than 100,000,000"),
    ("a gzip file that is none", data("d.jsonl.gz", "{}"), "d.jsonl.gz: is damaged or cut off ("),
    (
        "a folder of one file and a pickle",
        lambda kit: [
            "finetune",
            "window-gla",
            *kit.out,
            *training(kit, folder_of(kit, {"d/a.jsonl": "{}", "d/b.pkl": pickle.dumps(1)})),
        ],
        "d: this folder mixes several kinds of files (1 .jsonl, 1 .pkl)",
    ),
    (
        "a saved data set that is none",
        lambda kit: ["finetune", "window-gla", *kit.out, *training(kit, folder_of(kit, {"d/state.json": DEEP}))],
        "d: not a readable folder of save_to_disk (",
    ),
    (
        "a conversation nested too deeply in text",
        data("d.jsonl", json.dumps({"messages": DEEP})),
        'd.jsonl:1: messages is "[[[[',
    ),
    ("too little text", data("d.txt", "x" * 9), "d.txt: 10 tokens in 1 document are too few"),
]

STATES = [
    ("a state of another model", state(lambda _, h: h.update(weights="0" * 64)), "was saved by another model"),
    ("a state with NaN", state(lambda t, _: t["layers.0.window.v"].view(-1)[0].fill_(float("nan"))), "not finite"),
    ("a state of a future version", state(lambda _, h: h.update(version="99")), "format is 99"),
    ("a state with a huge count", state(lambda _, h: h.update(tokens="999999999999")), "the state is damaged"),
    (
        "a state that is a pickle",
        lambda kit: [
            "generate",
            kit.converted,
            "x",
            "--load-state",
            kit.write("a.state", pickle.dumps(_Trap(kit.folder / "trap"))),
        ],
        "is not a state, or was cut off",
    ),
    (
        "a state that is a device",
        lambda kit: ["generate", kit.converted, "x", "--load-state", "/dev/zero"],
        "no such file",
    ),
]

PROMPTS = [
    ("a prompt of no tokens", lambda kit: ["generate", kit.converted, ""], "the prompt is empty"),
    (
        "a million tokens for softmax attention",
        lambda kit: ["generate", kit.plain, "x" * 10**6, "-n", "1"],
        "the prompt has 1,000,000 tokens, and the model reads 512; shorten it, or convert it",
    ),
]


def both(kit: Kit, content: str) -> list[Path]:
    """Two files of results with the same content."""
    return [kit.write(name, content) for name in ("results.json", "other.json")]


RESULTS = [
    (
        "results that are no JSON",
        lambda kit: ["compare", *both(kit, "{")],
        "results.json: line 1: not JSON",
    ),
    ("results nested too deeply", lambda kit: ["compare", *both(kit, DEEP)], "nested too deeply"),
    (
        "results that are a very long number",
        lambda kit: ["compare", *both(kit, "9" * 5_000)],
        "a number of thousands of digits",
    ),
    (
        "results of another schema",
        lambda kit: ["compare", *both(kit, '{"schema": 1}')],
        "results.json: ",
    ),
]

ROWS = [
    *(("recipe", *row) for row in RECIPES),
    *(("checkpoint", *row) for row in CHECKPOINTS),
    *(("GGUF", *row) for row in GGUFS),
    *(("data", *row) for row in DATA),
    *(("state", *row) for row in STATES),
    *(("prompt", *row) for row in PROMPTS),
    *(("results", *row) for row in RESULTS),
    *(("shared", *row) for row in SHARED),
]


def cut(model: Path, name: str, size: int = 5_000) -> Path:
    os.truncate(model / name, size)
    return model


def without(model: Path, name: str) -> Path:
    (model / name).unlink()
    return model


def write(model: Path, name: str, content: str | bytes) -> Path:
    (model / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return model


def own_code(kit: Kit) -> Path:
    model = kit.config(model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    return write(model, "mine.py", f"import os\nos.mkdir({str(kit.folder / 'trap')!r})\n")
