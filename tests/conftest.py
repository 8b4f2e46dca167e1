"""Shared by all tests: one thread per worker, no network, and where the models are."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports torch or huggingface_hub: workers of pytest-xdist share the cores, and no
# test may depend on what a download happens to return.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Kernels then run in Triton's interpreter; it has to be chosen before triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def docs_llama() -> Path:
    """Folder of the bundled, trained 4M-parameter Llama (bf16, tied embeddings)."""
    return ROOT / "examples" / "docs-llama-4m"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Token files that are not part of the repository; tests that need them are skipped."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the token files in ../shared/data, which are not in this checkout")
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """Function: kind -> folder of the saved dense model."""
    folder = tmp_path_factory.mktemp("dense")

    def get(kind):
        path = folder / kind
        if not path.exists():
            from tests.models import tiny  # late: most tests need no Transformers

            tiny(kind).save_pretrained(path)
        return path

    return get


@pytest.fixture(scope="session")
def quantized(dense, tmp_path_factory):
    """Function: kind -> (the model quantized on load, the folder it was saved in)."""
    folder = tmp_path_factory.mktemp("packed")
    done = {}

    def get(kind):
        if kind not in done:
            from tests.models import QUICK, GPTVQConfig, load, tokens

            config = GPTVQConfig(2.6, dataset=tokens(8), **QUICK)
            model = load(dense(kind), quantization_config=config)
            model.save_pretrained(folder / kind)
            done[kind] = model, folder / kind
        return done[kind]

    return get


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers whatever ran before: a rare cancellation is no finding."""
    torch.manual_seed(0)
