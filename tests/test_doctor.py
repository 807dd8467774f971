"""What the doctor finds, what it never shows, and that it survives what is broken."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
from packaging.specifiers import SpecifierSet

from linearize.cli.app import run
from linearize.jobs import doctor

SECRET = "hf_" + "secret" * 5


def told(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    return run(["doctor", *arguments]), *capfd.readouterr()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path))
    monkeypatch.delenv("LINEARIZE_KERNELS", raising=False)


def test_people_and_programs_are_told_the_same(capfd, tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "kept").write_bytes(bytes(1234))
    (tmp_path / "link").symlink_to("below/kept")
    status, text, words = told(capfd, "--json")
    facts = json.loads(text)
    assert (status, words) == (0, "") and facts["ok"] and not [p for p in facts["problems"] if p["severity"] == "error"]
    for package in ("torch", "transformers", "peft"):
        assert facts["versions"][package] == metadata.version(package)
    kept = next(cache for cache in facts["caches"] if cache["name"] == "linearize")
    assert (kept["bytes"], kept["files"], kept["folder"]) == (1234, 1, str(tmp_path))
    assert set(facts["kernels"]["cpu"]) >= {"attention", "step", "gla"}
    status, text, _ = told(capfd)
    assert status == 0 and f"torch {facts['versions']['torch']}" in text and "linearize: 1.2 kB in 1 file," in text


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_the_token_is_never_shown(capfd, monkeypatch, arguments):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(constants, "ENDPOINT", f"https://me:{SECRET}@hub.example/x")
    status, text, words = told(capfd, *arguments)
    assert status == 0 and "HF_TOKEN" in text and "https://hub.example/x" in text
    assert SECRET not in text + words and SECRET[:8] not in text + words


def test_what_is_broken_is_one_line_and_the_rest_is_shown(capfd, monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", "cuda")
    status, text, words = told(capfd)
    assert status == 1 and "versions" in text and "Hub" in text and "cache" in text
    assert words.startswith("error: the kernels cannot be chosen: UnknownKernelsError: LINEARIZE_KERNELS=cuda")
    assert words.count("\n") == 1


def test_missing_and_old_packages_are_errors(monkeypatch):
    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return "4.0" if name == "transformers" else metadata.version(name)

    monkeypatch.setattr(doctor, "version", version)
    _, problems = doctor.installed()
    whats = [problem.what for problem in problems]
    assert "peft is not installed" in whats
    assert any(what.startswith("linearize ") and "requires transformers" in what and ">=5.17" in what for what in whats)
    assert all(problem.severity == "error" for problem in problems)


@pytest.mark.parametrize("pair", doctor.KNOWN_BAD, ids=lambda pair: " ".join(pair.packages))
def test_known_bad_pairs_are_found_where_they_are(pair):
    def some_version(wanted: str) -> str:
        return next(v for v in ("3.4.0", "3.6.0", "2.4.1", "1.0") if SpecifierSet(wanted).contains(v))

    bad = {name: some_version(wanted) for name, wanted in pair.packages.items()}
    machine = [pair.capability] if pair.capability else []
    (found,) = doctor.bad_pairs(bad, machine, [pair])
    assert pair.what in found.what and found.remedy == pair.remedy and found.severity == "warning"
    for name, wanted in pair.packages.items():
        assert not doctor.bad_pairs({k: v for k, v in bad.items() if k != name}, machine, [pair])
        if wanted:
            assert not doctor.bad_pairs({**bad, name: "3.9.0" if name == "triton" else "2.0"}, machine, [pair])
    if pair.without:
        assert not doctor.bad_pairs({**bad, pair.without: "1.0"}, machine, [pair])
    if pair.capability:
        assert not doctor.bad_pairs(bad, [(8, 0)], [pair])
