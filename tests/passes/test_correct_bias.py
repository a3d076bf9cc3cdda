"""CorrectBias: after it, every output channel has the moments it has in the float network."""

from __future__ import annotations

import pytest
import torch
from nets import Net, apply, images, prepared
from test_insert_fake_quant import MINMAX, quantized
from torch import Tensor, nn

from fxquant.calibration import weight_quantizers
from fxquant.execution import sweep
from fxquant.graph import called
from fxquant.passes import CorrectBias, InsertFakeQuant
from fxquant.passes.correct_bias import Moments
from fxquant.placement import place
from fxquant.quantizers.layers import QuantizedLayer

BATCHES = [images(4), images(3)]


def outputs(gm) -> dict[str, Tensor]:
    """Return the outputs of every layer as ``[C, values]``, in float64."""
    found = {}
    for node, values in sweep(gm, BATCHES):
        if node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), nn.Linear | nn.modules.conv._ConvNd):
            axis = -1 if isinstance(gm.get_submodule(str(node.target)), nn.Linear) else 1
            found[str(node.target)] = torch.cat([v.double().movedim(axis, 0).flatten(1) for v in values], 1)
    return found


def _shift(wanted: Tensor, got: Tensor) -> float:
    """Return the largest error of a channel's mean, against the spread of the layer."""
    return float((wanted.mean(1) - got.mean(1)).abs().max() / wanted.std())


@pytest.mark.parametrize("gain", ["none", "spread", "regression", "balanced"])
@pytest.mark.parametrize("name", ["residual", "transposed", "one_dimension", "attention", "linear_norm"])
def test_means_agree(name, gain):
    teacher, _, gm, _, _ = quantized(name, 3, 4)
    corrected, log = apply(gm, CorrectBias(teacher, BATCHES, gain))
    layers = [str(node.target) for node, part in called(gm) if isinstance(part, QuantizedLayer)]
    assert log.count == len(layers)
    wanted, before, after = outputs(teacher), outputs(gm), outputs(corrected)
    errors = {layer: _shift(wanted[layer], after[layer]) for layer in layers}
    assert max(errors.values()) < 0.02, errors  # a value next to the edge of a step may fall on its other side
    assert max(_shift(wanted[layer], before[layer]) for layer in layers) > 3 * max(errors.values())
    for layer in layers:
        assert gm.get_submodule(layer).codes().equal(corrected.get_submodule(layer).codes())
    if gain == "none":
        assert all(
            gm.get_submodule(layer).weight_quantizer.scale.equal(corrected.get_submodule(layer).weight_quantizer.scale) for layer in layers
        )


def test_spread_agrees():
    teacher, _, gm, _, _ = quantized("chain", 2, 8, edges="same")
    corrected, _ = apply(gm, CorrectBias(teacher, BATCHES, "spread"))
    wanted, after = outputs(teacher), outputs(corrected)
    for layer in ("0", "4"):
        torch.testing.assert_close(after[layer].std(1), wanted[layer].std(1), rtol=0.02, atol=1e-4)


def test_one_layer_against_plain_formulas():
    """One quantized layer in front: yq is known, so the bias and the scales are too."""
    teacher = prepared(Net(lambda s, x: s.conv(x), conv=nn.Conv2d(3, 4, 1)))
    plan = place(teacher, 2, None, edges="same")
    gm, _ = apply(teacher, InsertFakeQuant(plan, lambda *_: None, weight_quantizers(MINMAX)))
    x = torch.cat(BATCHES)
    y, yq = (value.detach().double().movedim(1, 0).flatten(1) for value in (teacher(x), gm(x)))
    gains = {
        "none": torch.ones(4, dtype=torch.float64),
        "spread": y.std(1) / yq.std(1),
        "regression": torch.stack([torch.cov(torch.stack(pair))[0, 1] / pair[1].var() for pair in zip(y, yq, strict=True)]),
    }
    gains["balanced"] = (gains["spread"] * gains["regression"].clamp_min(0)).sqrt()
    for word, gain in gains.items():
        gain = gain.clamp_min(0.05) if word != "none" else gain
        layer = apply(gm, CorrectBias(teacher, BATCHES, word))[0].get_submodule("conv")
        old = gm.get_submodule("conv")
        torch.testing.assert_close(layer.weight_quantizer.scale, (gain * old.weight_quantizer.scale).float(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(layer.bias, (y.mean(1) - gain * (yq.mean(1) - old.bias.detach())).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_without_bias_gets_one(groups):
    up = nn.ConvTranspose2d(4, 6, 2, 2, groups=groups, bias=False)
    teacher = prepared(Net(lambda s, x: s.up(s.stem(x)), stem=nn.Conv2d(3, 4, 1), up=up))
    plan = place(teacher, 2, None, edges="same")
    gm, _ = apply(teacher, InsertFakeQuant(plan, lambda *_: None, weight_quantizers(MINMAX)))
    assert gm.get_submodule("up").bias is None
    corrected, _ = apply(gm, CorrectBias(teacher, BATCHES, "balanced"))
    layer = corrected.get_submodule("up")
    assert layer.bias.shape == (6,)
    assert layer.weight_quantizer.scale.shape == (6 // groups,)
    torch.testing.assert_close(outputs(corrected)["up"].mean(1), outputs(teacher)["up"].mean(1), rtol=1e-4, atol=1e-5)


def test_constant_channels_keep_their_scale():
    wanted = [torch.stack([torch.zeros(8), torch.linspace(-1, 1, 8), torch.ones(8)], 1)]
    got = [torch.stack([torch.linspace(-1, 1, 8), torch.zeros(8), torch.ones(8)], 1)]
    for word in ("spread", "regression", "balanced"):
        assert Moments(wanted, got, 1).gain(word).tolist() == [1, 1, 1]


def test_gain_is_never_below_a_twentieth():
    y = torch.linspace(-1, 1, 8)[:, None]
    assert Moments([y], [-y], 1).gain("regression").item() == pytest.approx(0.05)
    assert Moments([y], [2 * y], 1).gain("regression").item() == pytest.approx(0.5)


def test_the_note_counts_the_images():
    teacher, _, gm, _, _ = quantized("chain")
    _, log = apply(gm, CorrectBias(teacher, BATCHES))
    assert log.notes == ["moments over 7 images"]


def test_float_layers_are_left_alone():
    teacher, _, gm, _, _ = quantized("chain", overrides={"4": {"w": None}})
    corrected, log = apply(gm, CorrectBias(teacher, BATCHES))
    assert log.count == 2
    assert corrected.get_submodule("4") is gm.get_submodule("4")
