"""What is shown while a run goes on."""

from __future__ import annotations

import io

from rich.console import Console

from fxquant.console import Narrator


def test_time_left_shows_where_a_report_takes_a_minute():
    """Steps at 224 pixels on a processor are that slow."""
    clock, shown = [0.0], io.StringIO()
    narrator = Narrator()
    narrator.console = Console(file=shown, force_terminal=True, width=200, get_time=lambda: clock[0])
    with narrator.counter("units") as show:
        for done in range(4):
            show(done, 10, "loss 0.1")
            clock[0] += 60
    assert "0:07:00" in shown.getvalue()
    assert "loss 0.1" in shown.getvalue()
