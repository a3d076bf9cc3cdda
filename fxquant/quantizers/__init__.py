"""Uniform affine and logarithmic quantizers, and the estimators that choose their scale and zero-point."""

from fxquant.quantizers.affine import QuantSpec, UniformQuantizer, round_ste
from fxquant.quantizers.dual import DualQuantizer
from fxquant.quantizers.histogram import AxisObserver, Histogram, HistogramObserver, ImageObserver, Observer, observer_of
from fxquant.quantizers.logarithmic import LogQuantizer, log_quantizer
from fxquant.quantizers.ranges import METHODS, activation_quantizer, estimate_range, weight_quantizer

__all__ = [
    "METHODS",
    "AxisObserver",
    "DualQuantizer",
    "Histogram",
    "HistogramObserver",
    "ImageObserver",
    "LogQuantizer",
    "Observer",
    "QuantSpec",
    "UniformQuantizer",
    "activation_quantizer",
    "estimate_range",
    "log_quantizer",
    "observer_of",
    "round_ste",
    "weight_quantizer",
]
