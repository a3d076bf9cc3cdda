"""Uniform affine quantizers, and the estimators that choose their scale and zero-point."""

from fxquant.quantizers.affine import QuantSpec, UniformQuantizer, round_ste
from fxquant.quantizers.histogram import Histogram, HistogramObserver
from fxquant.quantizers.ranges import METHODS, activation_quantizer, estimate_range, weight_quantizer

__all__ = [
    "METHODS",
    "Histogram",
    "HistogramObserver",
    "QuantSpec",
    "UniformQuantizer",
    "activation_quantizer",
    "estimate_range",
    "round_ste",
    "weight_quantizer",
]
