"""Builds C++ beside this package once for a machine, with the compiler that inductor has, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off")
"""Without contraction: each product and each sum of floats is rounded on its own."""


@cache
def library(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Return `source` compiled for C, loaded so that what inductor compiles finds its functions.

    It lies in the cache folder of inductor (``TORCHINDUCTOR_CACHE_DIR``), under the hash of the source, the command and torch's version;
    where it is not there yet, that takes seconds.

    Raises:
        OSError: there is no compiler, or it cannot build it; ends with what it says.
    """
    compiler, cache_dir = _inductor()
    root = Path(torch.__file__).parent
    command = [*shlex.split(compiler), *FLAGS, *flags, f"-I{root / 'include'}", str(source), f"-L{root / 'lib'}", "-ltorch_cpu"]
    content = [source.read_bytes(), *(part.encode() for part in (torch.__version__, *command))]
    name = hashlib.sha256(b"\0".join(content)).hexdigest()[:32]
    folder = Path(cache_dir) / "fxquant"
    built = folder / f"{source.stem}_{name}.so"
    if not built.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # other processes may build it, too
            made = Path(scratch) / built.name
            done = subprocess.run([*command, "-o", str(made)], text=True, errors="replace", capture_output=True, check=False)
            if done.returncode:
                raise OSError(f"{compiler} cannot build {source.name}: {done.stderr.strip()[-2000:]}")
            os.replace(made, built)
    return ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)


def _inductor() -> tuple[str, str]:
    """Return the compiler and the cache folder that inductor has. Imported here, so that a torch where they are elsewhere does without."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        return get_cpp_compiler(), cache_dir()
    except Exception as error:  # whatever inductor raises where it finds none
        raise OSError(f"there is no C++ compiler: {error}") from error
