"""A network of torchvision with your own weights and your own images, through the Python API.

    python examples/03_imagenet_folder.py resnet18 resnet18.pth photos/train photos/val
    python examples/03_imagenet_folder.py mobilenet_v2 mobilenet.safetensors photos/train photos/val --bits 4 --images 512
    python examples/03_imagenet_folder.py resnet18 resnet18.pth photos/train photos/val --bits 2 --recipe standard --device cuda

Needs a weights file (.safetensors, or .pth with tensors only) and two folders of images, to calibrate and to compare with: images
directly inside, or in one subfolder a class. Nothing is downloaded. `fxquant quantize` and `fxquant evaluate` do the same in a shell.
"""

from __future__ import annotations

import argparse
import sys

import torch

import fxquant
from fxquant.folder import ImageFolder
from fxquant.metrics import agreement, kl_divergence, top1
from fxquant.networks import build, load_weights, preprocessing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="network of torchvision or timm")
    parser.add_argument("weights", help="its weights")
    parser.add_argument("calibration", help="folder of training images")
    parser.add_argument("test", help="folder of other images")
    parser.add_argument("--bits", type=int, default=4, help="of weights and activations (default: 4)")
    parser.add_argument("--images", type=int, default=1024, help="to calibrate with (default: 1024)")
    parser.add_argument("--limit", type=int, default=500, help="images to compare with (default: 500)")
    parser.add_argument("--recipe", default="fast", help="fast, or one that learns, for long on a CPU: standard (default: fast)")
    parser.add_argument("--device", default="cpu", help="where to work (default: cpu)")
    parser.add_argument("--num-classes", type=int, help="of the network (default: as published)")
    parser.add_argument("--out", help="keep the result in this file")
    options = parser.parse_args()

    # The architecture by name, its weights from the file, its own resizing and normalization.
    network = build(options.name, num_classes=options.num_classes)
    load_weights(network.model, options.weights)
    transform = preprocessing(network)

    # The images, the same ones in every run and equally many of each class.
    calibration = ImageFolder(options.calibration, transform, options.images)
    test = ImageFolder(options.test, transform, options.limit)

    qmodel = fxquant.quantize(
        network.model, calibration.loader(), w=options.bits, a=options.bits, recipe=options.recipe, device=options.device
    )
    if options.out:
        fxquant.save(qmodel, options.out)

    pairs = []
    with torch.inference_mode():
        for images, _ in test.loader():
            pairs.append((qmodel(images.to(options.device)).cpu(), network.model(images)))
    student, teacher = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    print(f"{len(test)} images: agreement {agreement(student, teacher):.2f} %, KL {kl_divergence(student, teacher).mean().item():.4f}")
    if test.labels is not None and len(test.classes) == teacher.shape[1]:
        print(f"top-1: float {top1(teacher, test.labels):.2f} %, {options.bits} bits {top1(student, test.labels):.2f} %")
    else:
        print(f"no top-1: {len(test.classes)} class folders, {teacher.shape[1]} classes")


if __name__ == "__main__":
    try:
        main()
    except fxquant.FxquantError as error:
        sys.exit(f"error: {error}")
