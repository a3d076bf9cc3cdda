"""A quantized network as a ``.pt2`` file of torch.export: a graph of plain ops with any batch size, that needs torch and nothing else."""

from __future__ import annotations

import io
import os
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.deploy.exported import Exported, batches_of, captured, compare, exportable, write
from fxquant.errors import ExportError, first_line
from fxquant.tree import tensors_of


def export_pt2(qmodel: nn.Module, path: str | os.PathLike[str], *, images: Tensor | None = None) -> Exported:
    """Write a quantized network with torch.export, atomically, after it was loaded again and compared.

    The graph holds the ops of `qmodel`, so its outputs are bit-identical (`Exported.max_difference` is 0) where torch gives equal ops
    equal results; some of its kernels round by where a tensor lies in memory. Weights are integers in floats: the file is as
    large as that of the float network, and `fxquant.save` writes the small one.

    Args:
        qmodel: what `fxquant.quantize` or `fxquant.load` returned.
        path: the file; an existing one is replaced in one step, and stays as it was when anything fails.
        images: normalized images ``[N, C, H, W]`` to compare on; None: four random ones, always the same.

    Raises:
        ModelError: `qmodel` carries no record of a quantization.
        ConfigError: `images` are not what the network takes.
        ExportError: torch.export refuses the network, the folder is missing, or the file does not compute what the network does.
    """
    network, path = exportable(qmodel, path)
    batches = batches_of(network, images)
    exported = captured(network, batches[0], str(path))
    try:
        buffer = io.BytesIO()
        torch.export.save(exported, buffer)
        content = buffer.getvalue()
        loaded: Any = torch.export.load(io.BytesIO(content)).module()
        with torch.no_grad():
            outputs = [tensors_of(loaded(batch.clone())) for batch in batches]
    except Exception as error:  # torch.export raises of many kinds, not all public
        raise ExportError(
            f"does not come back from torch.export.save: {first_line(error)}",
            where=str(path),
            fix="No file was written. Please report the network and the version of torch",
        ) from error
    found = compare(path, network, batches, outputs)
    write(path, content)
    return Exported(path, len(content), None, **found)
