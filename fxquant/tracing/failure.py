"""What went wrong during a trace, said in terms of the user's module, file and line."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from fxquant.errors import TraceError

from .tracer import ValueTracer
from .values import BatchSpecialized

_HIDDEN = tuple(str(Path(file).parent) + os.sep for file in (torch.__file__, __file__))
_ADVICE = "Keep it opaque and float with fxquant.trace(model, example, leaf_modules=({},)) and hand the result to fxquant.quantize"


def explain(error: Exception, tracer: ValueTracer, example: Tensor) -> TraceError:
    """The `TraceError` for an exception that left the forward pass of `tracer.root`."""
    stack = [(path, tracer.root.get_submodule(path)) for path, _ in tracer.module_stack.values()]
    path, module = stack[-1]
    frame = _user_frame(error)
    place = f"{path or 'the model'} ({type(module).__name__})" + (f" at {frame.filename}:{frame.lineno}" if frame else "")
    problem, fix = _diagnose(error, module, example, tracer.batch_symbol)
    if fix is None:
        own = [type(m).__name__ for p, m in reversed(stack) if p and not type(m).__module__.startswith("torch.nn.")]
        fix = _ADVICE.format(own[0]) if own else "Write this part of forward with torch functions on tensors"
    return TraceError(problem, where=place, fix=fix)


def _diagnose(error: Exception, module: nn.Module, example: Tensor, batch_symbol: str) -> tuple[str, str | None]:
    message = (str(error).strip() or type(error).__name__).splitlines()[0].replace(batch_symbol, "N")
    if isinstance(error, BatchSpecialized):
        return message, "Use x.shape[0] as it is, or -1 in view and expand; a graph for one batch size only is not made"
    if isinstance(error, DataDependentOutputException):
        return f"Python control flow or a Python number depends on the values of a tensor ({message})", None
    if isinstance(error, DynamicOutputShapeException):
        return f"the shape of a result depends on the values of a tensor ({message})", None
    if "TorchScript" in message:
        return "a TorchScript function is called, whose operations cannot be seen", "Call the Python function it was made from"
    weights = {parameter.dtype for parameter in module.parameters()}
    if ("dtype" in message or "type (" in message) and weights and example.dtype not in weights:
        return f"{message} (the example is {example.dtype})", f"Pass example.to({weights.pop()})"
    if isinstance(module, nn.modules.conv._ConvNd) and "channels" in message:
        shape, channels = list(example.shape), module.in_channels
        return (
            f"{message} (the example is {shape}, {type(module).__name__} takes {channels} channels)",
            f"Pass an example with the number of channels the network was built for, or build it for {example.shape[1]}"
            if example.dim() > 1
            else "Pass an example [N, C, H, W]",
        )
    if isinstance(error, TypeError) and "forward()" in message:
        return message, "Wrap the model in a module whose forward takes one batch of images and passes the rest itself"
    return f"{type(error).__name__}: {message}", None


def _user_frame(error: Exception) -> traceback.FrameSummary | None:
    """The innermost frame outside torch and this package; inside torch's own networks parts there may be none."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((f for f in reversed(frames) if not f.filename.startswith(_HIDDEN)), None)
