"""The demo runs, says what it measured, and says the same again."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fxquant
from fxquant import cli, demo
from fxquant.errors import ConfigError

pytest.importorskip("sklearn")


def test_demo_prints_the_table_and_keeps_the_file(tmp_path: Path) -> None:
    out = tmp_path / "digits.safetensors"
    text = io.StringIO()
    scores = demo.run(Console(file=text, width=80), epochs=1, out=out, quiet=True)
    assert [score.name for score in scores] == ["float", "W4A4, CAT", "W2A2, no CAT", "W2A2, CAT"]
    for score in scores:
        assert score.name in text.getvalue()
        assert f"{score.top1:.2f}" in text.getvalue()
        assert f"{score.bytes:,}" in text.getvalue()
    assert "bit-identical" in text.getvalue()
    assert max(len(line) for line in text.getvalue().splitlines()) <= 80
    assert scores[0].bytes > 6 * scores[1].bytes
    assert out.stat().st_size == scores[3].bytes
    loaded = fxquant.load(out, demo.DigitNet())
    logits = torch.cat([loaded(batch) for batch in demo.load_digits().test.split(100)])
    assert demo.top1(logits, demo.load_digits().test_labels) == scores[3].top1


def test_training_and_split_depend_on_the_seed_alone() -> None:
    data = demo.load_digits(1)
    torch.rand(3)
    assert torch.equal(data.test, demo.load_digits(1).test)
    assert not torch.equal(data.test, demo.load_digits(2).test)
    before = torch.get_rng_state()
    first = demo.train_digits(data, 1, 1, progress=False)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    second = demo.train_digits(data, 1, 1, progress=False)
    assert torch.equal(first(data.test), second(data.test))


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["demo"]) == 2
    assert 'pip install "fxquant[demo]"' in capsys.readouterr().err


def test_no_epochs_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 epochs train nothing"):
        demo.run(Console(quiet=True), epochs=0)


@pytest.mark.slow
def test_the_trained_network_is_good_and_two_bits_keep_it_so() -> None:
    scores = demo.run(Console(quiet=True), quiet=True)
    assert scores[0].top1 >= 98
    assert scores[1].top1 >= 98
    assert scores[3].kl <= 1.01 * scores[2].kl
    assert scores[3].top1 >= 95
