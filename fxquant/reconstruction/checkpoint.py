"""What is on disk while a long run goes on: one safetensors file that is replaced as a whole, and belongs to one run.

<folder>/checkpoint.safetensors    tensors, and as JSON: where the run is, and which network, recipe, images and version it is a run of
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.fx import GraphModule

from fxquant.errors import CheckpointError
from fxquant.files import checksum, drop_unfinished, free_space, gib, raw, write_whole
from fxquant.graph import fingerprint

FILE = "checkpoint.safetensors"
FORMAT = 3

_KEY = "fxquant.checkpoint"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to; each field is a hash but for `version` and `settings`."""

    network: str
    """Of the graph of the teacher (its fingerprint), its parameters and its buffers."""
    run: str
    """Of `settings`."""
    images: str
    """Of the calibration images in their order, however they are split into batches."""
    version: str
    """Of fxquant and of the format of checkpoints."""
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What was asked for, JSON-able: kept so that a difference can be named."""

    @staticmethod
    def of(teacher: GraphModule, run: Mapping[str, Any], images: Sequence[Tensor]) -> Identity:
        """Return the identity of a run.

        Args:
            teacher: the float network, on any device.
            run: all that the result depends on (recipe, bits, edges, overrides, seed), JSON-able; the order of its keys counts, as that of
                overrides does. Tuples are lists and 2.0 is 2 here.
            images: batches of calibration images ``[n, ...]``.
        """
        state = [*teacher.named_parameters(remove_duplicate=False), *teacher.named_buffers(remove_duplicate=False)]
        settings = json.loads(json.dumps(run), parse_float=_number)
        pixels = hashlib.sha256(f"{images[0].dtype} {list(images[0].shape[1:])}".encode())
        for batch in images:
            pixels.update(raw(batch))
        return Identity(
            network=checksum("\n".join(fingerprint(teacher)), dict(state)),
            run=checksum(json.dumps(settings), {}),
            images=pixels.hexdigest(),
            version=f"fxquant {_version()}, torch {torch.__version__}, format {FORMAT}",
            settings=settings,
        )


class Checkpoints:
    """The checkpoint of one run in a folder.

    Args:
        folder: made when it is missing (not with `resume`).
        identity: of this run.
        resume: go on from what is there. Without it, what is there is an error: it may be hours of work.

    Raises:
        CheckpointError: the folder is a file or cannot be written; nothing to resume from, or that of another run, or damaged.
    """

    def __init__(self, folder: str | Path, identity: Identity, resume: bool):
        self.folder, self.identity, self.resume = Path(folder), identity, resume
        self.path = self.folder / FILE
        self._made = False
        self._saved = ""
        if resume:
            header = self._header()
            self._made, self._saved = bool(header["made"]), _described(header["state"])
        elif self.path.exists():
            raise CheckpointError(
                "there is a checkpoint already, maybe of hours of work",
                where=str(self.path),
                fix=f"Go on from it with resume={str(self.folder)!r}, delete it, or choose another folder",
            )
        self._check_folder()
        drop_unfinished(self.path)

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace the checkpoint, or leave it as it is when anything fails (Ctrl-C too).

        Args:
            tensors: of any shape, any type that safetensors knows, on any device; they may share memory.
            state: JSON-able; tuples come back as lists.

        Raises:
            CheckpointError: the disk is full or the folder is gone.
        """
        plain = dict(_plain(tensors))
        header = {
            "identity": {part: getattr(self.identity, part) for part in _PARTS},
            "settings": self.identity.settings,
            "made": self._made,
            "state": dict(state),
        }
        text = json.dumps(header)
        content = to_bytes(plain, {_KEY: text, "header": checksum(text, {}), "tensors": checksum("", plain)})
        try:
            write_whole(self.path, content)
        except OSError as error:
            full = f" (it takes {gib(len(content))}; {free_space(self.folder)})" if error.errno in _FULL else ""
            former, then = "nothing of this run is there yet", "or choose another folder"
            if self._saved:
                former, then = (
                    f"nothing is lost: the checkpoint of {self._saved} is still there",
                    f"then go on with resume={str(self.folder)!r}",
                )
            raise CheckpointError(
                f"the checkpoint of {_described(state)} cannot be written: {error.strerror or error}{full}; {former}",
                where=str(self.path),
                fix=f"Check the folder and the free space, {then}",
            ) from error
        self._saved = _described(state)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors, on the CPU and bit for bit what was saved, and the state; None without `resume`.

        Raises:
            CheckpointError: the file is missing, damaged, or of another run.
        """
        if not self.resume:
            return None
        state = self._header()["state"]
        with self._reading() as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            if file.metadata()["tensors"] != checksum("", tensors):
                raise ValueError("its checksum does not match")
        return tensors, state

    def remove(self) -> None:
        """Delete the file, and the folder if it was made for it and holds nothing else: the run is finished."""
        drop_unfinished(self.path)
        with contextlib.suppress(OSError):  # the run has its result; a file that stays is no reason to lose it
            self.path.unlink(missing_ok=True)
            if self._made:
                self.folder.rmdir()

    def _check_folder(self) -> None:
        """Make the folder and write into it, so that hours of work do not end in an error."""
        try:
            if not self.folder.exists():
                self.folder.mkdir(parents=True)
                self._made = True
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise CheckpointError(
                f"no checkpoint can be written there: {error.strerror or error}",
                where=str(self.folder),
                fix="Give a folder that can be written, or one that does not exist yet",
            ) from error

    def _header(self) -> dict[str, Any]:
        """Return what is written beside the tensors of the file, after making sure that it is of this run."""
        if not self.path.is_file():
            raise CheckpointError(
                "there is no checkpoint to resume from: none has been written, or the run was finished",
                where=str(self.path),
                fix=f"Begin with checkpoint={str(self.folder)!r} and without resume",
            )
        with self._reading() as file:
            text = file.metadata()[_KEY]
            if file.metadata()["header"] != checksum(text, {}):
                raise ValueError("its header has changed")
            header = json.loads(text)
            differences = self._differences(header)
        if differences:
            raise CheckpointError(
                f"is of another run: {'; '.join(differences.values())}",
                where=str(self.path),
                fix=f"{'; '.join(_PARTS[part] for part in differences)}. Or delete it and begin anew without resume",
            )
        return header

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, "pt") as file:
                yield file
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"is damaged, truncated, or no checkpoint ({error})",
                where=str(self.path),
                fix="Delete it and begin anew without resume",
            ) from error

    def _differences(self, header: Mapping[str, Any]) -> dict[str, str]:
        """Return the parts in which the checkpoint with this header is of another run, each with what to say of it."""
        there = header["identity"]
        parts = [part for part in _PARTS if there.get(part) != getattr(self.identity, part)]
        said = {"network": "the network differs (its graph or its weights)", "images": "the calibration images differ"}
        if "version" in parts:
            said["version"] = f"the version differs ({there.get('version')} wrote it, this is {self.identity.version})"
        if "run" in parts:
            old, new = dict(_flat(header["settings"])), dict(_flat(self.identity.settings))
            fields = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            lines = [f"{key} was {old.get(key, 'not there')}, is {new.get(key, 'not there')}" for key in fields]
            rest = [f"and {len(lines) - _NAMED} more fields"] if len(lines) > _NAMED else []
            said["run"] = f"the recipe differs ({'; '.join(lines[:_NAMED] + rest) or 'in the order of its fields'})"
        return {part: said[part] for part in parts}


_PARTS = {
    "network": "Load the weights that the run was begun with",
    "run": "Repeat the arguments that the run was begun with",
    "images": "Give the same images in the same order (no shuffling, or the same seed)",
    "version": "Install the version that wrote it",
}
"""What of an identity is compared, and what to do when it differs."""


_NAMED = 8
"""How many fields that differ a message names."""


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of a JSON value with their dotted names: ``recipe.weight_p``, ``2.4``."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else key)
    else:
        yield name, repr(value)


def _described(state: Mapping[str, Any]) -> str:
    """Return the state as messages name it: ``unit 3, pass 0``."""
    return ", ".join(f"{key} {value}" for key, value in state.items() if isinstance(value, int | str))[:80] or "this run"


def _plain(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as a file takes them: on the CPU, in row-major order, none sharing memory with another."""
    seen = set()
    for name, value in tensors.items():
        value = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        memory = value.untyped_storage().data_ptr()
        yield name, value.clone() if memory in seen else value
        seen.add(memory)


def _number(text: str) -> int | float:
    number = float(text)
    return int(number) if number.is_integer() else number


def _version() -> str:
    try:
        return version("fxquant")
    except PackageNotFoundError:  # a source tree that was not installed
        return "unknown"
