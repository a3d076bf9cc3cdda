"""Freeze: weights become integers, and layers sum integers."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from fxquant.deploy.moves import carried_grids
from fxquant.graph import called, put_module
from fxquant.passes.insert_fake_quant import InsertFakeQuant
from fxquant.pipeline import Pass
from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.affine import short
from fxquant.quantizers.layers import QuantizedLayer


class Freeze(Pass):
    """Replace every weight by its integers, let layers sum integers where their inputs lie on a grid, and make nothing trainable.

        x = s_x u,  W -> [quantizer] -> conv        =>     u, N -> conv -> * s_x -> * s_w -> + b        (Wq = s_w N)

    A forward pass no longer quantizes weights. Sums of integers are exact, and the scales of tensors are rounded to 16 bits, so that what
    comes out is what `LowerInteger` computes, to the bit. A frozen network is only linked again: its layers learn the grids of what they
    read.
    """

    after = (InsertFakeQuant,)
    preserves_output = False  # by the rounding of the scales; a value on the border of two codes can fall to the other side
    verb = "frozen"

    def run(self, gm: GraphModule) -> None:
        steps = {}
        for node, module in list(called(gm)):
            if isinstance(module, UniformQuantizer):
                scale = short(module.scale)
                if not torch.equal(scale, module.scale):
                    put_module(gm, str(node.target), UniformQuantizer(module.spec, scale, module.zero_point))
                    self.changed()
                if module.spec.axis is None:
                    steps[node] = scale
        steps = carried_grids(gm, steps)
        for node, module in list(called(gm)):
            if isinstance(module, QuantizedLayer):
                step = steps.get(node.all_input_nodes[0])
                linked = (
                    module.input_scale is None if step is None else module.input_scale is not None and torch.equal(module.input_scale, step)
                )
                if not (module.frozen and linked):
                    put_module(gm, str(node.target), module.freeze(step))
                    self.changed()
