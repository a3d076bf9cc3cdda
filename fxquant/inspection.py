"""Is this a network that can be quantized, and is its graph the network?"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy

from fxquant.errors import CalibrationError, ConfigError, FxquantWarning, ModelError, TraceError, first_line
from fxquant.graph import deep_copy, is_traced
from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.tracing import copied, trace
from fxquant.tracing.leaves import unwrap
from fxquant.tree import tensors_of

FINITE = ("running_mean", "running_var", "weight", "bias")
"""Names of buffers that are finite in a sound network, as those of (frozen) norms; others may be masks and bounds."""


def check_network(model: nn.Module, architecture: bool = False) -> nn.Module:
    """Return `model` without DataParallel and compiled wrappers.

    Args:
        model: what a user gave.
        architecture: only its structure matters, its values may be anything.

    Raises:
        ModelError: it is no module, is quantized already, is a graph of torch.export, or a parameter is half precision, not finite, without
            a shape, or on the meta device; buffers that are not of norms may be infinite: masks and bounds are.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"is a {type(model).__name__}, not an nn.Module", where="model", fix="Pass the network itself")
    model = unwrap(model)
    if any(isinstance(module, QuantizedLayer | UniformQuantizer) for module in model.modules()):
        raise ModelError("is quantized already", where=type(model).__name__, fix="Pass the float network, with other bits or overrides")
    if isinstance(model, GraphModule) and _is_exported(model):
        raise ModelError(
            "is a graph of torch.export, in whose operations layers cannot be told",
            where=type(model).__name__,
            fix="Pass the nn.Module that it was exported from",
        )
    buffers = dict(model.named_buffers())
    for name, value in [*model.named_parameters(), *buffers.items()]:
        if value.is_meta:
            raise ModelError("has no data (meta device)", where=name, fix="Load weights before quantizing")
        if is_lazy(value):
            raise ModelError("has no shape yet (lazy)", where=name, fix="Run one batch through the network first")
        kind = str(value.dtype).removeprefix("torch.")
        if value.is_complex() and value.dtype != torch.complex64:
            raise ModelError(f"is {kind}, which cannot be stored", where=name, fix="Make it complex64")
        if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
            raise ModelError(f"is {kind}; ranges are chosen in float32", where=name, fix="Pass model.float()")
        if not architecture and (value.is_floating_point() or value.is_complex()):
            may_be_infinite = name in buffers and name.rpartition(".")[2] not in FINITE
            if bool((value.isnan() if may_be_infinite else ~value.isfinite()).any()):
                raise ModelError(f"holds NaN{'' if may_be_infinite else ' or Inf'}", where=name, fix="Re-load the checkpoint")
    kinds = {value.dtype: name for name, value in model.named_parameters() if value.is_floating_point()}
    if len(kinds) > 1:
        named = " and ".join(f"{name} {str(dtype).removeprefix('torch.')}" for dtype, name in kinds.items())
        raise ModelError(f"mixes precisions: {named}", where=type(model).__name__, fix="Pass model.float()")
    return model


def _is_exported(gm: GraphModule) -> bool:
    """Say whether all that `gm` calls are operations of aten, as in the graphs of torch.export, and modules without weights."""
    calls = [node.target for node in gm.graph.nodes if node.op == "call_function" and node.target is not operator.getitem]
    layers = any(True for node in gm.graph.nodes if node.op == "call_module" for _ in gm.get_submodule(str(node.target)).parameters())
    return bool(calls) and not layers and all(isinstance(call, torch._ops.OpOverload) for call in calls)


def working_device(model: object, device: torch.device | str | None) -> torch.device:
    """Return `device`, tried; None: where the weights of `model` are, the CPU where it shows none.

    Raises:
        ConfigError: there is no such device here, or it has no float64.
    """
    fix = "Use 'cpu', or leave it out"
    if device is None:
        values = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        device, fix = next((value.device for value in values), torch.device("cpu")), "Use 'cpu'"
        if device.type == "meta":
            return device
    try:
        chosen = torch.zeros(1, device=device, dtype=torch.float64).device  # in which ranges are searched, and which not all devices have
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigError(f"{str(device)!r} cannot be used: {first_line(error)}", where="device", fix=fix) from error
    if chosen.type == "meta":
        raise ConfigError("'meta' holds no data", where="device", fix="Use 'cpu', or leave it out")
    return chosen


def traced(model: nn.Module, images: Tensor) -> GraphModule:
    """Return the graph of `model`, checked to compute what `model` computes; a graph made by `fxquant.trace` is taken as it is.

    Args:
        model: the float network; not changed.
        images: a batch ``[N, C, H, W]`` on the device to work on.

    Raises:
        CalibrationError: the network itself fails on the images.
        ModelError: a buffer changes during a forward pass in eval mode.
        TraceError: the network cannot be traced, or the graph gives other outputs than the network.
    """
    images = images[:4]
    if isinstance(model, GraphModule) and is_traced(model):
        example = next(node for node in model.graph.nodes if node.op == "placeholder").meta["val"]
        if example.shape[1:] != images.shape[1:]:
            raise CalibrationError(
                f"has images of shape {list(images.shape[1:])}, the graph was traced for {list(example.shape[1:])}",
                where="calib_loader",
                fix="Call fxquant.trace with one of these images",
            )
        _check_buffers(model, images)
        return deep_copy(model).eval()
    try:
        graph = trace(model, images)
    except TraceError:
        with contextlib.suppress(TypeError):  # forward takes other arguments than one batch: tracing says it best
            _check_buffers(model, images)
        raise
    output = _check_buffers(model, images)
    with torch.no_grad():
        made = graph.to(images.device)(images.clone())
    if isinstance(output, dict) and type(output) not in (dict, OrderedDict):
        text = f"the network returns a {type(output).__name__}, its graph a dict: read output['name'], not output.name"
        warnings.warn(FxquantWarning(text), stacklevel=3)
    expected = tensors_of(output)
    for mine, theirs in zip(tensors_of(made), expected, strict=True):
        if not _agree(mine, theirs):
            with torch.no_grad():
                again = tensors_of(_probe(model, images)(images.clone()))
            if not all(map(_agree, again, expected)):
                raise TraceError(
                    "gives other outputs each time, in eval mode",
                    where=type(model).__name__,
                    fix="Let it draw nothing at random: F.dropout takes training=self.training, attention dropout_p=0.0 in eval mode",
                )
            raise TraceError(
                "its graph gives other outputs than the network itself",
                where=type(model).__name__,
                fix="Something in forward depends on values or on state that a graph cannot hold; "
                "keep that module opaque with fxquant.trace(model, example, leaf_modules=(...,)) and pass the result",
            )
    return graph


@torch.no_grad()
def check_writes(graph: GraphModule, images: Tensor) -> None:
    """Raise ModelError where a prepared graph writes into its images ``[N, C, H, W]`` and gives other outputs for what is then in them."""
    given = images.clone()
    output = graph(given)
    if not torch.equal(given, images) and not all(map(torch.equal, tensors_of(graph(given)), tensors_of(output))):
        raise ModelError(
            "writes into its images, so that a second pass over them gives other outputs",
            where=type(graph).__name__,
            fix="Begin forward with x = x.clone(), or write into a new tensor",
        )


def _agree(mine: Tensor, theirs: Tensor) -> bool:
    """Say whether two outputs are equal up to rounding: classes and masks may differ for one value in a thousand."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return False
    if not (theirs.is_floating_point() or theirs.is_complex()):
        return bool((mine != theirs).sum() <= theirs.numel() / 1000)
    return torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()) if theirs.numel() else 0.0)


def _check_buffers(model: nn.Module, images: Tensor) -> object:
    """Return the output of a copy of `model` in eval mode; what it works out in its first forward pass from no image is no state."""
    probe, others = _probe(model, images), 0.5 - 2 * images
    output, changed = _changed_buffer(probe, images)
    if changed:  # the same buffers on other images, and never again
        other = _probe(model, images)
        _changed_buffer(other, others)
        values = dict(other.named_buffers())
        differing = (name for name, value in probe.named_buffers() if name not in values or not torch.equal(values[name], value))
        changed = next(differing, "") or _changed_buffer(probe, others)[1]
    if changed:
        raise ModelError(
            "changes during a forward pass in eval mode, so the quantized network would depend on what it saw before",
            where=f"buffer {changed}",
            fix="Let forward leave buffers alone when self.training is False",
        )
    return output


def _probe(model: nn.Module, images: Tensor) -> nn.Module:
    return copied(model).eval().to(images.device)


def _changed_buffer(probe: nn.Module, images: Tensor) -> tuple[object, str]:
    """Run `probe` and return its output and the name of a buffer that this changed, empty where none did."""
    before = {name: value.clone() for name, value in probe.named_buffers()}
    try:
        with torch.no_grad():
            output = probe(images.clone())  # some write into them
    except (RuntimeError, ValueError, AssertionError) as error:
        raise CalibrationError(
            f"{type(probe).__name__} fails on images of shape {list(images.shape[1:])}: {first_line(error)}",
            where="calib_loader",
            fix="Pass images with the channels and the size that the network was built for",
        ) from error
    changed = (name for name, value in probe.named_buffers() if name not in before or not torch.equal(before[name], value))
    return output, next(changed, "")
