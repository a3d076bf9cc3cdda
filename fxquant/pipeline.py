"""Pass and Pipeline: how a graph is edited step by step, with a reason for everything that was not done.

    Pipeline([Canonicalize(), FoldBatchNorm(), ...]).run(gm)

checks that each pass comes after the ones it needs, runs it on a fork of the graph, lints the result, times it and collects one
`PassLog` a pass:

    fold_batch_norm       52 folded, 1 skipped      3 ms
        features.18: its input conv has two readers (bn1, add_3)
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeVar

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxquant.errors import PassError
from fxquant.graph import clean, fork, free_unused

T = TypeVar("T")


class Track(Protocol):
    """Yields `items` unchanged while it shows how many of `total` are done."""

    def __call__(self, items: Iterable[T], stage: str, total: int | None = None) -> Iterable[T]: ...


class Meter(Protocol):
    """Shows one long stage: gives a function to call with (done, total, what to say)."""

    def __call__(self, stage: str) -> AbstractContextManager[Callable[[float, float, str], None]]: ...


@contextmanager
def unmetered(stage: str) -> Iterator[Callable[[float, float, str], None]]:
    """Show nothing."""
    yield lambda done, total, text: None


def untracked(items: Iterable[T], stage: str, total: int | None = None) -> Iterable[T]:
    """Yield `items` and show nothing."""
    return items


@dataclass(frozen=True)
class Skip:
    """Why a pass left a place alone; returned by `Pass.match`."""

    reason: str


@dataclass
class PassLog:
    """What one pass did: how many places it changed, which it refused and why, and how many milliseconds it took."""

    name: str
    verb: str
    count: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    milliseconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"{self.name:24s}{f'{self.count} {self.verb}{skipped}':36s}{self.milliseconds:7.0f} ms"


class Pass(PassBase):
    """One edit of a graph.

    A pass is called with a GraphModule and returns torch's ``PassResult``; the given module is not edited. It fits into
    `Pipeline` and into torch's own pass managers. A subclass either writes `match` and `rewrite`, called node by node, or overrides
    `run` for the whole graph.
    """

    after: ClassVar[tuple[type[Pass], ...]] = ()
    """Passes that must have run before, when they are part of the same pipeline."""

    preserves_output: ClassVar[bool] = False
    """Whether the outputs stay equal; the contract test holds every pass to what it says here."""

    verb: ClassVar[str] = "changed"
    """What was done, for the printed line: "52 folded"."""

    log: PassLog
    track: Track = staticmethod(untracked)
    """Wraps the long loops of a pass, for a progress bar."""
    meter: Meter = staticmethod(unmetered)
    """Shows how far a pass that learns is, and its loss."""

    @classmethod
    def name(cls) -> str:
        """Return the name that logs and reports use: ``FoldBatchNorm`` is ``fold_batch_norm``."""
        return re.sub(r"(?<!^)(?<![A-Z])(?=[A-Z])", "_", cls.__name__).lower()

    def match(self, node: Node) -> object | Skip | None:
        """Return what `rewrite` needs, or a `Skip` with the reason to leave `node` alone, or None when it is none of our business."""
        raise NotImplementedError(f"{type(self).__name__} has neither match nor run")

    def rewrite(self, gm: GraphModule, node: Node, match: object) -> None:
        """Edit the graph at `node`; `match` is what `match` returned."""
        raise NotImplementedError(f"{type(self).__name__} has neither rewrite nor run")

    def run(self, gm: GraphModule) -> None:
        """Edit `gm`; count with `changed`, refuse with `skip`."""
        for node in list(gm.graph.nodes):
            found = self.match(node)
            if isinstance(found, Skip):
                self.skip(node, found.reason)
            elif found is not None:
                self.rewrite(gm, node, found)
                self.changed()

    def changed(self, count: int = 1) -> None:
        """Count places that were edited."""
        self.log.count += count

    def skip(self, node: Node | str, reason: str) -> None:
        """Note that a place was left alone, and why; it reaches the report."""
        where = node if isinstance(node, str) else str(node.target) if node.op == "call_module" else node.name
        self.log.skipped.append((where, reason))

    def note(self, text: str) -> None:
        """Note something the user should know about the edit; it reaches the report."""
        self.log.notes.append(text)

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Run `requires`, `call` and `ensures`, as torch's ``PassBase`` does."""
        result = super().__call__(graph_module)
        assert result is not None
        return result

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run on a fork of `graph_module`; ``modified`` is False, and the module the one given, when there was nothing to do."""
        self.log = PassLog(self.name(), self.verb)
        start = time.perf_counter()
        new = fork(graph_module)
        self.run(new)
        if self.log.count:
            try:
                clean(new)
            except (RuntimeError, ValueError) as error:
                raise PassError(
                    f"left a broken graph behind: {str(error).splitlines()[0]}",
                    where=self.name(),
                    fix="Please report the network; fxquant.trace(model, example).print_readable() shows its graph",
                ) from error
        self.log.milliseconds = 1000 * (time.perf_counter() - start)
        return PassResult(new if self.log.count else graph_module, bool(self.log.count))


class Pipeline:
    """Run passes in order.

    Args:
        passes: the passes; an order against their `after` raises `PassError`.
        say: called with each `PassLog` as soon as its pass is done, for example to print it.
        track, meter: given to each pass, to show how far its long loops are.
    """

    def __init__(
        self, passes: Sequence[Pass], say: Callable[[PassLog], None] | None = None, track: Track = untracked, meter: Meter = unmetered
    ):
        self.passes, self.say, self.track, self.meter = list(passes), say, track, meter
        self.logs: list[PassLog] = []
        classes = [type(step) for step in self.passes]
        for place, step in enumerate(classes):
            late = [other.__name__ for other in step.after if other in classes[place + 1 :]]
            if late:
                raise PassError(
                    f"{step.__name__} must run after {', '.join(late)}",
                    where=f"pass {place}",
                    fix="Order the passes as in fxquant.passes.PREPARE",
                )

    def run(self, gm: GraphModule) -> GraphModule:
        """Return `gm` after all passes; `logs` holds what each did."""
        free_unused(gm)
        for step in self.passes:
            step.track, step.meter = self.track, self.meter
            gm = step(gm).graph_module
            free_unused(gm)
            self.logs.append(step.log)
            if self.say:
                self.say(step.log)
        return gm
