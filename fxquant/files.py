"""Files that are there as a whole or not at all, and what is told about them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the file, then move over it: whoever opens `path` finds the old file or the whole new one.

    Raises:
        OSError: as it came; the old file is as it was, and the one beside it is gone (as it is after Ctrl-C).
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def drop_unfinished(path: Path) -> None:
    """Delete what a killed `write_whole` left beside `path`; nobody else may be writing it."""
    for temporary in path.parent.glob(f".{path.name}.*"):
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of `text` and of the names, types, shapes and bytes of `tensors`, whatever their order; as 64 hex digits."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(raw(value))
    return digest.hexdigest()


def raw(value: Tensor) -> Any:
    """Return the bytes of `value` in row-major order, as a numpy array of uint8 (a view where that is possible)."""
    whole = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    flat = whole.as_strided([whole.numel()], [1])  # what has one element or none may be contiguous with any stride
    return flat.view(torch.uint8).numpy()


def gib(size: float) -> str:
    """Return a number of bytes as messages give it: ``1.50 GiB``."""
    return f"{size / 2**30:.2f} GiB"


def free_space(folder: str | os.PathLike[str]) -> str:
    """Return what is free on the disk that `folder` is on, as messages give it."""
    try:
        return f"{gib(shutil.disk_usage(folder).free)} free"
    except OSError:
        return "free space unknown"
