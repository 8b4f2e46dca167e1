"""The C sources on Arm: compiled by a cross compiler, run in an emulator, compared with the decoded
weight. Debian has both: `apt install gcc-aarch64-linux-gnu qemu-user`."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers_cpu import CASES, TOLERANCE, assert_close, needs_compiler, packed_weight
from hf_vq_kernels import cpu_build, cpu_cvxq, cpu_gptvq, cpu_vptq
from hf_vq_kernels.cpu_common import DTYPES
from hf_vq_kernels.cvxq_reference import row_numbers
from torch import Tensor

from hf_vq.layers.operators import arguments

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
pytestmark = [
    needs_compiler,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources and emulated_arm.c, once for all test processes."""
    kernels = Path(cpu_build.__file__).parent
    out = tmp_path_factory.getbasetemp().parent / "hf_vq-arm"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            sources = [str(kernels / name) for name in cpu_build._SOURCES]
            command = [COMPILER, *cpu_build._FLAGS, "-static", "-pthread", *sources]
            command += [str(Path(__file__).with_name("emulated_arm.c")), "-o", f"{out}.part", "-lm"]
            subprocess.run(command, check=True)
            Path(f"{out}.part").rename(out)
    return out


def described(value: Any, kind: int = 1) -> bytes:
    """A number, or a tensor as a buffer; None is a null pointer."""
    if value is None or isinstance(value, int):
        return (0).to_bytes(8, "little") + int(value or 0).to_bytes(8, "little", signed=True)
    content = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return kind.to_bytes(8, "little") + len(content).to_bytes(8, "little") + content


class Matrix:
    """A packed matrix as a processor without AVX-512 has it, for functions in the emulator."""

    def __init__(self, program: Path, folder: Path, spec: Any, packed: dict[str, Tensor]):
        self.program, self.folder, self.method = program, folder, spec.method
        self.perm = None
        call = arguments(packed, spec)
        kept: list[Any]
        if spec.method == "gptvq":
            matrix, kept = cpu_gptvq._matrix(call[:6], call[6], call[7:], keep=False)
        elif spec.method == "vptq":
            matrix, kept = cpu_vptq._matrix(call[:8], call[8], call[9:])
        else:
            matrix, words = cpu_cvxq._layout(call[:6], call[6], call[7:], keep=False)
            kept, self.perm = [words], call[5]
        tensors = [t for t in (*kept, *matrix.tensors) if t is not None and t.numel()]
        known = {t.data_ptr(): t for t in tensors}
        self.fields = len(matrix._fields_).to_bytes(8, "little")
        for name, kind in matrix._fields_:
            value = getattr(matrix, name)
            self.fields += described(known[value] if kind is ctypes.c_void_p and value else value)

    def run(self, function: str, y: Tensor, *given: Any) -> tuple[int, Tensor]:
        """What `hf_vq_METHOD_{function}(matrix, *given)` returns and writes to `y` in `given`."""
        text = [described(value, 2 if value is y else 1) for value in given]
        content = self.fields + len(given).to_bytes(8, "little") + b"".join(text)
        (self.folder / "input").write_bytes(content)
        command = [EMULATOR, str(self.program), f"hf_vq_{self.method}_{function}"]
        command += [str(self.folder / "input"), str(self.folder / "output")]
        status = subprocess.run(command, check=False).returncode
        assert 0 <= status < 100, (function, status)
        written = bytearray((self.folder / "output").read_bytes())
        return status, torch.frombuffer(written, dtype=y.dtype).view(y.shape) if written else y


# the emulator is slow
SMALL = [name for name, spec in CASES.items() if spec.in_features <= 1100]


@pytest.mark.parametrize("name", SMALL)
def test_on_arm(name: str, program: Path, tmp_path: Path) -> None:
    spec = CASES[name]
    packed, weight = packed_weight(spec)
    matrix, bias = Matrix(program, tmp_path, spec, packed), torch.randn(spec.out_features)
    perm = matrix.perm
    order = (perm, 0 if perm is None else perm.element_size()) if spec.method == "cvxq" else ()
    most = 3
    if spec.method == "gptvq":
        most, _ = matrix.run("most_tokens", bias)
    for tokens, dtype in ((1, torch.float32), (3, torch.bfloat16), (17, torch.float16)):
        x = torch.randn(tokens, spec.in_features).to(dtype)
        right = x.double() @ weight.double().T
        y, code = torch.zeros(tokens, spec.out_features, dtype=dtype), DTYPES[dtype]
        status, product = matrix.run("product", y, x, y, tokens, code, None, 2)
        if perm is not None:
            product = torch.zeros_like(y).index_copy_(-1, row_numbers(perm), product)
        assert status == 0
        assert_close(f"{tokens} tokens by blocks", product, right.to(dtype), TOLERANCE[dtype])
        if tokens <= most:
            status, few = matrix.run("linear", y, code, x, bias, *order, y, tokens, 1)
            assert status == 0
            assert_close(f"{tokens} tokens", few, (right + bias).to(dtype), TOLERANCE[dtype])
