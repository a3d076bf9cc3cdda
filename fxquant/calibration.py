"""From a recipe to the quantizers of weights and activations: which estimator, on which grid, with which constants."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fxquant.placement import LayerPlan, TensorPlan
from fxquant.quantizers import HistogramObserver, QuantSpec, UniformQuantizer, activation_quantizer, weight_quantizer
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


def activation_quantizers(recipe: Recipe) -> Callable[[TensorPlan, HistogramObserver], UniformQuantizer]:
    """Return what makes the quantizer of a tensor from what its observer saw: one scale and zero-point a tensor."""

    def make(plan: TensorPlan, observer: HistogramObserver) -> UniformQuantizer:
        signed = recipe.activation_symmetric and observer.seen and bool(observer.low < 0)
        spec = QuantSpec(plan.bits, signed=signed, symmetric=recipe.activation_symmetric)
        return activation_quantizer(observer, spec, recipe.activation_range, p=recipe.activation_p, percentile=recipe.percentile)

    return make
