"""Where activations live while units are reconstructed: on the device, in host memory, or, beyond a budget, in memory-mapped files.

put("x", batches)      batch 0  -> allocated once for all images, in the storage type
                       batch 1..-> copied in
rows("x", [7, 2, 9])   row i belongs to calibration image i
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fxquant.errors import ConfigError, listed
from fxquant.files import free_space, gib

_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""What a file system answers that cannot reserve blocks."""


@dataclass
class _Entry:
    """A stored tensor ``[count, ...]``, the type it had, and where it is."""

    value: Tensor
    dtype: torch.dtype
    place: str

    @property
    def bytes(self) -> int:
        return self.value.numel() * self.value.element_size()


class Store:
    """Tensors by name, row i of each belonging to calibration image i, under a byte budget.

    A tensor goes onto the device when that is a GPU with room, else into host memory while that holds no more than the budget. What is
    beyond it goes into files without a name, so nothing stays on disk, not even after a kill. What is read is a copy: it may be written
    into.

    Args:
        count: calibration images, the rows of every tensor.
        device: where `rows` and `batches` are wanted.
        budget: bytes that may be held in host memory; of a GPU, a quarter stays free, and at least twice the budget.
        dtype: what wider floating point tensors are stored as, such as ``torch.bfloat16``; None: everything as it is.
        folder: for the files; None: that of temporary files (the environment variable TMPDIR).
    """

    def __init__(self, count: int, device: torch.device, budget: float, dtype: torch.dtype | None = None, folder: str | Path | None = None):
        self.count, self.device, self.budget, self.dtype = count, torch.device(device), budget, dtype
        self.folder = Path(tempfile.gettempdir() if folder is None else folder)
        self.peak = 0
        """The most bytes held at once so far, files included."""
        self._entries: dict[str, _Entry] = {}

    @property
    def names(self) -> list[str]:
        """What is held, in the order it was put."""
        return list(self._entries)

    @property
    def places(self) -> dict[str, str]:
        """Where each tensor is: ``"device"``, ``"host"`` or ``"disk"``."""
        return {name: entry.place for name, entry in self._entries.items()}

    @property
    def bytes(self) -> int:
        """Bytes held now, files included."""
        return sum(entry.bytes for entry in self._entries.values())

    @property
    def memory(self) -> int:
        """Bytes held now in host memory; never more than the budget."""
        return sum(entry.bytes for entry in self._entries.values() if entry.place == "host")

    def put(self, name: str, batches: Iterable[Tensor]) -> None:
        """Store `batches` under one name; see `put_all`."""
        self.put_all([name], ((batch,) for batch in batches))

    def put_all(self, names: Sequence[str], batches: Iterable[Sequence[Tensor]]) -> None:
        """Store what `batches` hold, read once, a tensor a name: rows ``[n, ...]`` in image order, together `count` of them.

        Nothing is kept when it fails.

        Raises:
            ConfigError: a name is taken, the rows are not `count`, a batch has another shape or type than the first, or a tensor is
                beyond the budget and the disk does not take it.
        """
        for name in names:
            if name in self._entries:
                raise ConfigError("is stored already", where=name, fix="Drop it first")
        filled = dict.fromkeys(names, 0)
        try:
            for values in batches:
                for name, batch in zip(names, values, strict=True):
                    filled[name] += self._write(name, batch, filled[name])
            for name, rows in filled.items():
                if rows != self.count:
                    raise self._wrong_rows(name, str(rows))
        except BaseException:
            for name in names:
                self._entries.pop(name, None)
            raise

    def _write(self, name: str, batch: Tensor, start: int) -> int:
        """Write the rows of `batch` from row `start` on, and return how many there are."""
        entry = self._entries.get(name) or self._enter(name, batch)
        if batch.shape[1:] != entry.value.shape[1:] or batch.dtype != entry.dtype:
            wanted = f"{list(entry.value.shape[1:])} of {entry.dtype}"
            found = f"{list(batch.shape[1:])} of {batch.dtype}"
            raise ConfigError(f"a batch holds rows {found}, the first one {wanted}", where=name, fix="Give batches alike")
        if start + len(batch) > self.count:
            raise self._wrong_rows(name, f"more than {self.count}")
        entry.value[start : start + len(batch)].copy_(batch.detach())
        return len(batch)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Return the rows ``[len(index), ...]`` of `name` at `index` (int64, any device), on the device, in the type that was put."""
        entry = self._entry(name)
        drawn = entry.value.index_select(0, index.to(entry.value.device))
        return drawn.to(self.device).to(entry.dtype)  # moved while it is narrow

    def batches(self, name: str, size: int) -> Iterator[Tensor]:
        """Yield all rows of `name` in order, `size` at a time (fewer in the last batch), on the device, in the type that was put."""
        entry = self._entry(name)
        for part in entry.value.split(size):
            yield part.to(self.device, copy=True).to(entry.dtype)

    def drop(self, name: str) -> None:
        """Give back what `name` takes, memory and file."""
        self._entry(name)
        del self._entries[name]

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ConfigError("is not stored", where=name, fix=f"Stored are: {listed(self._entries) or 'none'}")
        return self._entries[name]

    def _wrong_rows(self, name: str, rows: str) -> ConfigError:
        return ConfigError(
            f"the batches hold {rows} rows, there are {self.count} images",
            where=name,
            fix="Store one row an image; windows or tokens counted into the batch axis cannot be drawn by image",
        )

    def _enter(self, name: str, first: Tensor) -> _Entry:
        """Allocate for all images what looks like the batch `first`."""
        if first.ndim == 0:
            raise ConfigError("a batch is one number", where=name, fix="Give batches [n, ...]")
        dtype = first.dtype
        if self.dtype is not None and dtype.is_floating_point and self.dtype.itemsize < dtype.itemsize:
            dtype = self.dtype
        shape = [self.count, *first.shape[1:]]
        value, place = self._allocate(name, shape, dtype)
        self._entries[name] = entry = _Entry(value, first.dtype, place)
        self.peak = max(self.peak, self.bytes)
        return entry

    def _allocate(self, name: str, shape: list[int], dtype: torch.dtype) -> tuple[Tensor, str]:
        size = math.prod(shape) * dtype.itemsize
        if self.device.type == "cuda" and size <= _room(self.device, self.budget):
            with contextlib.suppress(torch.OutOfMemoryError):  # what is free may be in pieces
                return torch.empty(shape, dtype=dtype, device=self.device), "device"
        if self.memory + size > self.budget:
            return self._map(name, size).view(dtype).view(shape), "disk"
        return torch.empty(shape, dtype=dtype, device="cpu"), "host"

    def _map(self, name: str, size: int) -> Tensor:
        """Return uint8 ``[size]`` that lives in a file; it goes with the last tensor that shares its memory."""
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:  # without a name from the start where the system can do that
                _reserve(file.fileno(), size, self.folder)
                return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
        except OSError as error:
            held = f"{gib(self.memory)} of {gib(self.budget)} are held"
            raise ConfigError(
                f"{name!r} takes {gib(size)}, which is beyond it ({held}), and {self.folder} does not take it either"
                f" ({error.strerror or error}; {free_space(self.folder)})",
                where="Recipe.memory_gib",
                fix="Free disk space, or set the environment variable TMPDIR to a folder on a larger disk, and go on with resume if there"
                " is a checkpoint; or raise it, or pass fewer images, and begin anew",
            ) from error


def _room(device: torch.device, budget: float) -> float:
    """Return the bytes that a tensor may take on a GPU so that a quarter of it and twice the budget stay free for the learning itself.

    What torch keeps for reuse counts as free.
    """
    free, total = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + reusable - max(total / 4, 2 * budget)


def _reserve(file: int, size: int, folder: Path) -> None:
    """Give a file its blocks now: a full disk is an OSError here, but kills the process when a mapped page is written."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(file, size)
