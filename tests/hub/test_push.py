"""`linearize push`, through the real client, to a Hub on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import linearize_kernels
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import linearize
from linearize.checkpoint.provenance import teacher_of
from linearize.errors import ModelError, OutputError
from linearize.hub.paths import Portable, is_local_path, local_paths
from linearize.hub.push import pack
from linearize.runtime.files import sha256
from linearize.sources.source import find_source
from tests.hub.clean import LOAD, clean_site, run_python
from tests.hub.conftest import rewrite
from tests.hub.local_hub import READ_TOKEN, TOKEN

REPO = "me/smol"
SHORT = ("--yes", "--steps", "8")
WITH_PACKAGE = """
sys.path[:0] = sys.argv.pop(1).split(":")
from linearize.cli import main
main()
"""
PACKAGES = ":".join(str(Path(package.__file__).parents[1]) for package in (linearize, linearize_kernels))


def test_a_push_is_one_commit_of_what_the_folder_holds(hub, checkpoint, outcome):
    status, out, words = outcome("push", REPO, checkpoint, *SHORT)
    assert (status, out) == (0, f"{hub.endpoint}/{REPO}\n"), words
    repo = hub.repos[REPO]
    assert repo.private and [commit.message for commit in hub.pushed(REPO)] == ["Upload smol (linearize 0.2.0)"]
    for name in pack(checkpoint).files:
        kept = repo.head.files[name]
        content = hub.blobs[kept] if isinstance(kept, str) else kept
        assert content == (checkpoint / name).read_bytes(), name
    assert isinstance(repo.head.files["model.safetensors"], str)  # by LFS
    private = [token for _, path, token in hub.requests if path.startswith(("/api/models", "/api/repos", "/me/"))]
    assert set(private) == {TOKEN}
    assert "model.safetensors" in words and "How to load it" in words  # files and card are shown first

    status, out, words = outcome("push", REPO, checkpoint, *SHORT, "--json")
    facts = json.loads(out)
    assert status == 0 and facts["changed"] is False and facts["commit"] == repo.head.oid
    assert len(hub.pushed(REPO)) == 1 and len(hub.seen("PUT")) == 1


@pytest.mark.check
def test_what_is_pushed_is_loaded_and_verified_by_its_name(hub, quick, checkpoint, outcome, tmp_path):
    assert outcome("push", "smol", checkpoint, "--yes")[0] == 0  # the owner is who is logged in
    online = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = (PACKAGES, "verify", REPO, "--steps", "8", "--tokens", "64", "--json")
    found = json.loads(run_python(tmp_path, WITH_PACKAGE, *command, **online))
    assert found["model"] == REPO and found["passed"] and len(found["checks"]) == 10
    site, home = clean_site(tmp_path / "site"), tmp_path / "home"
    home.mkdir()
    total, tokens = run_python(home, LOAD, REPO, site=site, **online).splitlines()
    model, ids = AutoModelForCausalLM.from_pretrained(checkpoint), torch.arange(5, 105)[None]
    assert float(total) == pytest.approx(float(model(ids).logits.double().sum()), rel=1e-6)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 100:].tolist()
    assert json.loads(tokens) == expected


def test_a_model_on_the_hub_has_its_teacher_there(hub, quick, checkpoint, outcome, tiny_folder):
    assert outcome("push", REPO, checkpoint, "--yes")[0] == 0
    pulled = find_source(REPO)
    assert pulled.kind == "hub" and pulled.is_converted and teacher_of(pulled) == find_source("acme/tiny")
    plain, gone = find_source(str(tiny_folder)), find_source("acme/gone")
    assert not plain.is_converted and teacher_of(plain) is plain
    with pytest.raises(ModelError, match="acme/gone: no local folder or file of this name, and the Hub has no such"):
        print(gone.is_converted)


def test_an_upload_that_is_cut_three_times_ends_in_one_commit(hub, quick, checkpoint, outcome):
    weights = checkpoint / "model.safetensors"
    torn = load_file(weights)
    names = sorted(torn)
    for part, own in enumerate((names[::2], names[1::2])):
        save_file({name: torn[name] for name in own}, checkpoint / f"model-0000{part + 1}-of-00002.safetensors")
    parts = [checkpoint / f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    index = {
        "metadata": {"total_size": sum(part.stat().st_size for part in parts)},
        "weight_map": {name: parts[place % 2].name for place, name in enumerate(names)},
    }
    weights.unlink()
    provenance = json.loads((checkpoint / "linearize.json").read_text())
    del provenance["files"]["model.safetensors"]
    rewrite(checkpoint, "linearize.json", json.dumps(provenance))
    for part in parts:
        provenance["files"][part.name] = sha256(part)
    rewrite(checkpoint, "linearize.json", json.dumps(provenance))
    rewrite(checkpoint, "model.safetensors.index.json", json.dumps(index))

    again = "run the same command again: what has arrived is not sent twice"
    # 1. One shard does not get through, however often the client tries.
    hub.fail("PUT", f"/lfs/{sha256(parts[1])}", "cut", times=6)
    status, out, words = outcome("push", REPO, checkpoint, *SHORT)
    assert (status, out) == (1, "") and f"error: {REPO}: the connection to {hub.endpoint} failed" in words
    assert again in words and not hub.pushed(REPO) and list(hub.blobs) == [sha256(parts[0])]
    # 2. The Hub cannot be reached.
    hub.fail("POST", "/preupload/", "cut", times=99)
    assert outcome("push", REPO, checkpoint, *SHORT)[0] == 1 and not hub.pushed(REPO)
    hub.faults.clear()
    # 3. It takes the commit, and the answer is lost, as is all that follows.
    hub.fail("POST", "/commit/", "lose")
    hub.fail("POST", "/preupload/", "cut", times=0)
    hub.fail("GET", "/api/models/", "cut", times=0)
    status, _, words = outcome("push", REPO, checkpoint, *SHORT)
    assert status == 0 and "going on in 1 s" in words  # it looked again, and found its commit there
    status, _, words = outcome("push", REPO, checkpoint, *SHORT)
    assert status == 0 and "has these files already" in words
    assert len(hub.pushed(REPO)) == 1
    sent = hub.seen("PUT")
    assert sent.count(f"/lfs/{sha256(parts[0])}") == 1 and sent.count(f"/lfs/{sha256(parts[1])}") == 7


@pytest.mark.parametrize(
    ("method", "path", "how", "times", "said"),
    [
        ("GET", "/whoami", 401, 1, "the Hub wants a valid token; log in with: hf auth login"),
        (
            "POST",
            "/commit/",
            403,
            1,
            "the token may not write to me/smol; make one that may write at {endpoint}/settings",
        ),
        ("POST", "/commit/", 409, 3, "somebody else changed it at the same time; run the same command again"),
        ("POST", "/preupload/", 429, 99, "the Hub asks to wait (429, too many requests); run the same command again"),
        ("PUT", "/lfs/", 503, 6, "the Hub answers 503; run the same command again"),
        ("POST", "/repos/create", 500, 3, "the Hub answers 500; run the same command again"),
        ("POST", "/batch", 413, 1, "the Hub finds a file too large"),
        ("POST", "/validate-yaml", 400, 1, "Invalid metadata in README.md. - planted"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_line(hub, quick, checkpoint, outcome, method, path, how, times, said):
    hub.fail(method, path, how, times)
    status, out, words = outcome("push", REPO, checkpoint, *SHORT)
    last = words.splitlines()[-1]
    assert (status, out) == (1, "") and last.startswith(f"error: {REPO}: {said.format(endpoint=hub.endpoint)}"), last
    assert not hub.repos.get(REPO) or not hub.pushed(REPO)


@pytest.mark.parametrize(
    ("path", "how", "times"), [("/commit/", 409, 1), ("/commit/", 502, 2), ("/create", "cut", 2), ("/yaml", "cut", 1)]
)
def test_what_passes_is_waited_for(hub, quick, checkpoint, outcome, path, how, times):
    hub.fail("POST", path, how, times)
    assert outcome("push", REPO, checkpoint, *SHORT)[0] == 0
    assert len(hub.pushed(REPO)) == 1


def test_a_token_is_shown_nowhere(hub, quick, checkpoint, outcome, monkeypatch):
    for debug in ("0", "1"):
        monkeypatch.setenv("LINEARIZE_DEBUG", debug)
        for token in (TOKEN, READ_TOKEN, "hf_" + "Forgotten" * 4):
            monkeypatch.setenv("HF_TOKEN", token)
            for faults in ((), (("PUT", "/lfs/", 403, 1),), (("GET", "/whoami", "cut", 9),)):
                hub.repos.clear()
                hub.blobs.clear()
                hub.faults.clear()
                for fault in faults:
                    hub.fail(*fault)
                status, out, words = outcome("push", REPO, checkpoint, *SHORT)
                assert token not in out + words and token[3:] not in out + words
                assert status == int(token != TOKEN or bool(faults))
    assert {token for _, _, token in hub.requests} >= {TOKEN, READ_TOKEN}


def test_nobody_logged_in(hub, checkpoint, outcome, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    status, _, words = outcome("push", REPO, checkpoint, *SHORT)
    assert status == 1 and words == f"error: {REPO}: nobody is logged in to the Hub; log in with: hf auth login\n"


def test_offline_it_says_so(hub, checkpoint, outcome, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, _, words = outcome("push", REPO, checkpoint, *SHORT)
    assert status == 1 and words == f"error: {REPO}: HF_HUB_OFFLINE is set; unset it to push\n"


def test_private_unless_public(hub, quick, checkpoint, outcome):
    hub.create(REPO, private=False)
    status, _, words = outcome("push", REPO, checkpoint, *SHORT)
    assert status == 1 and "is public already; pass --public" in words and not hub.pushed(REPO)
    assert outcome("push", REPO, checkpoint, *SHORT, "--public")[0] == 0 and len(hub.pushed(REPO)) == 1
    assert outcome("push", "me/new", checkpoint, *SHORT, "--public")[0] == 0 and not hub.repos["me/new"].private
    hub.create("me/hidden")
    status, _, words = outcome("push", "me/hidden", checkpoint, *SHORT, "--public")
    assert status == 0 and "is private, and stays so" in words and hub.repos["me/hidden"].private


def test_a_dry_run_asks_the_hub_nothing(hub, checkpoint, outcome):
    status, out, words = outcome("push", REPO, checkpoint, "--dry-run")
    assert status == 0 and "model.safetensors" in out and "How to load it" in out
    assert "would push" in words and "(private); nothing was sent" in words and not hub.requests
    facts = json.loads(outcome("push", REPO, checkpoint, "--dry-run", "--json")[1])
    assert facts["files"]["model.safetensors"] == (checkpoint / "model.safetensors").stat().st_size


def test_it_asks_first(hub, checkpoint, outcome, monkeypatch):
    status, _, words = outcome("push", REPO, checkpoint)
    assert status == 1 and "there is no terminal to ask at; pass --yes" in words and not hub.requests
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda text, **_: (_ for _ in ()).throw(KeyboardInterrupt(text)))
    assert outcome("push", REPO, checkpoint)[0] == 130
    assert not hub.seen("POST")


def test_a_model_that_does_not_verify_is_refused(hub, checkpoint, outcome):
    weights = load_file(checkpoint / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name] = weights[name].fill_(1e38)  # not NaN, which is refused when it is read
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    status, _, words = outcome("push", REPO, checkpoint, *SHORT)
    assert status == 1 and "model.safetensors is not as it was written" in words and not hub.requests
    provenance = json.loads((checkpoint / "linearize.json").read_text())
    provenance["files"]["model.safetensors"] = sha256(checkpoint / "model.safetensors")
    rewrite(checkpoint, "linearize.json", json.dumps(provenance))
    status, _, words = outcome("push", REPO, checkpoint, *SHORT)
    assert status == 1 and "of its checks failed: " in words and "decode" in words and not hub.seen("POST")
    status, _, words = outcome("push", REPO, checkpoint, *SHORT, "--force")
    assert status == 0 and "pushed all the same" in words and len(hub.pushed(REPO)) == 1


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "recipe.yaml",
            "model: /data/private/llama\n",
            "recipe.yaml names a path of this machine (/data/p",
        ),
        ("metrics.jsonl", '{"data": "C:\\\\Users\\\\me\\\\x.txt"}\n', "metrics.jsonl names a path of this machine"),
        ("README.md", "see {home}/notes for more\n", "README.md names a path of this machine"),
        (
            "README.md",
            "`linearize eval 'x={{source: /usr/p/m}}'`\n",
            "README.md names a path of this machine (/usr/p/m)",
        ),
        ("README.md", "from '/usr/team secret/m'\n", "README.md names a path of this machine (/usr/team secret/m)"),
        ("held_out.safetensors", "", "held_out.safetensors holds rows of the training data"),
        ("notes.txt", f"export HF_TOKEN={TOKEN}\n", "notes.txt holds an access token"),
    ],
)
def test_what_is_of_this_machine_stays_there(hub, checkpoint, outcome, monkeypatch, name, text, said):
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    monkeypatch.setattr("linearize.cli.push.quiet_libraries", lambda **_: None)
    rewrite(checkpoint, name, text.format(home=checkpoint.parent) if "{home}" in text else text)
    status, _, words = outcome("push", REPO, checkpoint, *SHORT)
    assert status == 1 and said in words and words.count("\n") == 1 and not hub.requests
    assert TOKEN not in words
    secret = TOKEN in text
    assert ("linearize export" in words) != secret
    if secret:  # no force helps
        assert outcome("push", REPO, checkpoint, *SHORT, "--force")[0] == 1 and not hub.requests


@pytest.mark.parametrize("name", ["notes.txt", "sub/optimizer.pt"])
def test_files_that_were_not_written_with_it_stay_there(hub, checkpoint, outcome, name):
    (checkpoint / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (checkpoint / "README.md").write_text("# Edited\nServed at `/v1/chat/completions`.\n")
    assert pack(checkpoint).findings == []
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text("mine\n")
    for tried in ((*SHORT,), ("--dry-run",)):
        status, _, words = outcome("push", REPO, checkpoint, *tried)
        assert status == 1 and f"{name} is not among the files that linearize.json names; write a folder" in words
    assert not hub.requests


def test_what_a_path_is():
    for text in (
        "/home/me/x",
        "/data/llama/",
        "~/models/a",
        "~/a b",
        "C:\\models\\a",
        "file:///srv/a b/c",
        "/srv/x/y.gguf",
    ):
        assert is_local_path(text), text
    for text in ("me/smol", "/think", "{% if /a/b %}", "and/or", "/", "<s>", "https://x.org/a/b", "a /b/c"):
        assert not is_local_path(text), text


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("see (/usr/p/m), /srv/q/n.", "see (m), n."),
        ("a,/usr/p/m:~/q;file:///srv/p/n", "a,m:q;n"),
        ("{source: /srv/private/*.jsonl}", "{source: *.jsonl}"),
        ('"/usr/team secret/m" and `/data/team secret/n`', '"m" and `n`'),
        ("<text>/usr/p/m</text>", "<text>m</text>"),
        ("x=C:\\Users\\me\\m, d:/models/n", "x=m, n"),
        ("in /runs/lr=0.1/m(1)/n /data/team\\ secret/o", "in n o"),
    ],
)
def test_paths_within_a_text(text, without):
    assert Portable().text(text) == without
    assert local_paths(text) and not local_paths(without)


@pytest.mark.parametrize(
    "text",
    [
        "owner/name, 1/2 and/or tokens/s",
        "https://x.org/a/b?c=/d/e and hf://datasets/a/b",
        "`a`/`b`/`c` +/- /think </think> <s>",
        "../a/b ./a/b $HOME/a/b {{ x }}/a/b",
        "(system − window) / (teacher − window)",
    ],
)
def test_what_looks_like_a_path_stays(text):
    assert Portable().text(text) == text and not local_paths(text)


def test_old_shards_and_code_go_with_the_same_commit(hub, quick, checkpoint, outcome):
    old = {"model-00001-of-00002.safetensors": b"old", "modeling_old.py": b"old", "notes.md": b"kept"}
    hub.create(REPO).head.files.update(old)
    assert outcome("push", REPO, checkpoint, *SHORT)[0] == 0
    assert len(hub.pushed(REPO)) == 1
    assert old.keys() & hub.repos[REPO].head.files.keys() == {"notes.md"}


def test_the_folder_is_the_one_of_its_name(hub, checkpoint, outcome, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    assert outcome("push", REPO, "--dry-run")[0] == 0
    status, _, words = outcome("push", "me/elsewhere", "--dry-run")
    assert status == 1 and "elsewhere: no such folder; name the checkpoint's: linearize push REPO FOLDER" in words
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    assert "has no linearize.json" in outcome("push", REPO, "--dry-run")[2]


PUSH_AND_WAIT = """
import sys
from pathlib import Path
from linearize.hub.push import push

def confirm(*_):
    print("asked", flush=True)
    sys.stdin.readline()

print(push(Path(sys.argv[2]), sys.argv[1], failed=lambda: [], confirm=confirm).commit)
"""
"""A push that has been begun, and goes on when it is told to."""


def test_a_second_push_to_a_repository_is_refused_while_the_first_is_under_way(hub, quick, checkpoint, outcome):
    online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": PACKAGES}
    first = subprocess.Popen(
        [sys.executable, "-c", PUSH_AND_WAIT, "smol", str(checkpoint)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **online},
    )  # fmt: skip
    try:
        assert first.stdout.readline() == "asked\n"
        status, out, words = outcome("push", REPO, checkpoint, "--yes")
        told = f"error: {REPO}: another job is writing there (process {first.pid} on "
        assert (status, out) == (1, "") and told in words.splitlines()[-1] and "wait for it" in words
        assert not hub.seen("POST")
        assert outcome("push", "me/other", checkpoint, "--yes")[0] == 0  # the folder itself is only read
        commit, _ = first.communicate("go on\n", timeout=60)
    finally:
        first.kill()
        first.wait()
    assert hub.pushed(REPO)[0].oid == commit.strip()
    status, _, words = outcome("push", REPO, checkpoint, "--yes")
    assert status == 0 and "has these files already" in words and len(hub.pushed(REPO)) == 1
    assert list(Path(os.environ["LINEARIZE_CACHE"], "pushes").iterdir()) == []


@pytest.mark.parametrize("where", ["a file", "no home"])
def test_it_pushes_where_no_lock_can_be_kept(hub, quick, checkpoint, outcome, monkeypatch, where):
    if where == "a file":
        monkeypatch.setenv("LINEARIZE_CACHE", str(checkpoint / "config.json"))
    else:
        monkeypatch.setattr("linearize.hub.push.cache_folder", lambda: (_ for _ in ()).throw(OutputError("no home")))
    assert outcome("push", REPO, checkpoint, "--yes")[0] == 0 and len(hub.pushed(REPO)) == 1


def test_a_full_disk_under_the_client_is_told_before_anything_is_sent(hub, checkpoint, outcome, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    status, out, words = outcome("push", REPO, checkpoint, "--yes")
    assert (status, out) == (1, "") and f"error: {tmp_path / 'xet'}: 16 MB are needed, and 1 MB are free" in words
    assert not hub.seen("POST") and not hub.seen("PUT")
