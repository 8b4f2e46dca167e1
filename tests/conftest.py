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
