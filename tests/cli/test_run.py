"""`hf-vq run`: like python, but with hf_vq registered first and the arguments left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
assert __name__ == "__main__"
assert "hf_vq" in sys.modules
import neighbour
print(sys.argv[1:], neighbour.VALUE)
"""


def hf_vq(*arguments, cwd=None):
    command = [sys.executable, "-c", "from hf_vq.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "neighbour.py").write_text("VALUE = 42")
    return tmp_path


def test_scripts_and_modules_get_their_arguments(folder):
    for target, cwd in ((folder / "program.py", None), ("program", folder)):
        result = hf_vq("run", target, "--help", "-x", "--bits", "3", "word", cwd=cwd)
        assert result.returncode == 0, result.stderr
        assert result.stdout == "['--help', '-x', '--bits', '3', 'word'] 42\n"


def test_console_scripts_are_found_by_name(folder):
    result = hf_vq("run", "hf-vq", "--version")
    assert result.returncode == 0, result.stderr
    from hf_vq import __version__

    assert result.stdout.strip() == __version__


def test_the_exit_code_and_the_traceback_are_the_program_s(folder):
    (folder / "program.py").write_text("import sys\nsys.exit(7)")
    assert hf_vq("run", folder / "program.py").returncode == 7
    (folder / "program.py").write_text("raise RuntimeError('mine')")
    result = hf_vq("run", folder / "program.py")
    assert result.returncode == 1 and "Traceback" in result.stderr and "mine" in result.stderr


def test_unknown_targets_are_a_usage_error(folder):
    result = hf_vq("run", "no_such_module", cwd=folder)
    assert result.returncode == 2 and "no_such_module" in result.stderr
    assert "Traceback" not in result.stderr
