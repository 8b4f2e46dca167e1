"""`hf-vq run`: like python, but with hf_vq registered first and the arguments left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hf_vq import __version__
from hf_vq.cli import app

PROGRAM = """
import sys
assert __name__ == "__main__"
assert "hf_vq" in sys.modules
import neighbour
print(sys.argv[1:], neighbour.VALUE)
"""
ARGUMENTS = ["--help", "-x", "--bits", "3", "word"]
PRINTED = "['--help', '-x', '--bits', '3', 'word'] 42\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two programs' folder; what they import and change in this process is undone."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "neighbour.py").write_text("VALUE = 42")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    yield tmp_path
    for name in ("program", "neighbour"):
        sys.modules.pop(name, None)


def hf_vq_run(*arguments):
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def test_a_process_of_its_own(folder):
    """Output, traceback and exit code are those of the program, as if python had run it."""
    (folder / "program.py").write_text(PROGRAM + "raise RuntimeError('mine')")
    command = "from hf_vq.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", command, "run", str(folder / "program.py"), *ARGUMENTS],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout == PRINTED, result.stderr
    assert result.returncode == 1 and "Traceback" in result.stderr and "mine" in result.stderr


def test_scripts_get_their_arguments(folder):
    result = hf_vq_run(folder / "program.py", *ARGUMENTS)
    assert (result.exit_code, result.output) == (0, PRINTED)


def test_modules_get_their_arguments(folder, monkeypatch):
    monkeypatch.chdir(folder)
    result = hf_vq_run("program", *ARGUMENTS)
    assert (result.exit_code, result.output) == (0, PRINTED)


def test_console_scripts_are_found_by_name(folder):
    result = hf_vq_run("hf-vq", "--version")
    assert (result.exit_code, result.output.strip()) == (0, __version__)


def test_the_exit_code_is_the_programs(folder):
    (folder / "program.py").write_text("import sys\nsys.exit(7)")
    assert hf_vq_run(folder / "program.py").exit_code == 7


def test_exceptions_are_the_programs(folder):
    (folder / "program.py").write_text("raise RuntimeError('mine')")
    result = hf_vq_run(folder / "program.py")
    assert type(result.exception) is RuntimeError and str(result.exception) == "mine"


def test_unknown_targets_are_a_usage_error(folder, monkeypatch):
    monkeypatch.chdir(folder)
    result = hf_vq_run("no_such_module")
    assert result.exit_code == 2 and "no_such_module" in result.output
