"""The compiled part of the CPU backends: C sources of this package, compiled once per machine.

The library is compiled for the processor at hand on first use, which takes a few seconds, and kept
in `$HF_VQ_CACHE` (default: hf_vq in the user's cache folder) under a name made of the sources, the
flags, the compiler and the processor, so that none of these can change unnoticed. It is written
under another name and then renamed: processes that start together each find nothing or all of it.

Before that it proves itself (cpu_proof.py). One that computes something else, or crashes, is
reported by a warning, and the sources are compiled again for less of the processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_SOURCES = ("cpu_gptvq.c", "cpu_vptq.c", "cpu_cvxq.c", "cpu_product.c")
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-fno-math-errno")
# Tried in this order: not every compiler knows the processor or has OpenMP.
_VARIANTS = (
    ("-march=native", "-fopenmp"),
    ("-march=native", "-pthread"),
    ("-mcpu=native", "-fopenmp"),
    ("-mcpu=native", "-pthread"),
    ("-march=x86-64-v3", "-fopenmp"),
    ("-pthread",),
)


class CannotCompile(RuntimeError):
    """Why there is no compiled library, in one line."""


def find_compiler() -> str:
    """Path of the C compiler: `$CC`, or else cc, gcc or clang. Raises CannotCompile."""
    demanded = os.environ.get("CC", "").strip()
    for name in (demanded,) if demanded else ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path:
            return path
    missing = f"CC={demanded} is not a program" if demanded else "there is no cc, gcc or clang"
    raise CannotCompile(f"no C compiler was found ({missing}); install gcc or clang, or set CC")


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    named = os.environ.get("HF_VQ_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hf_vq"


def _processor() -> str:
    """What the compiled code depends on: name and instruction sets of the processor."""
    lines = [platform.machine(), platform.processor()]
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            seen: set[str] = set()
            for line in file:
                key = line.split(":")[0].strip().lower()
                if key in ("model name", "flags", "features", "cpu part") and key not in seen:
                    seen.add(key)
                    lines.append(line.strip())
    except OSError:
        pass  # not Linux
    return "\n".join(lines)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def _compile(compiler: str, flags: tuple[str, ...], sources: list[Path], library: str) -> str:
    """The compiler's complaint, "" if there is none; sources are compiled side by side."""
    with tempfile.TemporaryDirectory(prefix="hf_vq_") as folder:
        objects = [f"{folder}/{source.stem}.o" for source in sources]
        commands = [
            [compiler, *flags, "-c", str(source), "-o", out]
            for source, out in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=len(commands)) as pool:
            done = list(pool.map(_run, commands))
        done.append(_run([compiler, *flags, "-shared", *objects, "-o", library, "-lm"]))
    return next((d.stderr.strip() or "it failed" for d in done if d.returncode), "")


def _disproof(path: str) -> str | None:
    """What is wrong with a library, found out in another process; None if nothing is known."""
    script = (
        "import sys; sys.path[:] = eval(sys.argv[2]); "
        "from hf_vq_kernels.cpu_proof import main; main(sys.argv[1:])"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_VQ_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", script, path, repr([p for p in sys.path if isinstance(p, str)])],
        capture_output=True, text=True, timeout=900, check=False, env=environment,
    )  # fmt: skip
    if done.returncode < 0:
        return f"it was ended by signal {-done.returncode}"
    if done.returncode == 3:
        return done.stdout.strip().splitlines()[-1]
    return None  # right, or a process that could not even begin


def build(folder: Path | None = None) -> Path:
    """Path of the library, compiled unless it is in `folder` (default: `cache_folder()`) already.

    Raises CannotCompile without a compiler, or with the compiler's last words.
    """
    if sys.byteorder != "little":
        raise CannotCompile("the C sources are for little-endian processors")
    compiler = find_compiler()
    here = Path(__file__).parent
    sources = [here / name for name in _SOURCES]
    content = [p.read_bytes() for p in sorted([*here.glob("cpu_*.h"), *sources])]
    version = _run([compiler, "--version"]).stdout.splitlines()[:1]
    identity = repr((_FLAGS, _VARIANTS, compiler, version, _processor())).encode()
    digest = hashlib.sha256(b"\0".join([identity, *content])).hexdigest()[:24]
    folder = folder or cache_folder()
    library = folder / f"cpu_{digest}.so"
    if library.is_file():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError:  # a home that cannot be written: compile for this process alone
        folder = Path(tempfile.mkdtemp(prefix="hf_vq_"))
        library = folder / library.name
    complaint, refused = "", set()
    if sys.stderr.isatty() and os.environ.get("HF_VQ_PROGRESS") != "0":
        print(
            "hf_vq compiles its CPU kernels for this processor, once, in some ten seconds",
            file=sys.stderr,
        )
    for variant in _VARIANTS:
        if variant[0] in refused:
            continue
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            complaint = _compile(compiler, (*_FLAGS, *variant), sources, temporary)
            if complaint:
                continue
            wrong = _disproof(temporary)
            if wrong is None:
                os.replace(temporary, library)
                return library
            refused.add(variant[0])
            complaint = f"what was compiled with {variant[0]} computes wrongly: {wrong}"
            warnings.warn(
                f"hf_vq's CPU kernels, {complaint}; they are compiled for less of this processor. "
                "Please report it with the output of lscpu",
                RuntimeWarning,
                stacklevel=2,
            )
        except (OSError, subprocess.SubprocessError) as error:
            complaint = str(error)
        finally:
            Path(temporary).unlink(missing_ok=True)
    last = complaint.splitlines()[-1] if complaint else "without a word"
    raise CannotCompile(f"{compiler} could not compile the kernels: {last}")


_named: list[str] = []


def load(path: str) -> None:
    """Let `library` be the one at `path` in this process; before its first call."""
    _named[:] = [path]


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises CannotCompile."""
    path = _named[0] if _named else str(build())
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise CannotCompile(f"{path} cannot be loaded: {error}") from error


def function(name: str, *arguments: Any) -> Any:
    """The C function `name` of the library, which takes plain numbers for these ctypes."""
    found = getattr(library(), name)
    if found.argtypes is None:
        found.argtypes = arguments
    return found


@functools.cache
def unavailable() -> str | None:
    """Why the compiled kernels cannot be used in this process; None if they can."""
    try:
        library()
    except CannotCompile as error:
        return str(error)
    return None
