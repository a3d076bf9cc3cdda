"""What a user sees while a run goes on: a line a pass, a bar a long stage; nothing at all when told to be quiet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from fxquant.pipeline import PassLog

T = TypeVar("T")

SPEED_PERIOD = 600.0
"""Seconds over which speed is estimated: rich's 30 hold no two reports of a step that takes seconds, and no time left would show."""


class Narrator:
    """Prints lines and bars to stderr, or nothing.

    Args:
        progress: False for silence.
    """

    def __init__(self, progress: bool = True):
        self.progress = progress
        self.console = Console(stderr=True, quiet=not progress, highlight=False, soft_wrap=True)

    def passed(self, log: PassLog) -> None:
        """Print what a pass did."""
        self.console.print(str(log), markup=False)
        reasons = [f"{where}: {reason}" for where, reason in log.skipped]
        for note in [*log.notes, *reasons[:3], *([f"... and {len(reasons) - 3} more in the report"] if len(reasons) > 3 else [])]:
            self.console.print(f"    {note}", style="dim", markup=False)

    def line(self, stage: str, text: str) -> None:
        """Print what a stage found."""
        self.console.print(f"{stage:24s}{text}", markup=False)

    @contextmanager
    def counter(self, stage: str) -> Iterator[Callable[..., None]]:
        """Give a function to call with (done, total, text="") that moves a bar and says the text; the bar goes away behind the block."""
        with Progress(
            *_columns(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            transient=True,
            disable=not self.progress,
            speed_estimate_period=SPEED_PERIOD,
        ) as bar:
            task = bar.add_task(stage, total=None, text="")
            yield lambda done, total, text="": bar.update(task, completed=done, total=total, text=text)

    def bar(self, items: Iterable[T], stage: str, total: int | None = None) -> Iterator[T]:
        """Yield `items` behind a bar with the time left; `total` is their number where they do not know it. A full bar goes away."""
        if not self.progress:
            yield from items
            return
        with Progress(*_columns(), console=self.console, transient=True, speed_estimate_period=SPEED_PERIOD) as bar:
            yield from bar.track(items, total=len(items) if isinstance(items, Sized) else total, description=stage)


def _columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("{task.description:24s}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
