"""What a user sees while a run goes on: a line a pass, a bar a long stage; nothing at all when told to be quiet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from fxquant.pipeline import PassLog

T = TypeVar("T")

SPEED_PERIOD = 600.0
"""Seconds over which speed is estimated: rich's 30 hold no two reports of a step that takes seconds, and no time left would show."""
LINE_PERIOD = 60.0
"""Seconds between the lines that stand for a bar where there is no terminal to draw it on."""


class Narrator:
    """Prints lines and bars to stderr, or nothing; where that is no terminal (a log file), a line a minute instead of a bar.

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
        if not self._draws():
            yield self._lines(stage)
            return
        with Progress(
            *_columns(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            transient=True,
            speed_estimate_period=SPEED_PERIOD,
        ) as bar:
            task = bar.add_task(stage, total=None, text="")
            yield lambda done, total, text="": bar.update(task, completed=done, total=total, text=text)

    def bar(self, items: Iterable[T], stage: str, total: int | None = None) -> Iterator[T]:
        """Yield `items` behind a bar with the time left; `total` is their number where they do not know it. A full bar goes away."""
        total = len(items) if isinstance(items, Sized) else total
        if not self._draws():
            tell = self._lines(stage)
            for done, item in enumerate(items):
                tell(done, total)
                yield item
            return
        with Progress(*_columns(), console=self.console, transient=True, speed_estimate_period=SPEED_PERIOD) as bar:
            yield from bar.track(items, total=total, description=stage)

    def _draws(self) -> bool:
        return self.progress and (self.console.is_terminal or self.console.is_jupyter)

    def _lines(self, stage: str) -> Callable[..., None]:
        """Return what prints, at most once a minute, how far `stage` is and how long it will take at the speed so far."""
        start: tuple[float, float] | None = None
        last = time.monotonic()

        def tell(done: float, total: float | None, text: str = "") -> None:
            nonlocal start, last
            now = time.monotonic()
            if start is None:
                start = now, done  # a run that goes on does not begin at 0
            if now - last < LINE_PERIOD or not total:
                return
            last, speed = now, (done - start[1]) / (now - start[0]) if now > start[0] else 0.0
            left = f", {timedelta(seconds=round((total - done) / speed))} left" if speed > 0 else ""
            self.line(stage, f"{round(done, 1):.10g} of {total:.10g}{left}" + (f", {text}" if text else ""))

        return tell


def _columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("{task.description:24s}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
