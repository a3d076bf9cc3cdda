"""InsertFakeQuant: observers become quantizers, layers quantize their weight."""

from __future__ import annotations

import pytest
import torch
from nets import apply, classes, images, names, prepared
from torch import nn

from fxquant.calibration import activation_quantizers, weight_quantizers
from fxquant.errors import CalibrationError
from fxquant.graph import called
from fxquant.passes import InsertFakeQuant, InsertObservers
from fxquant.placement import place
from fxquant.quantizers import ImageObserver, UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer, channel_axis
from fxquant.recipe import Recipe

MINMAX = Recipe(weight_range="minmax", activation_range="minmax")


def quantized(name: str, w: int | None = 3, a: int | None = 4, seen: bool = True, **options):
    teacher = prepared(name)
    plan = place(teacher, w, a, **options)
    observed, _ = apply(teacher, InsertObservers(plan))
    if seen:
        observed(images(4))
    gm, log = apply(observed, InsertFakeQuant(plan, activation_quantizers(MINMAX), weight_quantizers(MINMAX)))
    return teacher, observed, gm, log, plan


@pytest.mark.parametrize(
    "name", ["chain", "residual", "mobile", "transposed", "one_dimension", "norm_act", "attention", "Functional", "in_place"]
)
def test_every_planned_place(name):
    teacher, observed, gm, log, plan = quantized(name)
    assert names(gm) == names(observed)
    quantizers = {node: part for node, part in called(gm) if isinstance(part, UniformQuantizer)}
    layers = {str(node.target): part for node, part in called(gm) if isinstance(part, QuantizedLayer)}
    assert {node.args[0].name: part.spec.bits for node, part in quantizers.items()} == {t.node: t.bits for t in plan.tensors.values()}
    assert {path: part.weight_quantizer.spec.bits for path, part in layers.items()} == {
        path: layer.w for path, layer in plan.layers.items() if layer.w is not None
    }
    assert log.count == len(quantizers) + len(layers)
    assert not any(isinstance(part, ImageObserver) for _, part in called(gm))
    for path, part in layers.items():
        float_layer = teacher.get_submodule(path)
        assert isinstance(part, type(float_layer)) and not isinstance(float_layer, QuantizedLayer)
        assert part.weight is float_layer.weight
        assert part.weight_quantizer.scale.shape == (part.weight.shape[channel_axis(part)],)
        assert len(part.codes().unique()) <= 2**part.weight_quantizer.spec.bits
    values = torch.fx.Interpreter(gm)
    values.garbage_collect_values = False
    values.run(images())
    for node, part in quantizers.items():
        assert len(values.env[node].unique()) <= 2**part.spec.bits


def test_eight_bits_are_close_and_two_are_not():
    errors = []
    for bits in (8, 4, 2):
        teacher, _, gm, _, _ = quantized("residual", bits, bits, edges="same")
        errors.append(float((gm(images()) - teacher(images())).norm() / teacher(images()).norm()))
    assert errors[0] < 0.1 and errors == sorted(errors)


def test_float_weights_are_skipped_with_a_reason():
    _, _, gm, log, plan = quantized("chain", w=None)
    assert [reason for _, reason in log.skipped] == ["its weight stays float, as planned"] * 3
    assert [where for where, _ in log.skipped] == list(plan.layers)
    assert classes(gm)["UniformQuantizer"] == 2
    _, _, gm, log, _ = quantized("chain", overrides={"4": {"w": None}})
    assert log.skipped == [("4", "its weight stays float, as planned")]
    assert type(gm.get_submodule("4")) is nn.Conv2d


def test_float_activations_have_no_observer():
    _, observed, gm, log, plan = quantized("chain", a=None)
    assert not plan.tensors
    assert classes(observed)["ImageObserver"] == 0
    assert classes(gm)["UniformQuantizer"] == 0
    assert log.count == 3


def test_an_observer_that_never_saw_data_names_its_tensor():
    with pytest.raises(CalibrationError, match=r"^_2: never saw data"):
        quantized("chain", seen=False)
