"""The examples run as they are, and explain themselves."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxquant.deploy import cpu

EXAMPLES = Path(__file__).parent.parent / "examples"

TABLE = "| bits | recipe | seeds | top-1 % | agreement % | KL to float | on the calibration images | seconds | of one core |"

ZOO = """
import torch
from torch import nn

def load_model(name):
    torch.manual_seed(0)
    assert name == "cifar10_resnet20"
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return body.eval(), None

def load_images(name, norm, limit=None):
    return torch.randn(limit or 40, 3, 32, 32, generator=torch.Generator().manual_seed(len(name))), torch.arange(limit or 40) % 10
"""


def table_of(text: str) -> list[str]:
    """Return the lines of the tables in `text`, heads included."""
    return [line for line in text.splitlines() if line.startswith("|")]


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run an example in a process of its own, on one thread, from another folder."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, str(EXAMPLES / name), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=EXAMPLES.anchor, timeout=300)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    """Run an example that stops before it has done anything, in this process, which has torch already: exit code, output, errors."""

    def stopped(name: str, *words: str) -> tuple[Any, str, str]:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *words])
        with pytest.raises(SystemExit) as error:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return error.value.code, *capsys.readouterr()

    return stopped


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("[0-9]*.py")))
def test_help_shows_the_usage(name: str, stopped: Callable[..., tuple[Any, str, str]]) -> None:
    code, out, _ = stopped(name, "--help")
    assert not code
    assert f"python examples/{name}" in out


def test_quantize_digits() -> None:
    pytest.importorskip("sklearn")
    done = run("01_quantize_digits.py", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "bit-identical" in done.stdout
    assert "fold_batch_norm" in done.stdout


def test_cifar10_on_a_network_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "zoo.py").write_text(ZOO)
    done = run("02_cifar10_resnet20.py", str(tmp_path), "--settings", "W4A4", "W2A2", "--seeds", "0", "1", "--images", "32", "--markdown")
    assert done.returncode == 0, done.stderr
    lines = table_of(done.stdout)
    assert lines[0] == "| network | stages | top-1 % | agreement % | KL to float |"
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["float"] + ["W4A4"] * 3 + ["W2A2"] * 3
    assert lines[-1].count("±") == 3


def test_imagenet_folder_says_what_is_wrong(tmp_path: Path) -> None:
    done = run("03_imagenet_folder.py", "resnet18", str(tmp_path / "none.pth"), str(tmp_path), str(tmp_path))
    assert done.returncode == 1
    assert "error: " in done.stderr and "is no file" in done.stderr


@pytest.mark.slow
def test_benchmark_resnet18() -> None:
    done = run("04_benchmark_resnet18.py", "--skip-inference")
    assert done.returncode == 0, done.stderr
    assert "weight ranges" in done.stdout


@pytest.mark.slow
def test_deploy() -> None:
    pytest.importorskip("sklearn")
    done = run("08_deploy.py", "--epochs", "2", "--most", "2", "--requests", "50", "--clients", "4")
    assert done.returncode == 0, done.stderr
    assert "same class 100%" in done.stdout
    assert "50 images in" in done.stdout and "latency p50" in done.stdout


def test_reconstruction_on_a_network_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "zoo.py").write_text(ZOO)
    words = [
        str(tmp_path),
        "--recipes",
        "fast",
        "finish",
        "--set",
        "finish_iterations=2",
        "--seeds",
        "0",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    done = run("06_reconstruction.py", *words)
    assert done.returncode == 0, done.stderr
    lines = table_of((tmp_path / "out" / "runs.md").read_text())
    assert lines[0] == TABLE
    assert sorted(line.split("|")[2].strip() for line in lines[2:]) == ["fast finish_iterations=2", "finish finish_iterations=2"]
    assert all(line.split("|")[3].strip() == "2" for line in lines[2:])
    assert (tmp_path / "out" / "runs.png").stat().st_size > 1000
    before = (tmp_path / "out" / "runs.jsonl").read_text()
    assert run("06_reconstruction.py", *words).returncode == 0
    assert (tmp_path / "out" / "runs.jsonl").read_text() == before, "a run that is there already was repeated"


@pytest.mark.slow
def test_ablation_on_a_network_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "zoo.py").write_text(ZOO)
    words = ["--ablation", "standard", "twice", "--set", "finish_iterations=2", "finish_batch=8", "--out", str(tmp_path / "out")]
    done = run("06_reconstruction.py", str(tmp_path), *words)
    assert done.returncode == 0, done.stderr
    lines = table_of((tmp_path / "out" / "ablation.md").read_text())
    assert lines[0] == TABLE
    names = [f"{name} finish_iterations=2 finish_batch=8" for name in ("standard", "twice the steps")]
    assert sorted(line.split("|")[2].strip() for line in lines[2:]) == names


def test_an_unknown_variant_of_the_ablation_is_named(tmp_path: Path, stopped: Callable[..., tuple[Any, str, str]]) -> None:
    (tmp_path / "zoo.py").write_text(ZOO)
    code, _, errors = stopped("06_reconstruction.py", str(tmp_path), "--ablation", "standard", "weigths")
    assert code == 2
    assert "no variant begins with 'weigths'; there are: standard, without the bias stage" in errors


def test_an_ablation_takes_no_equal_time(tmp_path: Path, stopped: Callable[..., tuple[Any, str, str]]) -> None:
    (tmp_path / "zoo.py").write_text(ZOO)
    code, _, errors = stopped("06_reconstruction.py", str(tmp_path), "--ablation", "--equal-time")
    assert code == 2
    assert "choose one" in errors


@pytest.mark.slow
def test_published_recipes_at_equal_time(tmp_path: Path) -> None:
    (tmp_path / "zoo.py").write_text(ZOO)
    words = ["--recipes", "brecq", "fast", "--equal-time", "--set", "unit_iterations=2", "--out", str(tmp_path / "out")]
    done = run("06_reconstruction.py", str(tmp_path), *words)
    assert done.returncode == 0, done.stderr
    lines = table_of((tmp_path / "out" / "runs.md").read_text())
    assert sorted(line.split("|")[2].strip() for line in lines[2:]) == [
        "brecq unit_iterations=2 scales_iterations=1750",
        "fast unit_iterations=2",
    ]


@pytest.mark.slow
def test_transformers_on_a_network_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "zoo.py").write_text(ZOO)
    words = ["--networks", "cifar10_resnet20", "--settings", "W4A4", "W3A4", "--recipes", "ranges", "erq", "--seeds", "0"]
    words = [str(tmp_path), *words, "--out", str(tmp_path / "out")]
    done = run("11_transformers.py", *words)
    assert done.returncode == 0, done.stderr
    lines = table_of(done.stdout)
    assert lines[0] == TABLE
    assert sorted(line.split("|")[1].strip() for line in lines[2:]) == ["W3A4", "W3A4", "W4A4", "W4A4"]
    before = (tmp_path / "out" / "runs.jsonl").read_text()
    again = run("11_transformers.py", *words)
    assert again.stdout == done.stdout
    assert (tmp_path / "out" / "runs.jsonl").read_text() == before, "a run that is there already was repeated"


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("02_cifar10_resnet20.py", True),
        ("11_transformers.py", False),
        ("11_transformers.py", True),
        ("12_equalization.py", True),
        ("13_lowered_equality.py", True),
    ],
)
def test_says_that_it_needs_a_zoo(name: str, given: bool, tmp_path: Path, stopped: Callable[..., tuple[Any, str, str]]) -> None:
    code, _, errors = stopped(name, *[str(tmp_path)] * given)
    assert code == 2
    assert "has no zoo.py" in errors


def test_equalization_on_a_network_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "zoo.py").write_text(ZOO)
    done = run("12_equalization.py", str(tmp_path), "--networks", "cifar10_resnet20", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    ways = {line.split("|")[2].strip() for line in done.stdout.splitlines() if line.startswith("| W8A8")}
    assert ways == {
        "ranges",
        "equalized",
        "equalized, absorbed by batch norms",
        "equalized, absorbed by 128 images",
        "bias",
        "bias by batch norms",
        "equalized, absorbed by 128 images, bias",
    }
    assert len((tmp_path / "out" / "equalization.jsonl").read_text().splitlines()) == len(ways)


@pytest.mark.slow
def test_benchmark_reconstruction_on_a_network_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "zoo.py").write_text(ZOO)
    done = run("07_benchmark_reconstruction.py", str(tmp_path), "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| 2.2 |") == 2


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.slow
@pytest.mark.parametrize("batch", ["64", "1"])
def test_a_lowered_network_is_compared_byte_by_byte(tmp_path: Path, batch: str) -> None:
    (tmp_path / "zoo.py").write_text(ZOO)
    words = ["--networks", "cifar10_resnet20", "--settings", "W4A4", "--edges", "integer", "--batch", batch, "--out", str(tmp_path / "out")]
    done = run("13_lowered_equality.py", str(tmp_path), *words)
    assert done.returncode == 0, done.stderr
    *_, row = done.stdout.splitlines()
    name, bits, edges, _, differing, eager, compiled, exported = (cell.strip() for cell in row.strip("|").split("|"))
    assert (name, bits, edges) == ("cifar10_resnet20", "W4A4", "integer")
    assert re.fullmatch(r"0 of [1-9][\d,]+", differing)
    assert eager.startswith("0, ")
    assert compiled.startswith("0, ") and compiled.endswith(", 0")
    assert re.fullmatch(r"[\d,]+, \d\.\de-\d\d, [\d,]+", exported)
    assert (tmp_path / "out" / "equality.md").read_text().splitlines()[-1] == row
