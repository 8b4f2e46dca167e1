"""Saving is all or nothing, and leaves what is not the model's alone."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_vq.quantizer import REPORT_NAME
from tests.models import packed, tiny, tokens

pytestmark = pytest.mark.smoke


def contents(folder):
    """Relative path -> bytes (or link target) of everything in a folder, hidden files too."""
    found = {}
    for root, folders, names in os.walk(folder):
        for name in [*names, *(f for f in folders if os.path.islink(os.path.join(root, f)))]:
            path = Path(root, name)
            found[os.path.relpath(path, folder)] = (
                os.readlink(path) if path.is_symlink() else path.read_bytes()
            )
    return found


def load(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder)


def logits(model):
    with torch.no_grad():
        return model(tokens(2, 16)).logits


@pytest.fixture(scope="module")
def old():
    return packed("llama", seed=1)


@pytest.fixture(scope="module")
def new():
    return packed("llama-tied", seed=2)


@pytest.fixture
def target(old, tmp_path):
    """A folder that holds the old model and files of the user's."""
    folder = tmp_path / "parent" / "model"
    old.save_pretrained(folder, max_shard_size="50KB")
    (folder / "README.md").write_text("mine")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("mine too")
    return folder


WEIGHTS = "transformers.modeling_utils.safe_save_file"


class Fails:
    """A writer that writes half of a file and then fails, at its n-th call."""

    def __init__(self, error, at):
        from safetensors.torch import save_file

        self.error, self.left, self.save = error, at, save_file

    def __call__(self, tensors, path, metadata=None):
        self.left -= 1
        self.save(tensors, path, metadata)
        if self.left <= 0:
            os.truncate(path, os.path.getsize(path) // 2)
            raise self.error


ERRORS = [OSError(28, "No space left on device"), KeyboardInterrupt()]


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("error", ERRORS, ids=["disk", "ctrl-c"])
def test_failing_write_changes_nothing(error, at, new, target, monkeypatch):
    before = contents(target.parent)
    monkeypatch.setattr(WEIGHTS, Fails(error, at))
    with pytest.raises(type(error)):
        new.save_pretrained(target, max_shard_size="50KB")
    assert contents(target.parent) == before


@pytest.mark.parametrize("error", ERRORS, ids=["disk", "ctrl-c"])
def test_failing_write_leaves_no_new_folder(error, new, tmp_path, monkeypatch):
    monkeypatch.setattr(WEIGHTS, Fails(error, 1))
    with pytest.raises(type(error)):
        new.save_pretrained(tmp_path / "deep" / "er" / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", ERRORS, ids=["disk", "ctrl-c"])
@pytest.mark.parametrize("step", range(14))
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_moves_are_undone(error, step, when, new, target, monkeypatch):
    before = contents(target.parent)
    replace, done = os.replace, []

    def interrupted(source, destination):
        if len(done) == step and when == "before":
            done.append(source)
            raise error
        replace(source, destination)
        done.append(source)
        if len(done) == step + 1 and when == "after":
            raise error

    monkeypatch.setattr(os, "replace", interrupted)
    try:
        new.save_pretrained(target)
    except type(error):
        assert contents(target.parent) == before
    else:
        assert len(done) <= step  # there are no more moves than that
        assert torch.equal(logits(load(target)), logits(new))


def test_failing_flush_changes_nothing(new, target, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    before = contents(target.parent)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        new.save_pretrained(target)
    assert contents(target.parent) == before


def test_new_model_replaces_the_old_and_keeps_the_rest(new, target):
    assert len(list(target.glob("*.safetensors"))) > 2
    new.save_pretrained(target)
    found = contents(target)
    assert sorted(found) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        REPORT_NAME,
        os.path.join("sub", "notes.txt"),
        "tokenizer.json",
    ]
    assert found["README.md"] == b"mine"
    assert os.listdir(target.parent) == ["model"]
    assert torch.equal(logits(load(target)), logits(new))


def test_shards_replace_a_single_file(old, new, tmp_path):
    new.save_pretrained(tmp_path)
    old.save_pretrained(tmp_path, max_shard_size="50KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(load(tmp_path)), logits(old))


def test_variants_stand_beside_each_other(old, new, tmp_path):
    old.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path, variant="small")
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "model.small.safetensors").exists()


def test_saving_into_the_folder_it_is_mapped_from(target):
    model = load(target)
    expected = logits(model)
    model.save_pretrained(target)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(load(target)), expected)


def test_links_are_followed(new, target, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(target, target_is_directory=True)
    new.save_pretrained(link)
    assert link.is_symlink()
    assert torch.equal(logits(load(target)), logits(new))


def test_relative_and_slashed_paths(new, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new.save_pretrained("here/")
    new.save_pretrained(".")
    assert (tmp_path / "here" / "model.safetensors").exists()
    assert (tmp_path / "model.safetensors").exists()
    assert not [n for n in os.listdir(tmp_path) if n.startswith(".")]


def test_parent_that_cannot_be_written(new, target, monkeypatch):
    """Then the temporary folder is inside of the target."""
    access = os.access
    parent = os.fspath(target.parent)
    monkeypatch.setattr(os, "access", lambda p, m: os.fspath(p) != parent and access(p, m))
    seen = []
    rmtree = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda p, **k: (seen.append(os.path.dirname(p)), rmtree(p, **k))[1]
    )
    new.save_pretrained(target)
    assert seen == [os.fspath(target)]
    assert torch.equal(logits(load(target)), logits(new))
    assert not [n for n in os.listdir(target) if n.startswith(".")]


def test_report_is_written_and_survives_a_reload(new, tmp_path):
    new.save_pretrained(tmp_path / "a")
    report = json.loads((tmp_path / "a" / REPORT_NAME).read_text())
    assert report == new.hf_quantizer.report
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / REPORT_NAME).read_text()) == report
    (tmp_path / "a" / REPORT_NAME).write_text("{ damaged")
    load(tmp_path / "a").save_pretrained(tmp_path / "c")
    assert not (tmp_path / "c" / REPORT_NAME).exists()


def test_same_bytes_every_time(new, tmp_path):
    for name in "ab":
        new.save_pretrained(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_file_in_the_way(new, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    new.save_pretrained(path)  # Transformers logs an error and returns
    assert path.read_text() == "mine"


def test_other_models_are_saved_as_before(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("not ours")

    monkeypatch.setattr("hf_vq.saving.save_atomically", refuse)
    tiny().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_the_callers_state_dict_is_written(new, tmp_path):
    """Transformers would replace it by the model's own."""
    state = {k: v.clone() for k, v in new.state_dict().items()}
    state["model.norm.weight"].fill_(3.0)
    new.save_pretrained(tmp_path, state_dict=state)
    assert (load(tmp_path).model.norm.weight == 3.0).all()
    assert new.hf_quantizer.state_dict is None


def test_positional_arguments(new, target, monkeypatch):
    before = contents(target.parent)
    monkeypatch.setattr(WEIGHTS, Fails(OSError(28, "No space left on device"), 1))
    with pytest.raises(OSError, match="No space"):
        new.save_pretrained(target, True, None, False, "50KB")
    assert contents(target.parent) == before


def test_other_processes_write_nothing(new, tmp_path):
    new.save_pretrained(tmp_path / "model", is_main_process=False)
    assert not list((tmp_path / "model").glob("*.safetensors"))
