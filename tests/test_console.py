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


def lines_of(monkeypatch, narrator: Narrator, run) -> list[str]:
    """Return what `run` prints into a file; it is given the narrator and a function that lets seconds pass."""
    clock, shown = [0.0], io.StringIO()
    monkeypatch.setattr("fxquant.console.time.monotonic", lambda: clock[0])
    narrator.console = Console(file=shown, width=200, quiet=not narrator.progress)

    def wait(seconds: float) -> None:
        clock[0] += seconds

    run(narrator, wait)
    return shown.getvalue().splitlines()


def learn(narrator: Narrator, wait) -> None:
    with narrator.counter("units") as show:
        for done in range(4, 8):  # a run that goes on behind its fourth unit
            show(done, 10, "loss 0.1")
            wait(20 if done == 4 else 40)


def test_a_log_file_gets_a_line_a_minute(monkeypatch):
    assert lines_of(monkeypatch, Narrator(), learn) == [f"{'units':24s}6 of 10, 0:02:00 left, loss 0.1"]


def test_steps_are_written_out(monkeypatch):
    def train(narrator: Narrator, wait) -> None:
        with narrator.counter("finish") as show:
            for done in (0, 12345.678):
                show(done, 200_000)
                wait(70)
            show(199_999, 200_000)

    lines = lines_of(monkeypatch, Narrator(), train)
    assert lines == [f"{'finish':24s}12345.7 of 200000, 0:17:44 left", f"{'finish':24s}199999 of 200000, 0:00:00 left"]


def test_a_log_file_gets_lines_for_bars(monkeypatch):
    def observe(narrator: Narrator, wait) -> None:
        for _ in narrator.bar(range(10), "observe"):
            wait(25)

    assert lines_of(monkeypatch, Narrator(), observe) == [
        f"{'observe':24s}{done} of 10, 0:0{left} left" for done, left in ((3, "2:55"), (6, "1:40"), (9, "0:25"))
    ]


def test_silence_is_silent(monkeypatch):
    assert lines_of(monkeypatch, Narrator(False), learn) == []
