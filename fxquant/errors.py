"""One class per thing that can go wrong. Every message names the place and says what to do next.

conv1: 3 output channels hold NaN. Re-load the checkpoint, or skip the layer with overrides={"conv1": {"w": None}}.
^where ^problem                    ^fix
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxquantError(Exception):
    """Base of every error raised by fxquant.

    Args:
        problem: what is wrong, as a sentence without the final full stop.
        where: the layer, file, batch or argument it is wrong in; put in front of the message.
        fix: what to write instead, as a sentence; put behind the message.
    """

    def __init__(self, problem: str, *, where: str | None = None, fix: str | None = None):
        self.problem, self.where, self.fix = problem, where, fix
        prefix = f"{where}: " if where else ""
        super().__init__(prefix + " ".join(_sentence(part) for part in (problem, fix) if part))

    def __reduce__(self):
        # Exceptions cross process borders (pytest-xdist, data loader workers) by pickling; the default would lose the keywords.
        return _rebuild, (type(self), self.problem, self.where, self.fix)


def first_line(error: BaseException) -> str:
    """Return the line of an exception that names the problem, without the full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."


def _rebuild(cls: type[FxquantError], problem: str, where: str | None, fix: str | None) -> FxquantError:
    return cls(problem, where=where, fix=fix)


class TraceError(FxquantError):
    """The network cannot be turned into a graph; names the module, the file and the line."""


class ModelError(FxquantError):
    """The network is not one that can be quantized as it is (nothing to quantize, half precision weights, ...)."""


class CalibrationError(FxquantError, ValueError):
    """The calibration loader gives nothing, or something that is not a batch of images; names the batch and the image."""


class ConfigError(FxquantError, ValueError):
    """An argument, a recipe field or an override has a value that cannot be meant."""


class CATError(FxquantError):
    """Cluster-based affine transformation cannot be fitted or appended."""


class StorageError(FxquantError):
    """A file is damaged, truncated, foreign, or belongs to another architecture; nothing has been loaded."""


class CheckpointError(FxquantError):
    """A checkpoint is missing, damaged, of another run, or cannot be written; names what differs."""


class ExportError(FxquantError):
    """A network cannot be written in another format, or what was written does not compute the same; no file is left."""


class PassError(FxquantError):
    """Passes in an order that cannot work, or a pass that left a broken graph behind."""


class FxquantWarning(UserWarning):
    """Something was done differently from what was asked; the text says what, and how to ask for something else."""


def listed(words: Iterable[object]) -> str:
    """Return words as they are named in messages: ``'a', 'b', 'c'``."""
    return ", ".join(repr(word) for word in words)


def one_of(word: object, allowed: Iterable[str]) -> str:
    """Return the advice for a mistyped `word`: what is allowed, and the nearest of it."""
    allowed = list(allowed)
    near = difflib.get_close_matches(str(word), allowed, n=1)
    return f"Use one of {listed(allowed)}" + (f"; did you mean {near[0]!r}?" if near else "")
