"""`hf-vq push`: what it lists, what it sends, how it refuses."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from hf_vq.cli import app
from tests.hub.test_push import folder, hub, saved  # noqa: F401  - fixtures
from tests.hub_server import Repo

runner = CliRunner()


def push(*arguments):
    result = runner.invoke(app, ["push", *map(str, arguments)], env={"COLUMNS": "200"})
    assert "Traceback" not in result.output
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_a_dry_run_lists_and_sends_nothing(hub, folder):  # noqa: F811
    code, said = push(folder, "me/model", "--dry-run")
    assert code == 0 and not hub.requests
    size = (folder / "model.safetensors").stat().st_size
    assert f"model.safetensors {size:,}" in said and "nothing was sent" in said
    assert "left out: notes.txt" in said and ".hidden" not in said


def test_what_is_said_beside_the_table_stays_on_one_line(hub, folder):  # noqa: F811
    result = runner.invoke(app, ["push", str(folder), "me/model"], env={"COLUMNS": "20"})
    assert "left out: notes.txt, not part of a model\n" in result.output
    note = next(line for line in result.output.splitlines() if line.startswith("note: "))
    assert note.endswith("add `license:` to its metadata")


def test_a_push(hub, folder):  # noqa: F811
    code, said = push(
        *(folder, "me/model", "--private", "--tag", "small", "--include", "notes.txt"),
        *("--revision", "v1"),
    )
    assert code == 0 and "published: http" in said, said
    repo = hub.repos["me/model"]
    assert repo.private and {"notes.txt", "tokenizer.json"} <= repo.revisions["v1"].keys()
    assert "- small" in repo.revisions["v1"]["README.md"].decode()


def test_a_pull_request(hub, folder):  # noqa: F811
    hub.repos["somebody/model"] = Repo("somebody")
    code, said = push(folder, "somebody/model", "--create-pr")
    assert code == 0 and "/discussions/1" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "somebody/model"], "error: this token may not write to somebody/model"),
        (["{folder}", "a/b/c"], "is no name that the Hub accepts"),
        (["{folder}/nothing", "me/model"], "is no folder"),
    ],
)
def test_refusals(hub, folder, arguments, message):  # noqa: F811
    hub.repos["somebody/model"] = Repo("somebody")
    code, said = push(*(a.format(folder=folder) for a in arguments))
    assert code and message in said
