"""The distribution holds what the source tree does, and nothing that belongs to one machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

import hf_vq

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed():
    """setuptools is given the packages by name: a forgotten one is missing from wheels only."""
    found = set()
    for top, name in (("hf_vq", "hf_vq"), ("kernels", "hf_vq_kernels"), ("model_cards", "")):
        for file in (ROOT / top).rglob("__init__.py"):
            inner = ".".join(file.parent.relative_to(ROOT / top).parts)
            found.add(".".join(filter(None, [name or "hf_vq.model_cards", inner])))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_versions_agree():
    assert PROJECT["project"]["version"] == hf_vq.__version__ == metadata.version("hf-vq")
    assert f"## {hf_vq.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_extras():
    assert {"cpu", "peft", "eval", "dev", "autoload"} <= set(
        PROJECT["project"]["optional-dependencies"]
    )


def test_the_kernels_folder_is_not_taken_for_the_library_of_that_name():
    """Started in the checkout, Python finds our kernels/ where Transformers looks for `kernels`."""
    code = (
        "import importlib.metadata as m\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "installed = any(d.name == 'kernels' for d in m.distributions())\n"
        "import hf_vq, transformers.modeling_utils\n"
        "assert installed or not is_kernels_available()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def sources() -> list[Path]:
    """The repository's text files; environments, builds and caches are not looked into."""
    found: list[Path] = []
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [n for n in inner if not n.startswith(".") or n == ".ci"]
        inner[:] = [n for n in inner if n not in ("build", "dist", "demo-output", "venv")]
        inner[:] = [n for n in inner if not n.endswith(".egg-info")]
        wanted = (".md", ".py", ".toml", ".yaml", ".json", ".j2")
        for name in names:
            if name.endswith(wanted) or name == "Makefile" or Path(folder).name == ".ci":
                found.append(Path(folder, name))
    return [path for path in found if path.name != "tokenizer.json"]


def test_no_paths_of_one_machine():
    """The repository is public: what it says must hold on any machine."""
    machine = re.compile(r"(?<![\w.])/(?:home|root|Users|work|opt)/\w")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in sources()
        for match in machine.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_nothing_is_left_to_do():
    marks = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")
    found = [
        str(path.relative_to(ROOT))
        for path in sources()
        if path.suffix == ".py" and marks.search(path.read_text(encoding="utf-8"))
    ]
    assert not found
