"""What was done to a network, as tables: layers with bits, noise and bytes; passes with what they refused; CAT's choice."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from fxquant.correction import describe
from fxquant.coverage import describe_work
from fxquant.placement import EDGES
from fxquant.record import LayerRow, Record


class Report:
    """The report of a quantized network: print it, give it to rich, or read `record`."""

    def __init__(self, record: Record):
        self.record = record

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return self.record.to_dict()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._layers()
        yield self._passes()
        record = self.record
        if record.work:
            yield Text.assemble(("work    ", "bold"), describe_work(record.work))
        yield Text.assemble(("edges   ", "bold"), f"{record.edges}: {EDGES[record.edges]}")
        yield Text.assemble(("recipe  ", "bold"), f"{record.recipe.name}, seed {record.seed}, {record.images} calibration images")
        yield Text.assemble(("cat     ", "bold"), describe(record.cat))

    def __str__(self) -> str:
        plain = Console(width=140, no_color=True, highlight=False)
        with plain.capture() as capture:
            plain.print(self)
        return capture.get()

    def _layers(self) -> Table:
        table = Table(
            title="layers",
            caption="SQNR in dB: of the weight, apart from a gain a channel; of the output, with all errors in front of the layer",
        )
        for name, justify in (("layer", "left"), ("kind", "left"), ("edge", "left"), ("W", "right"), ("A", "right")):
            table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for name in ("weight SQNR", "output SQNR", "bytes", "float bytes"):
            table.add_column(name, justify="right")
        for row in self.record.layers:
            table.add_row(*_cells(row))
        stored, before = (sum(getattr(row, key) for row in self.record.layers) for key in ("bytes", "float_bytes"))
        table.add_section()
        table.add_row("all layers", "", "", "", "", "", "", f"{stored:,}", f"{before:,}", style="bold")
        return table

    def _passes(self) -> Table:
        table = Table(title="passes")
        table.add_column("pass")
        table.add_column("did", justify="right")
        table.add_column("ms", justify="right")
        table.add_column("left alone, and notes", overflow="fold")
        for log in self.record.passes:
            why = [f"{where}: {reason}" for where, reason in log.skipped] + log.notes
            table.add_row(log.name, f"{log.count} {log.verb}", f"{log.milliseconds:.0f}" if log.milliseconds else "", "\n".join(why))
        return table


def report(qmodel: nn.Module) -> Report:
    """Return what was done to a quantized network; ``print(fxquant.report(qmodel))`` shows it as tables.

    Raises:
        ModelError: `qmodel` is not what `fxquant.quantize`, `fxquant.load` or `fxquant.lower` returned.
    """
    return Report(Record.from_module(qmodel, lowered=True))


def _cells(row: LayerRow) -> tuple[str, ...]:
    bits = ("-" if row.w is None and row.kind in ("matmul", "attention") else _bits(row.w), _bits(row.a))
    noise = (_decibel(row.weight_sqnr), _decibel(row.output_sqnr))
    return row.name, row.kind, row.edge, *bits, *noise, f"{row.bytes:,}", f"{row.float_bytes:,}"


def _bits(bits: int | None) -> str:
    return "float" if bits is None else str(bits)


def _decibel(value: float | None) -> str:
    return "" if value is None else "exact" if value == math.inf else f"{value:.1f}"
