"""The list of licences: what passes, and what is told."""

from __future__ import annotations

import importlib.util
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest

SPEC = importlib.util.spec_from_file_location("licences", Path(__file__).resolve().parents[1] / ".ci" / "licences.py")
licences = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(licences)


@pytest.mark.parametrize(
    ("licence", "passes"),
    [
        ("MIT", True),
        ("BSD-3-Clause AND 0BSD AND Zlib", True),
        ("Apache Software License", True),
        ("Mozilla Public License 2.0 (MPL 2.0)", True),
        ("GPL-3.0-only", False),
        ("MIT OR AGPL-3.0", False),
        ("GNU Lesser General Public License v2 or later", False),
        ("Other/Proprietary License", False),
        ("", False),
    ],
)
def test_which_licences_pass(licence, passes):
    assert licences.permissive(licence) is passes


def package(**fields: str) -> SimpleNamespace:
    about = Message()
    for name, value in fields.items():
        about[name.replace("_", "-")] = value
    return SimpleNamespace(metadata=about)


def test_where_a_licence_is_said():
    assert licences.licence_of(package(License_Expression="ISC", License="x")) == "ISC"
    assert licences.licence_of(package(Classifier="License :: OSI Approved :: MIT License")) == "MIT License"
    assert licences.licence_of(package(License="Apache 2.0\n\nAll of it ...")) == "Apache 2.0"
    assert licences.licence_of(package(Name="x")) == ""


def test_what_linearize_needs_is_found_with_what_that_needs():
    found = licences.needed("linearize")
    assert {"torch", "transformers", "tokenizers", "numpy"} <= set(found) and "pytest" not in found


def test_one_that_is_not_known_is_told(monkeypatch, capsys):
    assert licences.main() == 0
    monkeypatch.setattr(licences, "permissive", lambda licence: "MPL" not in licence)
    assert licences.main() == 1
    words = capsys.readouterr()
    assert "chardet" in words.out and "certifi" in words.err and "chardet" not in words.err
