"""From a recipe to the quantizers of weights and activations: which estimator, on which grid, with which constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.data import first_images
from fxquant.execution import peak_bytes
from fxquant.placement import LayerPlan, TensorPlan
from fxquant.quantizers import (
    LogQuantizer,
    Observer,
    QuantSpec,
    UniformQuantizer,
    activation_quantizer,
    log_quantizer,
    weight_quantizer,
)
from fxquant.quantizers.layers import weight_spec
from fxquant.recipe import Recipe


def weight_quantizers(recipe: Recipe) -> Callable[[LayerPlan, nn.Module], UniformQuantizer]:
    """Return what makes the quantizer of a layer's weight: one scale and zero-point an output channel."""

    def make(plan: LayerPlan, layer: nn.Module) -> UniformQuantizer:
        assert plan.w is not None and isinstance(layer.weight, Tensor)
        # Integer units multiply signed bytes: 8 bits less a zero-point would not fit one, and gain nothing; 7 bits less a zero-point do.
        spec = weight_spec(layer, plan.w, recipe.weight_symmetric or plan.w == 8)
        return weight_quantizer(layer.weight, spec, recipe.weight_range, where=plan.name, p=recipe.weight_p, percentile=recipe.percentile)

    return make


def activation_quantizers(recipe: Recipe) -> Callable[[TensorPlan, Observer], UniformQuantizer | LogQuantizer]:
    """Return what makes the quantizer of a tensor from what its observer saw: one scale and zero-point a tensor, or index of its axis."""

    def make(plan: TensorPlan, observer: Observer) -> UniformQuantizer | LogQuantizer:
        if plan.softmax and recipe.softmax_quantizer != "uniform":
            return log_quantizer(observer, plan.bits, recipe.softmax_quantizer, p=recipe.activation_p)
        signed = recipe.activation_symmetric and observer.seen and bool((observer.low < 0).any())
        spec = QuantSpec(plan.bits, signed=signed, symmetric=recipe.activation_symmetric, axis=plan.axis)
        p, percentile, relative = recipe.activation_p, recipe.percentile, recipe.activation_error == "relative"
        return activation_quantizer(observer, spec, recipe.activation_range, p=p, percentile=percentile, relative=relative)

    return make


def affordable_images(images: Sequence[Tensor], most: int, recipe: Recipe, graph: GraphModule, device: torch.device) -> list[Tensor]:
    """Return the first images, as many as fit the memory budget when teacher and student hold all their activations at one place."""
    count = max(1, int(recipe.memory_gib * 2**30 / max(2 * peak_bytes(graph), 1)))
    return first_images(images, min(most, count), device)
