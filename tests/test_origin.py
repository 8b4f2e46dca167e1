"""Base models are named by Hub id and commit, never by a local path."""

from __future__ import annotations

import pytest

from hf_vq.origin import base_model_of

HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("org/name", [], ("org/name", None)),
        ("gpt2", [], ("gpt2", None)),
        (
            "org/name",
            [f"/data/hub/models--org--name-1.5/snapshots/{HASH}/model.safetensors"],
            ("org/name-1.5", HASH),
        ),
        (
            f"/data/hub/models--gpt2/snapshots/{HASH}",
            [f"/data/hub/models--gpt2/snapshots/{HASH}/model.safetensors"],
            ("gpt2", HASH),
        ),
        ("/data/model", ["/data/model/model.safetensors"], (None, None)),
        ("../model", [], (None, None)),
        ("./model", [], (None, None)),
        ("a/b/c", [], (None, None)),
        ("C:\\models\\mine", [], (None, None)),
        ("", [], (None, None)),
    ],
)
def test_names(name, files, expected):
    assert base_model_of(name, files) == expected


def test_folders_that_look_like_ids(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_model_of("org/name", ["org/name/model.safetensors"]) == (None, None)
