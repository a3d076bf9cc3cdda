"""Deployment: a quantized network whose layers compute on integers."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torch.fx import GraphModule

from fxquant.deploy import cpu, cuda, vnni
from fxquant.deploy.bytes import cast_images
from fxquant.errors import ConfigError, FxquantWarning, ModelError, one_of
from fxquant.graph import deep_copy, device_of
from fxquant.passes import LowerInteger
from fxquant.passes.lower_integer import Backend
from fxquant.pipeline import PassLog, Pipeline
from fxquant.record import Record
from fxquant.tracing.leaves import unwrap

BACKENDS = ("cpu", "cuda")


def lower(qmodel: nn.Module, backend: str = "cpu", *, pack: bool = False) -> GraphModule:
    """Return a quantized network that computes on integers; `qmodel` is not touched.

    It takes images of any batch size, of other sizes as far as the network does, and in half precision too (they become float32). Weights
    are bytes, tensors between layers are bytes, sums are exact, and every rounding is that of the simulation, which sums integers as well:
    on the CPU layers of bytes give the same bytes, to the bit (as long as the sums stay below 2^24, where float32 holds them). Only what
    is summed in floats (a first layer that reads float images, means over maps) may differ in its last bit, and a value on the border of
    two codes then falls to the other side. `fxquant.compile` makes it fast. It cannot be saved: save the simulation, and lower what
    `fxquant.load` returns.

    What cannot be lowered stays simulated; ``print(fxquant.report(lowered))`` names it with the reason. Where the machine cannot run
    integers at all, the simulation comes back, with a warning that says why.

    Args:
        qmodel: what `fxquant.quantize` or `fxquant.load` returned, in float32.
        backend: ``"cpu"``: x86 with VNNI, through oneDNN; for one image through fxquant's own kernels, on Linux with AVX-512 VNNI, without
            AMX and with a C++ compiler (the first call on a machine compiles them; layers keep their weights for both). ``"cuda"``: int8
            tensor cores. The result is on that device.
        pack: keep weights of up to 2 and 4 bits in as many, and unpack them in the kernel (``"cuda"`` alone): less memory to read.

    Raises:
        ConfigError: an unknown backend, or `pack` where it cannot be.
        ModelError: `qmodel` was not made by fxquant, is lowered already, is not float32, or has no quantized layer that reads a quantized
            tensor.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"{backend!r} is not known", where="backend", fix=one_of(backend, BACKENDS))
    if pack and backend != "cuda":
        raise ConfigError(f"backend {backend!r} has kernels for bytes alone", where="pack", fix="Use pack=False, or backend='cuda'")
    record = copy.deepcopy(Record.from_module(qmodel))
    gm = unwrap(qmodel)
    assert isinstance(gm, GraphModule)
    dtypes = {value.dtype for value in gm.parameters() if value.is_floating_point()}
    if dtypes - {torch.float32}:
        raise ModelError(f"has weights in {dtypes.pop()}", where=type(gm).__name__, fix="Lower the network in float32")
    reason = cpu.unavailable() if backend == "cpu" else cuda.unavailable()
    if reason is not None:
        warnings.warn(f"backend {backend!r}: the simulation comes back, in floats: {reason}.", FxquantWarning, stacklevel=2)
        gm = deep_copy(gm)
        cast_images(gm)
        log = PassLog(LowerInteger.name(), LowerInteger.verb, skipped=[("the network", reason)])
        record.passes.append(log)
        record.attach(gm)
        return gm.eval()
    device = device_of(gm)
    if device is not None and device.type != backend:
        gm = deep_copy(gm).to(backend)
    engine: Backend = cpu.CpuBackend() if backend == "cpu" else cuda.CudaBackend(pack=pack)
    lowering = LowerInteger(engine)
    lowered = Pipeline([lowering]).run(gm)
    if not lowering.log.count:
        reasons = "; ".join(f"{where}: {why}" for where, why in lowering.log.skipped[:3])
        fix = 'Quantize weights and activations, images too: w=8, a=8, edges="integer"'
        raise ModelError(f"has nothing to lower ({reasons})", where=type(gm).__name__, fix=fix)
    if backend == "cpu" and (why := vnni.unavailable()) is not None:
        lowering.note(f"single images run on oneDNN, as batches do: {why}")
    record.passes.append(lowering.log)
    record.lowered = backend
    record.attach(lowered)
    return lowered.eval()
