"""Freeze: weights become integers, and layers sum integers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.graph import called, put_module
from fxquant.grids import carried_grids
from fxquant.passes.insert_fake_quant import InsertFakeQuant
from fxquant.pipeline import Pass
from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.affine import with_16_bits
from fxquant.quantizers.layers import QuantizedLayer


class Freeze(Pass):
    """Replace every weight by its integers, let layers sum integers where their inputs lie on a grid, and make nothing trainable.

        x = s_x u,  W -> [quantizer] -> conv        =>     u, N -> conv -> * s_x -> * s_w -> + b        (Wq = s_w N)

    A forward pass no longer quantizes weights. Sums of integers are exact, and the scales of tensors are rounded to 16 bits, so that what
    comes out is what `LowerInteger` computes on the CPU, to the bit. A frozen network is only linked again: its layers learn the grids of
    what they read.
    """

    after = (InsertFakeQuant,)
    preserves_output = False  # by the rounding of the scales; a value on the border of two codes can fall to the other side
    verb = "frozen"

    def run(self, gm: GraphModule) -> None:
        steps = {}
        for node, module in list(called(gm)):
            if isinstance(module, UniformQuantizer):
                scale = with_16_bits(module.scale)
                if not torch.equal(scale, module.scale):
                    put_module(gm, str(node.target), module.with_grid(scale, module.zero_point))
                    self.changed()
                if module.spec.axis is None:
                    steps[node] = scale
        steps = carried_grids(gm, steps)  # LowerInteger's own walk, so that both mean the same layers
        for node, module in list(called(gm)):
            if isinstance(module, QuantizedLayer):
                step = steps.get(node.all_input_nodes[0])
                if not module.frozen or not _are_equal(module.input_scale, step):
                    put_module(gm, str(node.target), module.freeze(step))
                    self.changed()


def _are_equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
