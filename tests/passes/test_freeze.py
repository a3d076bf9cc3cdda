"""Freeze: weights become integers, and layers sum integers where what they read lies on a grid."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import apply, images
from test_insert_fake_quant import quantized

from fxquant.graph import called, fork, put_module
from fxquant.passes import Freeze
from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.affine import with_16_bits
from fxquant.quantizers.layers import QuantizedLayer

NETS = ["residual", "transposed", "one_dimension", "linear_norm", "norm_act"]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("w", [2, 8])
def test_integers_of_weights(name, w):
    _, _, gm, _, plan = quantized(name, w, 3)
    longer = sum(not torch.equal(part.scale, with_16_bits(part.scale)) for _, part in called(gm) if isinstance(part, UniformQuantizer))
    new, log = apply(gm, Freeze())
    same_scales = fork(gm)
    for node, part in called(gm):
        if isinstance(part, UniformQuantizer):
            put_module(same_scales, str(node.target), part.with_grid(with_16_bits(part.scale), part.zero_point))
    x = images(5).double()
    torch.testing.assert_close(copy.deepcopy(new).double()(x), same_scales.double()(x), rtol=1e-6, atol=1e-6)
    assert log.count == sum(layer.w is not None for layer in plan.layers.values()) + longer
    for node, part in called(new):
        if isinstance(part, QuantizedLayer):
            before = gm.get_submodule(str(node.target))
            assert part.frozen and not before.frozen
            assert torch.equal(part.weight, before.integers())
            assert torch.equal(part.codes(), before.codes())
            assert torch.equal(part.used_weight(), before.used_weight())
            assert not any(value.requires_grad for value in part.parameters())
            assert before.weight.requires_grad


@pytest.mark.parametrize("name", NETS)
def test_layers_know_the_step_of_what_they_read(name):
    new, _ = apply(quantized(name, 4, 4, edges="same")[2], Freeze())
    seen = dict[str, torch.Tensor]()
    for node, part in called(new):
        if isinstance(part, QuantizedLayer):
            part.register_forward_pre_hook(lambda part, given, name=str(node.target): seen.update({name: given[0]}))
    new(images(5))
    linked = 0
    for name, x in seen.items():
        step = new.get_submodule(name).input_scale
        if step is None:
            assert len((x / x.abs().max()).unique()) > 5  # an image, or means over a map
        else:
            linked += 1
            assert len(x.unique()) <= 16
            assert torch.equal((x / step).round() * step, x)  # the product is exact: scales have 16 bits
    assert linked


def test_scales_of_tensors_have_sixteen_bits():
    new, _ = apply(quantized("residual", 4, 4)[2], Freeze())
    for _, part in called(new):
        if isinstance(part, UniformQuantizer):
            mantissa = torch.frexp(part.scale).mantissa * 2**16
            assert torch.equal(mantissa, mantissa.round())


def test_a_second_run_changes_nothing():
    once, _ = apply(quantized("residual", 4, 4)[2], Freeze())
    twice, log = apply(once, Freeze())
    assert log.count == 0
    assert torch.equal(once(images(5)), twice(images(5)))


def test_the_batch_does_not_matter():
    """Sums of integers are exact, so what is quantized does not depend on how they are added."""
    for bits in (2, 8):
        new, _ = apply(quantized("residual", bits, bits, edges="integer")[2], Freeze())
        together, alone = codes_of(new, images(5)), [codes_of(new, image) for image in images(5).split(1)]
        assert len(together) >= 5
        for name, values in together.items():
            assert torch.equal(values, torch.cat([each[name] for each in alone]))


def codes_of(gm, x):
    """Return what every quantizer of activations gives."""
    values = torch.fx.Interpreter(gm)
    values.garbage_collect_values = False
    values.run(x)
    return {node.name: values.env[node] for node, part in called(gm) if isinstance(part, UniformQuantizer)}


def test_a_float_graph_is_left_alone():
    _, observed, _, _, _ = quantized("chain")
    assert apply(observed, Freeze())[0] is observed
