"""The demo: train a small residual network on scikit-learn's digits, quantize it to 4 and 2 bits, show what is left of it.

Every number is measured in the run that prints it. The 597 test images are seen by nothing but the last forward passes. It all runs on one
thread: small layers gain nothing from more, and the numbers of a seed are the same however many cores there are.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxquant
from fxquant.console import Narrator
from fxquant.correction import CatSetting, describe, logits_of
from fxquant.errors import ConfigError
from fxquant.metrics import agreement, kl_divergence, top1
from fxquant.recipe import Recipe
from fxquant.record import Record

TRAIN, CALIBRATION = 1200, 1024
SETTINGS: tuple[tuple[str, int, CatSetting], ...] = (("W4A4, CAT", 4, True), ("W2A2, no CAT", 2, False), ("W2A2, CAT", 2, True))
"""Name, bits of weights and activations, and `cat` of the rows behind the float one."""


@dataclass(frozen=True)
class Digits:
    """Real images of handwritten digits, ``[N, 1, 8, 8]`` float32, normalized, and their labels ``[N]``."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Score:
    """One row of the table; percents, nats, bytes of the saved file."""

    name: str
    top1: float
    agreement: float
    kl: float
    bytes: int


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        projection = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """A residual network of eight layers for 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2))
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def load_digits(seed: int = 0) -> Digits:
    """Return scikit-learn's 1,797 digits, split at random into 1,200 for training and 597 for the test.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ConfigError("scikit-learn is not installed", where="demo", fix='Run: pip install "fxquant[demo]"') from error
    pixels, labels = (torch.from_numpy(part) for part in load(return_X_y=True))
    images = pixels.float().view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAIN], order[TRAIN:]
    images = (images - images[train].mean()) / images[train].std()
    return Digits(images[train], labels[train], images[test], labels[test])


def train_digits(data: Digits, epochs: int = 30, seed: int = 0, progress: bool = True) -> DigitNet:
    """Return a `DigitNet` trained with momentum, a one-cycle schedule and shifts by one pixel; in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitNet()
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randperm(TRAIN, generator=generator).split(48) for _ in range(epochs)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=sum(map(len, batches)))
    with one_thread():
        for rows in (rows for epoch in Narrator(progress).bar(batches, "train") for rows in epoch):
            top, left = torch.randint(0, 3, (2,), generator=generator).tolist()
            images = F.pad(data.train[rows], (1, 1, 1, 1), value=data.train.min().item())[:, :, top : top + 8, left : left + 8]
            optimizer.zero_grad()
            F.cross_entropy(model(images), data.train_labels[rows], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(
    console: Console,
    *,
    seed: int = 0,
    epochs: int = 30,
    recipe: str | Recipe = "fast",
    out: str | Path | None = None,
    compiled: bool = False,
    quiet: bool = False,
) -> list[Score]:
    """Train, quantize, save, load and compare; print the table to `console`.

    Args:
        console: where results go; progress goes to stderr.
        seed: of the split, the training and the quantization.
        epochs: of the training.
        recipe: as for `fxquant.quantize`; the default does not learn, so that the demo stays under two minutes.
        out: where the 2-bit network with CAT is kept; None: nowhere.
        compiled: also run it through ``torch.compile(fullgraph=True)``.
        quiet: no progress, only results.

    Returns:
        The rows of the table, the float network first.
    """
    if epochs < 1:
        raise ConfigError(f"{epochs} epochs train nothing", where="epochs", fix="Use 1 or more")
    with one_thread():
        return _run(console, load_digits(seed), seed, epochs, Recipe.named(recipe), out, compiled, quiet)


def _run(
    console: Console, data: Digits, seed: int, epochs: int, recipe: Recipe, out: str | Path | None, compiled: bool, quiet: bool
) -> list[Score]:
    start = time.perf_counter()
    model = train_digits(data, epochs, seed, not quiet)
    trained = time.perf_counter() - start
    test, calibration = list(data.test.split(100)), list(data.train[:CALIBRATION].split(64))
    float_logits = logits_of(model, test)
    scores = [_score("float", float_logits, float_logits, data, len(safetensors.torch.save(model.state_dict())))]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.safetensors"
        for name, bits, cat in Narrator(not quiet).bar(SETTINGS, "quantize"):
            qmodel = fxquant.quantize(model, calibration, bits, bits, cat, recipe=recipe, seed=seed, progress=False)
            fxquant.save(qmodel, path)
            scores.append(_score(name, logits_of(qmodel, test), float_logits, data, path.stat().st_size))
        quantized = time.perf_counter() - start
        logits = logits_of(qmodel, test)
        same = torch.equal(logits_of(fxquant.load(path, DigitNet()), test), logits)
    console.print(_table(scores, epochs, trained, quantized))
    console.print(f"CAT at 2 bits: {describe(Record.from_module(qmodel).cat)}", markup=False, highlight=False)
    verdict = "[green]bit-identical[/]" if same else "[red]different[/]"
    console.print(f"Saved, loaded again: the outputs on {len(data.test)} images are {verdict}.", highlight=False)
    if compiled:
        start = time.perf_counter()
        error = (logits_of(torch.compile(qmodel, fullgraph=True, dynamic=True), test) - logits).abs().max() / logits.abs().max()
        seconds = time.perf_counter() - start
        console.print(f"torch.compile(fullgraph=True): {seconds:.1f} s, largest relative difference {error:.1e}.", highlight=False)
    if out is not None:
        fxquant.save(qmodel, out)
        console.print(f"The 2-bit network with CAT is in {out}.", markup=False, highlight=False)
    return scores


def _score(name: str, logits: Tensor, float_logits: Tensor, data: Digits, size: int) -> Score:
    kl = kl_divergence(logits, float_logits).mean().item()
    return Score(name, top1(logits, data.test_labels), agreement(logits, float_logits), kl, size)


def _table(scores: list[Score], epochs: int, trained: float, quantized: float) -> Table:
    caption = (
        f"trained on {TRAIN:,} images: {epochs} epochs, {trained:.0f} s\n"
        f"quantized {len(scores) - 1} times with {CALIBRATION:,} of them: {quantized:.0f} s"
    )
    table = Table(title="digits: 1,797 handwritten digits, tested on 597", caption=caption)
    table.add_column("network")
    for name in ("top-1 %", "agreement %", "KL to float", "bytes", "share"):
        table.add_column(name, justify="right")
    for score in scores:
        share = f"1/{scores[0].bytes / score.bytes:.1f}" if score is not scores[0] else "1"
        table.add_row(score.name, f"{score.top1:.2f}", f"{score.agreement:.2f}", f"{score.kl:.4f}", f"{score.bytes:,}", share)
    return table
