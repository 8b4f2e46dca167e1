"""The kernels compile for GPUs of NVIDIA and AMD; the interpreter takes what compilers refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("triton_compile.py")


@pytest.mark.parametrize("target", [("cuda", "90"), ("hip", "gfx942")], ids=["sm_90", "gfx942"])
def test_kernels_compile(target: tuple[str, str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = str(SCRIPT.parents[1])  # the helpers of tests
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *target], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    names = [report["name"] for report in reports]
    for method in ("gptvq", "vptq", "cvxq"):
        assert f"triton_{method}._decode" in names
    assert names.count("triton_product._product") == 3
    assert names.count("triton_product._transposed_product") == 4  # one for a norm's gradient
    assert names.count("triton_product._dequantize") == 3
    assert names.count("triton_gradients._sum_gradients") == 3
    assert names.count("triton_embedding._embedding") == 3
    wide = {report["format"]: report["wide"] for report in reports if report["format"]}
    shifted = wide.pop("shifted")
    if target[0] == "cuda":
        assert shifted == 0, "a wide load of an address that is no multiple of 16 bytes"
        # the words of 4 rows; of VPTQ's one block of rows, and a vector of 16 bytes for each code
        assert wide == {
            "gptvq 2-D k16": 4,
            "gptvq 4-D k256": 4,
            "vptq v8 k4096": 3 + 32,
            "vptq v8 k65536": 1 + 8,
        }
    else:
        assert len(wide) == 4 and min(wide.values()) > 0
    for report in reports:
        assert report["binary"] > 0
        assert report["shared"] <= 64 * 1024, "more than an AMD GPU has"
        assert report["local"] == 0, "values in local memory"
        if report["name"].endswith("._decode"):
            # Nothing moves between threads before the end: only the final sums are exchanged, by
            # shuffles that do not multiply with the codes of a step, and little shared memory.
            # (Pieces of a wide load change their name for the compiler, but not their thread.)
            assert report["exchanged"] <= 72
            assert target[0] == "hip" or report["shared"] <= 256
