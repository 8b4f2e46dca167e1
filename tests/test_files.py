"""Small files: read with an error that names them, written whole or not at all."""

from __future__ import annotations

import os

import pytest

from hf_vq.files import read_json, write_text


def test_there_and_back(tmp_path):
    write_text(tmp_path / "x.json", '{"a": "ü"}')
    write_text(tmp_path / "x.json", '{"a": "ö"}')
    assert read_json(tmp_path / "x.json") == {"a": "ö"}
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[1]", b"3"])
def test_what_is_no_object_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json .*; repair or delete it"):
        read_json(tmp_path / "x.json")


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_failing_write_changes_nothing(tmp_path, monkeypatch, step):
    (tmp_path / "x").write_text("before")

    def fail(*args):
        raise OSError("No space left on device")

    if step == "rename":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((OSError, UnicodeEncodeError)):
        write_text(tmp_path / "x", "after" + "\ud800" * (step == "write"))
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "before"
