"""What an exported file is compared by, and what is told about it.

Another runtime adds in another order, so a value that falls between two levels of a quantizer may land on the other one, and at two bits
such a step is felt by everything behind it. So the outputs are held to what torch itself does when the inputs of its quantizers move by
one rounding error, image by image, and the median image counts: ties touch some images, a wrong file touches all.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import ConfigError, ExportError, first_line
from fxquant.files import write_whole
from fxquant.graph import called, precision_of
from fxquant.quantizers import LogQuantizer, UniformQuantizer
from fxquant.record import Record
from fxquant.tracing.leaves import unwrap
from fxquant.tree import is_logits, tensors_of

ROUNDING = 1e-5
"""Over the root mean square of a tensor: some times what float32 sums of another order are apart, so that ties are met for sure.

One tie is enough: behind it the errors of a deep network grow to the same size whatever started them.
"""
MOST_ERROR = 1e-2
"""The relative error of an image that needs no explanation by ties: a runtime may compute 8-bit layers, and their biases, in integers."""


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how near its outputs are to those of the network it was made from.

    Args:
        path: the file; the object itself may be used as a path.
        size: bytes of the file.
        opset: of an ONNX file, else None.
        batches: the batch sizes that were compared.
        max_difference: the largest difference of an output.
        relative_error: root mean square of the differences over that of the outputs.
        agreement: share of images with the same arg-max; None where the output is not ``[N, C]``.
    """

    path: Path
    size: int
    opset: int | None
    batches: tuple[int, ...]
    max_difference: float
    relative_error: float
    agreement: float | None

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        opset = "" if self.opset is None else f", opset {self.opset}"
        agreement = "" if self.agreement is None else f", same arg-max {self.agreement:.2%}"
        return (
            f"{self.path}: {self.size:,} bytes{opset}, differs by at most {self.max_difference:.3g} "
            f"(relative {self.relative_error:.2g}){agreement}; batches of {' and '.join(map(str, self.batches))} images"
        )


def exportable(qmodel: nn.Module, path: str | os.PathLike[str]) -> tuple[GraphModule, Path]:
    """Return a copy of the quantized network on the CPU, and the path, both checked.

    Raises:
        ModelError: `qmodel` carries no record of a quantization.
        ExportError: the folder of `path` is missing, or `path` is a folder.
    """
    Record.from_module(qmodel)
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportError("its folder is missing", where=str(path), fix=f"Make {path.parent} first")
    if path.is_dir():
        raise ExportError("is a folder", where=str(path), fix="Name a file in it")
    network = copy.deepcopy(unwrap(qmodel)).cpu().eval()
    assert isinstance(network, GraphModule)
    return network, path


def batches_of(network: GraphModule, images: Tensor | None, count: int = 4) -> list[Tensor]:
    """Return two batches to compare on: all images, and the first alone.

    Args:
        network: the quantized network.
        images: normalized images ``[N, C, H, W]``; None: `count` random ones, always the same.

    Raises:
        ConfigError: the images are not of the shape that the network was calibrated with.
    """
    record = Record.from_module(network)
    shape = record.input_shape
    dtype = precision_of(network)
    if images is None:
        images = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    if not isinstance(images, Tensor) or images.ndim != len(shape) + 1 or images.shape[1:] != shape or len(images) == 0:
        given = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ConfigError(f"images is {given}, the network was calibrated with [N, {', '.join(map(str, shape))}]", fix="Give such a tensor")
    images = images.detach().to("cpu", dtype)
    return [images if len(images) > 1 else images.repeat(2, *[1] * len(shape)), images[:1]]


def captured(network: GraphModule, images: Tensor, where: str) -> torch.export.ExportedProgram:
    """Return `network` as torch.export captures it, for any number of images.

    Raises:
        ExportError: torch.export refuses.
    """
    try:
        with torch.no_grad():
            return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    except Exception as error:  # it raises of many kinds, not all public
        raise ExportError(
            f"is not captured by torch.export: {first_line(error)}",
            where=where,
            fix="Write what it names without control flow on values, and for any batch size",
        ) from error


def image_errors(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> Tensor:
    """Return the relative error of every image, the worst of all outputs."""
    errors = [torch.zeros(1, dtype=torch.float64)]
    for a, b in zip(wanted, got, strict=True):
        a, b = a.double(), b.double()
        difference = (a - b).flatten(1).square().mean(1).sqrt() if a.ndim > 1 else (a - b).abs()
        errors.append(difference / a.square().mean().sqrt().clamp_min(1e-30))
    rows = max(map(len, errors))
    return torch.stack([error.expand(rows) if len(error) == 1 else error for error in errors]).amax(0)


@torch.no_grad()
def rounding_errors(network: GraphModule, images: Tensor, wanted: Sequence[Tensor]) -> Tensor:
    """Return the relative error of every image when all inputs of quantizers move by about one rounding error."""
    moved = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)

    def move(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = inputs
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.dtype)
        size = x if isinstance(module, LogQuantizer) else x.square().mean().sqrt()  # a softmax rounds each value at its own size
        return (x + ROUNDING * size * noise,)

    for _, module in called(moved):
        if isinstance(module, UniformQuantizer | LogQuantizer):
            module.register_forward_pre_hook(move)
    return image_errors(wanted, tensors_of(moved(images)))


def compare(path: Path, network: GraphModule, batches: Sequence[Tensor], outputs: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
    """Return the fields of `Exported` that say how near `outputs`, those of the file, are to the network's.

    Raises:
        ExportError: they are farther than ties explain, or of another shape.
    """
    errors, largest, square, norm, same = [], 0.0, 0.0, 0.0, []
    for batch, got in zip(batches, outputs, strict=True):
        with torch.no_grad():
            wanted = tensors_of(network(batch.clone()))
        shapes = [list(value.shape) for value in wanted], [list(value.shape) for value in got]
        if shapes[0] != shapes[1]:
            raise ExportError(f"gives shapes {shapes[1]} for {len(batch)} images, not {shapes[0]}", where=str(path), fix=REPORT)
        errors.append(image_errors(wanted, got))
        for a, b in zip(wanted, got, strict=True):
            difference = (a.double() - b.double()).abs()
            largest = max(largest, difference.max().item() if difference.numel() else 0.0)
            square, norm = square + difference.square().sum().item(), norm + a.double().square().sum().item()
        if len(wanted) == 1 and is_logits(wanted[0]):
            same.append(wanted[0].argmax(1) == got[0].argmax(1))
        if not torch.cat([value.flatten().double() for value in got]).isfinite().all():
            raise ExportError("gives values that are not finite", where=str(path), fix=REPORT)
    median = torch.cat(errors).median().item()
    if median > MOST_ERROR:
        with torch.no_grad():
            own = rounding_errors(network, batches[0], tensors_of(network(batches[0].clone())))
        if median > max(MOST_ERROR, 2 * own.max().item()):
            raise ExportError(f"computes other values: relative error {median:.2g} of an image", where=str(path), fix=REPORT)
    return {
        "batches": tuple(len(batch) for batch in batches),
        "max_difference": largest,
        "relative_error": (square / max(norm, 1e-60)) ** 0.5,
        "agreement": torch.cat(same).double().mean().item() if same else None,
    }


REPORT = "No file was written. Please report the network and the versions of torch and of the runtime"


def write(path: Path, content: bytes) -> None:
    """Write a whole file or none.

    Raises:
        ExportError: the operating system refuses.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise ExportError(
            f"cannot be written: {error}", where=str(path), fix="Check the folder, its permissions and the free space"
        ) from error
