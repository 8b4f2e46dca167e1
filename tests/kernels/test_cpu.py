"""The compiled CPU backend against the default one in float32, which equals the references exactly
(test_ops.py and its kin): odd shapes, all formats and dtypes, with the instructions of this
processor and with portable code alone. And how it is compiled."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hf_vq_kernels
import pytest
import torch
from filelock import FileLock
from helpers_cpu import (
    CASES,
    GPTVQ,
    TOLERANCE,
    VPTQ,
    assert_close,
    needs_compiler,
    packed_weight,
)
from hf_vq_kernels import cpu_build, cpu_proof, cpu_vptq
from torch import Tensor

from hf_vq.layers.operators import OPERATORS

MORE_THAN_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def check(
    name: str,
    counts: tuple[int, ...] = (1, 2, 3, 17, 65),
    dtypes: Iterable[torch.dtype] = TOLERANCE,
) -> None:
    """Token counts and dtypes of one case, forced to the compiled backend."""
    spec = CASES[name]
    packed, weight = packed_weight(spec)
    operator, bias = OPERATORS[spec.method], torch.randn(spec.out_features)
    with hf_vq_kernels.use_backend("c"):
        for dtype in dtypes:
            assert torch.equal(operator.dequantize(packed, spec, dtype), weight.to(dtype)), dtype
            for tokens in counts:
                x = torch.randn(tokens, spec.in_features).to(dtype)
                right = (x.double() @ weight.double().T + bias).to(dtype)
                y = operator.linear(x, packed, spec, bias)
                assert_close(f"{tokens} tokens", y, right, TOLERANCE[dtype])


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name: str) -> None:
    check(name)


@needs_compiler
@pytest.mark.parametrize("name", [f"vptq-{name}" for name in VPTQ])
def test_codebooks_in_float16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What large codebooks are read as, with those of the cases."""
    monkeypatch.setattr(cpu_vptq, "HALF_FROM", 0)
    check(name, (1, 3))


def compiled(factory: pytest.TempPathFactory, name: str, *variant: str) -> ctypes.CDLL:
    """The sources compiled otherwise than for this processor, once for all test processes."""
    folder = factory.getbasetemp().parent / f"hf_vq-{name}"
    with pytest.MonkeyPatch.context() as patch, FileLock(f"{folder}.lock"):
        patch.setattr(cpu_build, "_VARIANTS", (variant,))
        return ctypes.CDLL(str(cpu_build.build(folder)))


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The same sources without the instructions of this processor, and without OpenMP."""
    return compiled(tmp_path_factory, "portable", "-pthread")


@pytest.fixture(scope="module")
def avx2(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The same sources for AVX2, on processors that have more."""
    return compiled(tmp_path_factory, "avx2", "-march=x86-64-v3", "-pthread")


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_portable_code(name: str, portable: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_build, "library", lambda: portable)
    check(name)


@needs_compiler
@pytest.mark.skipif(not MORE_THAN_AVX2, reason="the processor has no AVX-512, so AVX2 is native")
@pytest.mark.parametrize("name", CASES)
def test_avx2(name: str, avx2: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_build, "library", lambda: avx2)
    check(name, (1, 2, 5, 17))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The same sources with AMX tiles that are emulated in C."""
    header = str(Path(__file__).parent / "emulated_tiles.h")
    return compiled(tmp_path_factory, "tiles", "-march=native", "-include", header, "-pthread")


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_products_on_tiles(name: str, tiles: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_build, "library", lambda: tiles)
    products = ctypes.c_int.in_dll(tiles, "emulated_products")
    products.value = 0
    check(name, (65,), (torch.bfloat16,))
    assert products.value > 0


@needs_compiler
@pytest.mark.parametrize("planted", [float("nan"), float("inf"), 1e30, 1e-42, 0.0])
@pytest.mark.parametrize(
    "name", ["gptvq-4d-k256", "vptq-v8", "vptq-v12-residual", "vptq-v4-groups"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_activations(name: str, planted: float, dtype: torch.dtype) -> None:
    spec = CASES[name]
    packed, weight = packed_weight(spec)
    x = torch.randn(2, spec.in_features).to(dtype)
    x[0, 5] = planted
    if planted == 0:
        x.zero_()
    with hf_vq_kernels.use_backend("c"):
        y = OPERATORS[spec.method].linear(x, packed, spec, None)
    right = (x.double() @ weight.double().T).to(dtype)
    if planted != planted or planted == float("inf"):
        assert not y[0].isfinite().any()
    else:
        assert_close("y", y[0], right[0], TOLERANCE[dtype])
    assert_close("the other token", y[1], right[1], TOLERANCE[dtype])


@needs_compiler
def test_a_codebook_of_zeros_and_one_of_outliers() -> None:
    """Entries are integers of the largest entry of their group, where x has 16 bits."""
    spec = VPTQ["v4-groups"]
    packed, _ = packed_weight(spec)
    packed["centroids.weight"][0] = 0
    packed["centroids.weight"][1, 3] = 60.0
    with hf_vq_kernels.use_backend("torch"):
        weight = OPERATORS["vptq"].dequantize(packed, spec, torch.float32).double()
    x = torch.randn(1, spec.in_features).half()
    with hf_vq_kernels.use_backend("c"):
        y = OPERATORS["vptq"].linear(x, packed, spec, None)
    assert_close("y", y, (x.double() @ weight.T).half(), 1e-3)


@needs_compiler
def test_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_build, "_VARIANTS", (("-O0", "-pthread"),))
    first = cpu_build.build(tmp_path)
    written = first.stat().st_mtime_ns
    assert cpu_build.build(tmp_path) == first and first.stat().st_mtime_ns == written
    assert [p.name for p in tmp_path.iterdir()] == [first.name]  # nothing half-written is left
    monkeypatch.setattr(cpu_build, "_VARIANTS", (("-O0", "-pthread", "-g"),))
    assert cpu_build.build(tmp_path) != first  # other flags, another library


@needs_compiler
def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_proof.complaint() is None
    right = hf_vq_kernels.cvxq_linear

    def wrong(x: Tensor, *arguments: Any) -> Tensor:
        return right(x, *arguments) * (1 if len(x) < 40 else 1.1)

    monkeypatch.setattr(hf_vq_kernels, "cvxq_linear", wrong)
    assert "cvxq, 128 rows: 40 tokens in torch.float32" in str(cpu_proof.complaint())


@needs_compiler
@pytest.mark.parametrize(
    ("ends", "said"), [("kill -SEGV $$", "signal 11"), ("echo 40 tokens; exit 3", "40 tokens")]
)
def test_a_library_that_fails_its_proof_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, said: str
) -> None:
    proof = tmp_path / "python"
    proof.write_text(f"#!/bin/sh\n{ends}\n")
    proof.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(proof))
    monkeypatch.setattr(cpu_build, "_VARIANTS", (("-O0", "-pthread"), ("-O0", "-fopenmp")))
    with (
        pytest.warns(RuntimeWarning, match=f"compiled with -O0 computes wrongly: .*{said}") as seen,
        pytest.raises(cpu_build.CannotCompile, match=said),
    ):
        cpu_build.build(tmp_path / "cache")
    assert len(seen) == 1  # the same instructions are not tried twice
    assert not list((tmp_path / "cache").iterdir())


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(cpu_build.CannotCompile, match="no C compiler was found"):
        cpu_build.build()


def test_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such instruction')\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(cpu_build.CannotCompile, match="no such instruction"):
        cpu_build.build(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_without_a_compiler_others_compute(tmp_path: Path) -> None:
    program = """
import torch, hf_vq_kernels
from hf_vq_kernels import explain
words = torch.zeros(4, 1, dtype=torch.int32)
books = torch.ones(1, 1, 16, 2, dtype=torch.int8)
print(explain("gptvq_linear", torch.ones(1, 16), words, books, None, None, None, None, None,
              2, 16, 4, 16, 0, True))
"""
    environment = {"PATH": "", "HF_VQ_CACHE": str(tmp_path), "CC": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    instead = "numba" if importlib.util.find_spec("numba") else "torch"
    assert f"gptvq_linear(1x16 float32 on cpu): {instead}" in done.stdout
    assert "not c: no C compiler was found" in done.stdout


def test_gradients_through_the_compiled_backend() -> None:
    spec = GPTVQ["2d-k16-scales"]
    packed, weight = packed_weight(spec)
    x = torch.randn(3, spec.in_features, requires_grad=True)
    theirs = x.detach().clone().requires_grad_()
    OPERATORS["gptvq"].linear(x, packed, spec, None).square().sum().backward()
    (theirs @ weight.T).square().sum().backward()
    assert isinstance(x.grad, Tensor) and isinstance(theirs.grad, Tensor)
    assert_close("gradient of x", x.grad, theirs.grad, 1e-5)
