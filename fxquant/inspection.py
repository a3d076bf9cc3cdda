"""Is this a network that can be quantized, and is its graph the network?"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import ModelError, TraceError
from fxquant.graph import is_traced
from fxquant.tracing import trace
from fxquant.tracing.leaves import unwrap
from fxquant.tree import tensors_of


def check_network(model: nn.Module) -> nn.Module:
    """Return `model` without DataParallel and compiled wrappers.

    Raises:
        ModelError: it is no module, or a parameter is half precision, not finite, or on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"is a {type(model).__name__}, not an nn.Module", where="model", fix="Pass the network itself")
    model = unwrap(model)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_meta:
            raise ModelError("has no data (meta device)", where=name, fix="Load weights before quantizing")
        if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
            kind = str(value.dtype).removeprefix("torch.")
            raise ModelError(f"is {kind}; ranges are chosen in float32", where=name, fix="Pass model.float()")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ModelError("holds NaN or Inf", where=name, fix="Re-load the checkpoint")
    return model


def traced(model: nn.Module, images: Tensor) -> GraphModule:
    """Return the graph of `model`, checked to compute what `model` computes; a graph made by `fxquant.trace` is taken as it is.

    Args:
        model: the float network; not changed.
        images: a batch ``[N, C, H, W]`` on the device to work on.

    Raises:
        ModelError: a buffer changes during a forward pass in eval mode.
        TraceError: the network cannot be traced, or the graph gives other outputs than the network.
    """
    images = images[:4]
    if is_traced(model):
        graph = copy.deepcopy(model).eval()
        _check_buffers(copy.deepcopy(model), images)
        return graph
    graph = trace(model, images)
    probe = copy.deepcopy(model).eval()
    expected = tensors_of(_check_buffers(probe, images))
    with torch.no_grad():
        got = tensors_of(graph.to(images.device)(images))
    for mine, theirs in zip(got, expected, strict=True):
        if mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max())):
            raise TraceError(
                "its graph gives other outputs than the network itself",
                where=type(model).__name__,
                fix="Something in forward depends on values or on state that a graph cannot hold; "
                "keep that module opaque with fxquant.trace(model, example, leaf_modules=(...,)) and pass the result",
            )
    return graph


def _check_buffers(probe: nn.Module, images: Tensor) -> object:
    """Run `probe`, a copy, once in eval mode and return its output."""
    probe = probe.eval().to(images.device)
    before = {name: value.clone() for name, value in probe.named_buffers()}
    with torch.no_grad():
        output = probe(images)
    for name, value in probe.named_buffers():
        if name not in before or not torch.equal(before[name], value):
            raise ModelError(
                "changes during a forward pass in eval mode, so the quantized network would depend on what it saw before",
                where=f"buffer {name}",
                fix="Let forward leave buffers alone when self.training is False",
            )
    return output
