"""hf-vq-autoload: registers in every order of imports, costs nothing otherwise, breaks nothing.

The distribution is not installed for this: a folder with its package and an entry point that looks
like an installed one is put on the path of a new process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

SOURCE = Path(__file__).resolve().parents[1] / "autoload"
REGISTERED = (
    "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table\n"
    "assert 'gptvq' in table and 'hf_vq' in sys.modules\n"
)
WRAPPED = (
    "import transformers\nassert transformers.PreTrainedModel.save_pretrained._hf_vq_wrapped\n"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(SOURCE / "hf_vq_autoload", folder / "hf_vq_autoload")
    info = folder / "hf_vq_autoload-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-vq-autoload\nVersion: 0.1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def python(code: str, installed: Path, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", "import sys\n" + code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        cwd=installed,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "order",
    [
        "import torch",
        "import transformers.quantizers",
        "import transformers.modeling_utils",
    ],
)
def test_registered_in_any_order_of_imports(installed, order):
    code = f"{order}\nimport transformers\ntransformers.AutoModelForCausalLM\n" + REGISTERED
    result = python(code + WRAPPED, installed)
    assert result.returncode == 0, result.stderr
    assert "hf-vq-autoload" not in result.stderr


def test_loading_a_model_is_enough(installed, docs_llama):
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(docs_llama)!r})\n"
        "assert 'hf_vq' in sys.modules\n"
        "assert not any(type(f).__module__ == 'hf_vq_autoload' for f in sys.meta_path)\n"
    )
    result = python(code, installed)
    assert result.returncode == 0, result.stderr


def test_torch_alone_does_not_import_hf_vq(installed):
    code = (
        "import torch\n"
        "assert 'hf_vq_autoload' in sys.modules\n"
        "assert 'hf_vq' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    result = python(code, installed)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("variable", ["HF_VQ_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_it_can_be_switched_off(installed, variable):
    code = "import torch, transformers.modeling_utils\nassert 'hf_vq' not in sys.modules\n"
    result = python(code, installed, **{variable: "0"})
    assert result.returncode == 0, result.stderr


def test_a_broken_hf_vq_is_a_warning(installed, tmp_path):
    (tmp_path / "hf_vq.py").write_text("raise RuntimeError('broken\\ninstall')")
    code = (
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch\nimport transformers.modeling_utils\nprint('alive')\n"
    )
    result = python(code, installed)
    assert result.returncode == 0 and result.stdout == "alive\n", result.stderr
    assert "could not register hf_vq (RuntimeError: broken install)" in result.stderr
