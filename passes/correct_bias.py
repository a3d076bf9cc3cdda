"""CorrectBias: give every output channel the mean, and about the spread, that it has in the float network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.execution import Values, sweep
from fxquant.graph import module_of, put_module
from fxquant.kinds import is_layer, kind
from fxquant.passes.insert_fake_quant import InsertFakeQuant
from fxquant.pipeline import Pass
from fxquant.quantizers.layers import QuantizedLayer


class CorrectBias(Pass):
    """Correct the bias, and the scale, of every quantized layer so that its output channels have the moments of the float network.

        W -> conv(Wq, b)                            =>     conv(g Wq, b')         b' = E[y] - E[g (yq - b)]

    ``y`` is the channel's output in the float network, ``yq`` its output when the layer and everything in front of it is quantized *and
    already corrected*; moments are over the calibration images and all positions. The gain ``g`` goes into the weight's scale:

        none         g = 1                                         empirical bias correction (Nagel et al. 2019, appendix D)
        spread       g = std(y) / std(yq)                          keeps the energy of the signal (ACIQ's variance correction)
        regression   g = cov(y, yq) / var(yq)                      least squares; shrinks what is mostly noise
        balanced     the geometric mean of the last two

    Two bits shrink and shift channels by far more than they change their order, and the error of the means adds up over the layers.

    Args:
        teacher: the float graph, with the same layers in the same order.
        batches: calibration images ``[N, C, H, W]`` on the device of the graphs.
        gain: one of the words above.
    """

    after = (InsertFakeQuant,)
    preserves_output = False
    verb = "corrected"

    def __init__(self, teacher: GraphModule, batches: Sequence[Tensor], gain: str = "balanced"):
        super().__init__()
        self.teacher, self.batches, self.gain = teacher, batches, gain

    def run(self, gm: GraphModule) -> None:
        float_layers = (values for node, values in sweep(self.teacher, self.batches) if is_layer(node))
        self.note(f"moments over {sum(map(len, self.batches))} images")
        for node, values in self.track(sweep(gm, self.batches), "correct bias", len(gm.graph.nodes)):
            if not is_layer(node):
                continue
            wanted, layer, axis = next(float_layers), module_of(node), -1 if kind(node) == "linear" else 1
            if not isinstance(layer, QuantizedLayer):
                continue
            moments = Moments(wanted, values, axis)
            # Transposed convolutions share a scale among their groups, so the groups share a gain.
            gain = moments.gain(self.gain).view(-1, len(layer.weight_quantizer.scale)).mean(0)
            channel_gain = gain.repeat(len(moments.mean) // len(gain))
            shift = moments.mean - channel_gain * moments.mean_q
            put_module(gm, str(node.target), layer.scaled(gain, shift))
            self.changed()
            shape = [1] * values[0].ndim
            shape[axis] = -1
            values[:] = [value * channel_gain.view(shape) + shift.view(shape) for value in values]


class Moments:
    """Means and second moments of each channel of two sets of values, summed in float64; all ``[C]``.

    Args:
        wanted: the float values, batch by batch.
        got: the quantized values.
        axis: the channel axis.
    """

    def __init__(self, wanted: Values, got: Values, axis: int):
        sums = torch.stack([_sums(y, yq, axis) for y, yq in zip(wanted, got, strict=True)]).sum(0)
        count = sum(value.numel() for value in wanted) / wanted[0].shape[axis]
        mean, mean_q, square, square_q, product = sums / count
        self.dtype = wanted[0].dtype
        self.mean, self.mean_q = mean.to(self.dtype), mean_q.to(self.dtype)
        self.variance = (square - mean**2).clamp_min(0)
        self.variance_q = (square_q - mean_q**2).clamp_min(0)
        self.covariance = product - mean * mean_q

    def gain(self, word: str) -> Tensor:
        """Return the gain ``[C]``, at least a twentieth, 1 where either channel is constant."""
        spread = (self.variance / self.variance_q).sqrt()
        regression = self.covariance / self.variance_q
        gain = {
            "none": torch.ones_like(spread),
            "spread": spread,
            "regression": regression,
            "balanced": (spread * regression.clamp_min(0)).sqrt(),
        }[word]
        constant = torch.minimum(self.variance, self.variance_q) <= 1e-12 * (self.mean**2 + self.variance).max()
        return torch.where(constant, 1.0, gain.clamp_min(0.05)).to(self.dtype)


def _sums(y: Tensor, yq: Tensor, axis: int) -> Tensor:
    y, yq = (value.double().movedim(axis, 0).flatten(1) for value in (y, yq))
    return torch.stack([y.sum(1), yq.sum(1), (y * y).sum(1), (yq * yq).sum(1), (y * yq).sum(1)])
