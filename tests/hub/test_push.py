"""Pushing over HTTP to a Hub on this machine, and loading from it again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, constants

from hf_vq.hub import push
from hf_vq.hub.card import render_card
from hf_vq.hub.errors import PushError
from hf_vq.hub.push import contents, push_folder
from tests.hub.test_card import EVALUATION, RECORD, REPORT, saved_config
from tests.hub_server import HubServer, Refused, Repo, metadata_problem
from tests.models import load, logits, packed, tiny, tokens

pytestmark = pytest.mark.smoke

LOAD = """
import sys
import torch
import hf_vq
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert tokenizer("a name")["input_ids"]
saved = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(model(saved["tokens"]).logits, saved["logits"])
print("the same logits")
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of one's own, which huggingface_hub talks to as "me"."""
    with HubServer() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # LFS alone
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        # Transformers keeps a client, which has the address that it was made with
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory, docs_llama):
    """Folder of a packed model with a tokenizer and what else one may keep there."""
    folder = tmp_path_factory.mktemp("push") / "model"
    packed("llama").save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(docs_llama / name, folder)
    (folder / "notes.txt").write_text("private")
    (folder / ".hidden").write_text("private")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def card(hub: HubServer, repo: str = "me/model", revision: str = "main") -> str:
    return hub.repos[repo].revisions[revision]["README.md"].decode()


def said() -> tuple[list[str], dict]:
    lines: list[str] = []
    return lines, {"say": lines.append}


def test_pushed_and_loaded_in_a_new_process(hub, folder, tmp_path):
    model = load(folder)
    model.push_to_hub("model")
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= set(
        hub.repos["me/model"].files
    )
    text = card(hub)
    assert metadata_problem(text) is None and 'from_pretrained("me/model"' in text
    assert any(path.startswith("/objects/") for method, path in hub.requests if method == "PUT")
    torch.save({"tokens": tokens(2, 16), "logits": model(tokens(2, 16)).logits}, tmp_path / "x.pt")
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", LOAD, "me/model", str(tmp_path / "x.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "the same logits" in done.stdout, done.stderr[-2000:]


def test_saving_can_push(hub, folder, tmp_path):
    target = tmp_path / "saved-here"
    load(folder).save_pretrained(target, push_to_hub=True, commit_message="hello", private=True)
    repo = hub.repos["me/saved-here"]
    assert repo.private and repo.files["config.json"] == (target / "config.json").read_bytes()
    assert 'from_pretrained("me/saved-here"' in card(hub, "me/saved-here")
    assert "FOLDER_OR_REPOSITORY" in (target / "README.md").read_text(encoding="utf-8")


def test_other_models_are_pushed_as_before(hub):
    tiny().push_to_hub("dense")
    assert "hf_vq" not in card(hub, "me/dense")


def test_a_second_push_keeps_what_people_wrote(hub, folder):
    push_folder(folder, "me/model", tags=["mine"])
    repo = hub.repos["me/model"]
    edited = card(hub).replace("library_name:", "license: mit\nlibrary_name:", 1)
    edited = edited.replace("---\n\n<!--", "---\n\nWritten on the web.\n\n<!--", 1)
    repo.files["README.md"] = edited.encode()
    from hf_vq.hub.record import add_to_record

    add_to_record(folder, EVALUATION)
    push_folder(folder, "me/model", tags=["second"])
    text = card(hub)
    data = ModelCard(text).data
    assert "Written on the web." in text and "24.123" in text
    assert data.license == "mit" and {"mine", "second", "hf-vq"} <= set(data.tags)
    assert data.eval_results[0].metric_value == EVALUATION["perplexity"]
    push_folder(folder, "me/model")
    assert len(ModelCard(card(hub)).data.eval_results) == len(data.eval_results)


def test_a_foreign_card_keeps_its_text(hub, folder):
    own = "---\ntags: [mine]\nbase_model: wrong/base\n---\n# My words\n"
    hub.repos["me/model"] = Repo("me", revisions={"main": {"README.md": own.encode()}})
    lines, options = said()
    push_folder(folder, "me/model", **options)
    data = ModelCard(card(hub)).data
    assert "# My words" in card(hub) and "## Load it" not in card(hub)
    assert {"mine", "hf-vq"} <= set(data.tags) and data.library_name == "transformers"
    assert any("edited by hand" in line for line in lines)


def test_a_pull_request_to_a_repository_of_somebody_else(hub, folder):
    hub.repos["somebody/model"] = Repo("somebody")
    with pytest.raises(PushError, match=r"may not write to somebody/model.*create_pr"):
        push_folder(folder, "somebody/model")
    info = push_folder(folder, "somebody/model", create_pr=True)
    assert info.pr_url.endswith("/discussions/1")
    repo = hub.repos["somebody/model"]
    assert not repo.files and "model.safetensors" in repo.revisions["refs/pr/1"]


def test_a_branch(hub, folder):
    push_folder(folder, "me/model")
    push_folder(folder, "me/model", revision="v2")
    assert "model.safetensors" in hub.repos["me/model"].revisions["v2"]
    push_folder(folder, "me/model", revision="v2")


@pytest.mark.parametrize("where", ["/objects/", "/commit/"])
def test_the_next_push_completes_an_interrupted_one(hub, folder, where, monkeypatch):
    model = load(folder)
    model.save_pretrained(folder, max_shard_size="50KB")
    shards = len(list(folder.glob("*.safetensors")))
    assert shards > 2
    arrived: list[str] = []

    def broken(method: str, path: str) -> str | None:
        if where in path and "batch" not in path:
            arrived.append(path)  # uploads run beside each other
            if where == "/commit/" or arrived[0] != path:
                deadline = time.monotonic() + 5
                while not hub.objects and time.monotonic() < deadline:
                    time.sleep(0.01)
                raise Refused(400, "", "interrupted")
        return None

    hub.fail = broken
    with pytest.raises(PushError, match="interrupted"):
        push_folder(folder, "me/model")
    assert not hub.repos["me/model"].files, "nobody sees half a model"
    kept = len(hub.objects)
    assert kept >= 1
    hub.fail = lambda method, path: None
    hub.requests.clear()
    push_folder(folder, "me/model")
    sent = [path for method, path in hub.requests if method == "PUT"]
    assert len(sent) == len(hub.objects) - kept
    assert "config.json" in hub.repos["me/model"].files


def test_a_connection_lost_in_the_middle_of_an_upload(hub, tmp_path, monkeypatch):
    """Some files have arrived, one has in part: nothing is published, and the next push goes on."""
    folder = tmp_path / "model"
    packed("llama").save_pretrained(folder, max_shard_size="40KB")
    pauses: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", pauses.append)
    first: list[str] = []

    def cut(path: str) -> int | None:
        first.append(path)
        return None if path == first[0] else 1000

    hub.cut = cut
    with pytest.raises(PushError, match=r"broke off.*nothing was published, push again") as caught:
        push_folder(folder, "me/model")
    assert "\n" not in str(caught.value)
    assert pauses, "the client has tried several times by itself"
    assert not hub.repos["me/model"].files and set(hub.objects) == {Path(first[0]).name}
    hub.cut = lambda path: None
    hub.requests.clear()
    push_folder(folder, "me/model")
    sent = [path for method, path in hub.requests if method == "PUT"]
    assert first[0] not in sent and len(sent) == len(hub.objects) - 1 >= 2
    for file in folder.glob("*.safetensors"):
        assert hub.repos["me/model"].files[file.name] == file.read_bytes()


def test_a_hub_without_xet_is_one_clear_line(hub, folder, monkeypatch):
    pytest.importorskip("hf_xet", reason="hf_xet is what cannot talk to such a server")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(PushError, match="HF_HUB_DISABLE_XET=1") as caught:
        push_folder(folder, "me/model")
    assert "\n" not in str(caught.value) and not hub.repos["me/model"].files
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    push_folder(folder, "me/model")
    assert "model.safetensors" in hub.repos["me/model"].files


def test_existing_public_repositories_stay_public_and_that_is_said(hub, folder):
    hub.repos["me/model"] = Repo("me")
    lines, options = said()
    push_folder(folder, "me/model", private=True, **options)
    assert any("exists and is public" in line for line in lines)


def test_what_would_go(folder):
    found = contents(folder)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(found.files)
    assert found.left_out == {"notes.txt": "not part of a model"}
    assert found.total == sum((folder / name).stat().st_size for name in found.files)
    assert "notes.txt" in contents(folder, ["notes.txt"]).files


def test_a_record_of_other_weights_does_not_go(hub, folder):
    record = {"weights_sha256": "0" * 64, "evaluations": [EVALUATION]}
    (folder / "evaluation.json").write_text(json.dumps(record))
    assert "other weights" in contents(folder).left_out["evaluation.json"]
    push_folder(folder, "me/model")
    assert "24.123" not in card(hub) and "evaluation.json" not in hub.repos["me/model"].files


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "README.md"])
def test_local_paths_do_not_leak(hub, folder, name, monkeypatch):
    monkeypatch.setenv("HOME", "/srv/people/somebody")
    file = folder / name
    secret = "/srv/people/somebody/secret/model"
    if name.endswith(".json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "from": secret}))
    else:
        file.write_text(file.read_text(encoding="utf-8") + f"\nSee {secret}.\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} names a place on this machine"):
        push_folder(folder, "me/model")
    assert "me/model" not in hub.repos or not hub.repos["me/model"].files


def test_no_place_of_this_machine_is_in_what_is_pushed(hub, folder):
    load(folder).push_to_hub("me/model")
    for name, content in hub.repos["me/model"].files.items():
        assert str(folder).encode() not in content, name
        assert str(Path.cwd()).encode() not in content, name


def without_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def without_token(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")


def failing(hub, monkeypatch):
    def fail(method: str, path: str) -> None:
        raise Refused(418, "", "a teapot")

    hub.fail = fail


def nothing(hub, monkeypatch):
    pass


@pytest.mark.parametrize(
    ("change", "repo", "message"),
    [
        (without_network, "me/model", "could not be reached.*push again"),
        (offline, "me/model", "HF_HUB_OFFLINE is set"),
        (without_token, "me/model", "hf auth login"),
        (nothing, "me/-bad..name", "is no name that the Hub accepts"),
        (nothing, "a/b/c", "is no name that the Hub accepts"),
        (nothing, "somebody/new", "may not write to somebody/new"),
        (failing, "me/model", "418: .*teapot.*push again"),
    ],
)
def test_refusals_are_one_clear_line(hub, folder, change, repo, message, monkeypatch):
    change(hub, monkeypatch)
    with pytest.raises(PushError, match=message) as caught:
        push_folder(folder, repo)
    assert "\n" not in str(caught.value)


def test_broken_metadata_at_the_hub_is_refused_before_anything_is_sent(hub, folder):
    broken = b"---\ntags: [a\nlicense: mit\n---\n# Words\n"
    hub.repos["me/model"] = Repo("me", revisions={"main": {"README.md": broken}})
    with pytest.raises(ValueError, match=r"README.md of me/model is broken \(.*line 3.*repair"):
        push_folder(folder, "me/model")
    assert hub.repos["me/model"].files == {"README.md": broken}


def test_folders_that_are_no_packed_models(hub, tmp_path, dense):
    with pytest.raises(OSError, match=r"no config\.json"):
        push_folder(tmp_path, "me/model")
    with pytest.raises(ValueError, match="no model packed by hf_vq"):
        push_folder(dense("llama"), "me/model")


def test_the_license_is_the_base_model_s(hub, folder):
    base = b"---\nlicense: llama3.1\nlanguage: [en, de]\n---\n# Base\n"
    hub.repos["org/base"] = Repo("org", revisions={"main": {"README.md": base}})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["base_model"] = "org/base"
    (folder / "config.json").write_text(json.dumps(config))
    push_folder(folder, "me/model")
    data = ModelCard(card(hub)).data
    assert data.license == "llama3.1" and data.language == ["en", "de"]
    assert data.base_model == "org/base" and data.base_model_relation == "quantized"


@pytest.mark.parametrize(("gated", "reason"), [(True, "is gated"), (False, "could not be read")])
def test_a_base_card_that_cannot_be_read_leaves_the_license_open(hub, folder, gated, reason):
    if gated:
        hub.repos["org/base"] = Repo("org", gated=True)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["base_model"] = "org/base"
    (folder / "config.json").write_text(json.dumps(config))
    lines, options = said()
    push_folder(folder, "me/model", **options)
    assert ModelCard(card(hub)).data.license is None
    assert any("names no license" in line and reason in line for line in lines)


@pytest.mark.parametrize("record", [None, RECORD])
def test_the_hub_and_its_client_accept_every_card(hub, record):
    text = render_card(saved_config(base_model="org/base"), REPORT, record)
    hub.repos["me/model"] = Repo("me")
    HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="me/model")
    assert ("POST", "/api/validate-yaml") in hub.requests and card(hub) == text
    assert metadata_problem(text) is None
    broken = text.replace("relation: quantized", "relation: shrunk", 1).encode()
    with pytest.raises(ValueError, match="base_model_relation"):
        HfApi().upload_file(path_or_fileobj=broken, path_in_repo="README.md", repo_id="me/model")


def test_the_model_in_memory_needs_no_folder(hub):
    model = packed("llama")
    model.push_to_hub("me/from-memory", max_shard_size="50KB")
    again = load("me/from-memory")
    assert torch.equal(logits(again), logits(model))
    assert push.CARD_NAME in hub.repos["me/from-memory"].files
