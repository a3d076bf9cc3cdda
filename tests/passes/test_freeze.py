"""Freeze: what is stored is what is used, bit for bit."""

from __future__ import annotations

import pytest
import torch
from nets import apply, images
from test_insert_fake_quant import quantized

from fxquant.graph import called
from fxquant.passes import Freeze
from fxquant.quantizers.layers import QuantizedLayer


@pytest.mark.parametrize("name", ["residual", "transposed", "one_dimension", "linear_norm", "norm_act"])
@pytest.mark.parametrize("w", [2, 8])
def test_bit_identical(name, w):
    _, _, gm, _, plan = quantized(name, w, 3)
    new, log = apply(gm, Freeze())
    assert torch.equal(gm(images(5)), new(images(5)))
    assert log.count == sum(layer.w is not None for layer in plan.layers.values())
    for node, part in called(new):
        if isinstance(part, QuantizedLayer):
            before = gm.get_submodule(str(node.target))
            assert part.frozen and not before.frozen
            assert torch.equal(part.weight, before.weight_quantizer(before.weight))
            assert torch.equal(part.weight, part.weight_quantizer(part.weight))
            assert torch.equal(part.codes(), before.codes())
            assert not any(value.requires_grad for value in part.parameters())
            assert before.weight.requires_grad


def test_a_float_graph_is_left_alone():
    _, observed, _, _, _ = quantized("chain")
    assert apply(observed, Freeze())[0] is observed
