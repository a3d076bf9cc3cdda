"""The ten lines of use, on real digits: train a small network, quantize it to 2 bits, save it, load it, compare it.

    pip install -e ".[demo]"
    python examples/01_quantize_digits.py

Nothing is downloaded. `fxquant demo` does the same with more settings in one table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import fxquant
from fxquant.demo import DigitNet, load_digits, train_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30, help="of the training (default: 30)")
    parser.add_argument("--recipe", default="fast", help="fast takes seconds, standard learns for minutes (default: fast)")
    options = parser.parse_args()

    # A float network in eval mode. Any nn.Module will do: torchvision's, timm's, your own.
    digits = load_digits()
    model = train_digits(digits, options.epochs)

    # A few hundred unlabeled training images, as a DataLoader or a list of batches.
    calibration = list(digits.train[:512].split(64))

    # 2-bit weights, 2-bit activations; the logits are corrected where that helps on held-out calibration images.
    # The recipe says how much work goes into it; without one it is "standard", which learns.
    qmodel = fxquant.quantize(model, calibration, w=2, a=2, cat=True, recipe=options.recipe)

    # What was done to each layer, and what it cost.
    print(fxquant.report(qmodel))

    # One small file without pickle; it is loaded into the architecture.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.safetensors"
        fxquant.save(qmodel, path)
        size, loaded = path.stat().st_size, fxquant.load(path, DigitNet())

    # The result is an ordinary GraphModule: call it, compile it, export it.
    with torch.inference_mode():
        expected, logits, again = (network(digits.test) for network in (model, qmodel, loaded))
    for name, output in (("float", expected), ("2-bit", logits), ("loaded", again)):
        print(f"{name:8s}top-1 {(output.argmax(1) == digits.test_labels).float().mean():.2%}")
    print(f"file    {size:,} bytes; outputs after loading are {'bit-identical' if torch.equal(logits, again) else 'different'}")


if __name__ == "__main__":
    main()
