"""Freeze: store what is used."""

from __future__ import annotations

from torch.fx import GraphModule

from fxquant.graph import called, put_module
from fxquant.passes.insert_fake_quant import InsertFakeQuant
from fxquant.pipeline import Pass
from fxquant.quantizers.layers import QuantizedLayer


class Freeze(Pass):
    """Replace every weight by its quantized value, and make nothing trainable.

        W -> [quantizer] -> conv                    =>     Wq -> conv        (Wq = (codes - zero_point) * scale)

    Quantizing is idempotent, so the outputs stay bit-identical while a forward pass no longer quantizes weights.
    """

    after = (InsertFakeQuant,)
    preserves_output = True
    verb = "frozen"

    def run(self, gm: GraphModule) -> None:
        for node, module in list(called(gm)):
            if isinstance(module, QuantizedLayer) and not module.frozen:
                put_module(gm, str(node.target), module.freeze())
                self.changed()
