"""One line for an error, the right exit code, and refusals before any work is done."""

from __future__ import annotations

import os
import signal
import time

import pytest
import typer
from typer.testing import CliRunner

from hf_vq.cli.common import (
    check_dtype,
    check_model,
    check_output_folder,
    check_shard_size,
    load_tokenizer,
    one_line_errors,
    packed_folder,
)

runner = CliRunner()


def app_raising(error: BaseException) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @one_line_errors
    def command() -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("bits=9 must be\n  a number"), 1, "error: bits=9 must be a number\n"),
        (OSError("no space left"), 1, "error: no space left\n"),
        (ValueError(""), 1, "error: ValueError\n"),
        (KeyError("weight"), 1, "KeyError: 'weight'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line(error, code, text, monkeypatch):
    monkeypatch.delenv("HF_VQ_DEBUG", raising=False)
    result = runner.invoke(app_raising(error), [])
    assert result.exit_code == code
    assert text in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


def test_long_and_bracketed_messages_arrive_whole(monkeypatch):
    monkeypatch.delenv("HF_VQ_DEBUG", raising=False)
    message = "model.layers[0] [bold] " + "x" * 300 + " end"
    assert message in runner.invoke(app_raising(ValueError(message)), []).stderr


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("HF_VQ_DEBUG", "1")
    result = runner.invoke(app_raising(ValueError("x")), [])
    assert isinstance(result.exception, ValueError)


def test_sigterm_cleans_up(monkeypatch):
    monkeypatch.delenv("HF_VQ_DEBUG", raising=False)
    cleaned = []

    @one_line_errors
    def command():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            cleaned.append(True)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or a failure would end the tests
    try:
        with pytest.raises(SystemExit) as ended:
            command()
        assert ended.value.code == 143 and cleaned
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, "as it was before"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_usage_errors_keep_their_code(monkeypatch):
    monkeypatch.delenv("HF_VQ_DEBUG", raising=False)
    assert runner.invoke(app_raising(typer.BadParameter("no")), []).exit_code == 2


def test_output_folder(tmp_path):
    model = tmp_path / "models" / "m"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    for out in (model, model.parent, tmp_path, model / ".." / "m"):
        with pytest.raises(typer.BadParameter, match="is or contains MODEL"):
            check_output_folder(out, str(model))
    link = tmp_path / "link"
    link.symlink_to(model)
    with pytest.raises(typer.BadParameter, match="is or contains MODEL"):
        check_output_folder(link, str(model))
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(typer.BadParameter, match="is a file"):
        check_output_folder(file, str(model))
    other = tmp_path / "photos"
    other.mkdir()
    check_output_folder(other, str(model))
    (other / "cat.jpg").write_text("x")
    with pytest.raises(typer.BadParameter, match="holds no model"):
        check_output_folder(other, str(model))
    (other / "config.json").write_text("{}")
    check_output_folder(other, "org/name-on-the-hub")
    check_output_folder(tmp_path / "new" / "folder", str(model))


def test_output_folders_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(typer.BadParameter, match="file is no folder that can be written to"):
        check_output_folder(tmp_path / "file" / "out", "org/name")
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr("os.access", lambda place, mode: place != locked)
    for out in (locked, locked / "new" / "out"):
        with pytest.raises(typer.BadParameter, match="is no folder that can be written to"):
            check_output_folder(out, "org/name")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c"])
def test_paths_are_not_taken_for_hub_ids(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="no folder"):
        check_model(name)


def test_models(tmp_path, docs_llama):
    with pytest.raises(OSError, match="holds no model"):
        check_model(str(tmp_path))
    check_model(str(docs_llama))
    assert packed_folder(docs_llama) == docs_llama
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(typer.BadParameter):
            packed_folder(folder)


def test_models_that_are_not_folders_come_from_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "transformers.utils.cached_file", lambda *place, **where: asked.append((place, where))
    )
    check_model("org/name", "v2")
    assert asked == [(("org/name", "config.json"), {"revision": "v2"})]


def test_a_model_that_is_nowhere():
    with pytest.raises(OSError, match="there is no folder nowhere here, and no model of that name"):
        check_model("nowhere")


@pytest.mark.parametrize("name", ["float17", "int8", "", "Tensor"])
def test_no_dtypes(name):
    with pytest.raises(typer.BadParameter, match="neither auto nor a float"):
        check_dtype(name)


def test_dtypes():
    for name in ("auto", "bfloat16", "float32"):
        check_dtype(name)


@pytest.mark.parametrize("text", ["banana", "5", "GB", "5 GB", "-5GB", "5GiB"])
def test_no_shard_sizes(text):
    with pytest.raises(typer.BadParameter, match="no size such as 5GB"):
        check_shard_size(text)


@pytest.mark.parametrize("text", ["5GB", "1.5mb", "800KB"])
def test_shard_sizes(text):
    check_shard_size(text)
    from huggingface_hub.serialization._base import parse_size_to_int

    assert parse_size_to_int(text) > 0, "who writes the files does not take it"


def test_tokenizers_may_be_missing(tmp_path, docs_llama):
    assert load_tokenizer(str(tmp_path)) is None
    assert load_tokenizer(str(docs_llama))("word")["input_ids"]
