"""C++ kernels, compiled on first use for the processor that they run on, and kept in a cache.

Kernels are plain C functions over pointers, loaded with ctypes: no Python headers, a second to
compile. A machine that can't compile or run them does without: callers ask ``load`` and fall back.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import platformdirs
import torch
from torch import Tensor

from supsup.errors import SlowPath, one_line

_FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC",
    "-ffp-contract=off",  # the same roundings wherever it is compiled
)  # fmt: skip
#: What torch calls the instructions that each source file is written in.
_NEEDS = {
    "sparse": ("avx512_f", "avx512_bw", "avx512_vl", "avx512_bf16"),
    "sparse_avx2": ("avx2", "fma3"),
    "lookup": ("avx512_f", "avx512_bw"),
    "lookup_avx2": ("avx2", "fma3"),
}


def supported(name: str) -> bool:
    """Say whether this processor has the instructions that a source file is written in."""
    able = torch.cpu.get_capabilities()
    return all(able.get(need, False) for need in _NEEDS[name])


@functools.cache
def load(name: str) -> ctypes.CDLL | None:
    """Return the compiled kernels of ``supsup/NAME.cpp``; None where they can't be had.

    Warns once, with ``SlowPath``, where the processor could run them.
    """
    if not supported(name):
        return None
    try:
        return ctypes.CDLL(str(_compiled(Path(__file__).with_name(f"{name}.cpp"))))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(
            f"the {name} kernels can't be had, the work is slower without them: "
            f"{one_line(Exception(detail), 120)}; {_remedy(error)}",
            SlowPath,
            stacklevel=2,
        )
        return None


def _remedy(error: OSError | subprocess.SubprocessError) -> str:
    """Return what to do where kernels can't be compiled or loaded."""
    if isinstance(error, FileNotFoundError) and error.filename == _compiler()[0]:
        return "install a C++ compiler (g++), or name one in $CXX"
    if isinstance(error, subprocess.SubprocessError):
        return "see that the C++ compiler works, or name another in $CXX"
    return f"see that {_folder()} can be written, or name another cache folder in $XDG_CACHE_HOME"


def pointer(array: Tensor) -> ctypes.c_void_p:
    """Return the address of a contiguous tensor's first element, for a kernel."""
    if not array.is_contiguous():
        raise ValueError("kernels take contiguous tensors only")
    return ctypes.c_void_p(array.data_ptr())


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


def _folder() -> Path:
    return platformdirs.user_cache_path("supsup") / "kernels"


def _compiled(source: Path) -> Path:
    """Return the shared library of a source file, compiled unless the cache has it."""
    compiler = _compiler()
    identity = hashlib.sha256(source.read_bytes() + repr(_FLAGS).encode())
    # What -march=native means here, and the compiler's version: homes are shared between machines.
    for question in (["-march=native", "-Q", "--help=target"], ["--version"]):
        answer = subprocess.run([*compiler, *question], capture_output=True, check=True, timeout=60)
        identity.update(answer.stdout)
    folder = _folder()
    library = folder / f"{source.stem}-{identity.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder))
    try:
        built = work / library.name
        command = [*compiler, *_FLAGS, "-o", str(built), str(source)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        built.replace(library)  # whole or not at all, whoever compiles at the same time
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return library
