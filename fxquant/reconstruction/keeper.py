"""What a checkpoint of a learning run holds, and how a run goes on from it.

student.<path>.<field>      every quantized layer and activation quantizer, as learned so far
training.<name>             the inside of a network-wise stage (parameters, Adam's moments, what is kept so far and its errors)
state                       the stage, how many of its units or steps are done, and what its log says so far
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph import called, put_module, sharing_copy
from fxquant.pipeline import PassLog
from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.recipe import STAGES
from fxquant.reconstruction.checkpoint import Checkpoints

_STUDENT, _TRAINING = "student.", "training."

OVER = 2**62
"""More units or steps than any stage has: there is nothing left of it."""


class Keeper:
    """Writes checkpoints while stages learn, and skips what an earlier run has done.

    Args:
        checkpoints: where; None: nothing is written.
    """

    def __init__(self, checkpoints: Checkpoints | None):
        self.checkpoints = checkpoints
        loaded = checkpoints.load() if checkpoints else None
        self.tensors, self.state = loaded if loaded else ({}, {})
        self.logs: dict[str, dict[str, Any]] = dict(self.state.get("logs", {}))

    def is_over(self, stage: str) -> bool:
        """Say whether an earlier run was in a later stage."""
        reached = self.state.get("stage")
        return reached is not None and STAGES.index(reached) > STAGES.index(stage)

    def begin(self, stage: str, gm: GraphModule, log: PassLog) -> int:
        """Bring `gm` and `log` to where an earlier run left `stage`; return how many of its units or steps are done, `OVER` for
        an earlier stage than the one it was in."""
        reached = self.state.get("stage")
        if reached is None or STAGES.index(reached) < STAGES.index(stage):
            return 0
        former = self.logs.get(stage)
        if former is None:
            return OVER
        log.count, log.notes, log.skipped = former["count"], list(former["notes"]), [(where, why) for where, why in former["skipped"]]
        restore(gm, _under(_STUDENT, self.tensors))
        return OVER if self.is_over(stage) else int(former["done"])

    def training(self, stage: str) -> dict[str, Tensor] | None:
        """Return the inside of `stage` as it was saved, or None when it had not begun or is over."""
        found = _under(_TRAINING, self.tensors) if self.state.get("stage") == stage else {}
        return found or None

    def save(self, stage: str, done: int, gm: GraphModule, log: PassLog, training: Mapping[str, Tensor] | None = None) -> None:
        """Write where the run is: `done` units or steps of `stage` are over."""
        if not self.checkpoints:
            return
        self.skip(stage, log, done)
        tensors = {_STUDENT + name: value for name, value in state_of(gm).items()}
        tensors |= {_TRAINING + name: value for name, value in (training or {}).items()}
        self.checkpoints.save(tensors, {"stage": stage, "done": done, "logs": self.logs})

    def skip(self, stage: str, log: PassLog, done: int = OVER) -> None:
        """Note that `stage` is over, as there was nothing to learn; the next `save` writes it."""
        self.logs[stage] = {"done": done, "count": log.count, "notes": list(log.notes), "skipped": list(log.skipped)}

    def finished(self) -> None:
        """Delete the checkpoint: the run has its result."""
        if self.checkpoints:
            self.checkpoints.remove()


def state_of(gm: GraphModule) -> dict[str, Tensor]:
    """Return all that learning changes: weights, biases, scales and zero-points of quantized layers and of activation quantizers."""
    state: dict[str, Tensor] = {}
    for node, module in called(gm):
        if isinstance(module, QuantizedLayer):
            state |= {f"{node.target}.weight": module.weight, f"{node.target}.weight_quantizer.scale": module.weight_quantizer.scale}
            state[f"{node.target}.weight_quantizer.zero_point"] = module.weight_quantizer.zero_point
            if module.bias is not None:
                state[f"{node.target}.bias"] = module.bias
        elif isinstance(module, UniformQuantizer):
            state |= {f"{node.target}.scale": module.scale, f"{node.target}.zero_point": module.zero_point}
            state[f"{node.target}.signed"] = torch.tensor(module.spec.signed)
    return state


def restore(gm: GraphModule, state: Mapping[str, Tensor]) -> None:
    """Put modules with the values of `state` into `gm`."""
    for node, module in list(called(gm)):
        path = str(node.target)
        if isinstance(module, QuantizedLayer):
            new = sharing_copy(module if module.input_scale is None else module.freeze())
            new.weight_quantizer = _quantizer(module.weight_quantizer, state, f"{path}.weight_quantizer")
            weight = torch.empty_like(module.weight).copy_(state[f"{path}.weight"])  # in its memory format: kernels differ by it
            new.weight = nn.Parameter(weight, requires_grad=False)
            if f"{path}.bias" in state:
                new.bias = nn.Parameter(state[f"{path}.bias"].to(module.weight), requires_grad=False)
            put_module(gm, path, new)
        elif isinstance(module, UniformQuantizer):
            put_module(gm, path, _quantizer(module, state, path))


def _quantizer(module: UniformQuantizer, state: Mapping[str, Tensor], path: str) -> UniformQuantizer:
    grid = state[f"{path}.scale"].to(module.scale), state[f"{path}.zero_point"].to(module.scale)
    signed = bool(state.get(f"{path}.signed", torch.tensor(module.spec.signed)))  # those of activations may have been chosen again
    return module.with_grid(*grid) if signed == module.spec.signed else UniformQuantizer(replace(module.spec, signed=signed), *grid)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
