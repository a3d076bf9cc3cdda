"""CorrectBiasFromNorms: take the mean error of quantized weights out of the biases, without any image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.channels import blocks, why_not_read
from fxquant.expectations import Expected, expectations
from fxquant.graph import module_of, put_module
from fxquant.kinds import is_layer, kind
from fxquant.passes.fold_batch_norm import FoldBatchNorm
from fxquant.passes.insert_fake_quant import InsertFakeQuant
from fxquant.pipeline import Pass
from fxquant.quantizers.layers import QuantizedLayer

DONE = "means_corrected"
"""The key of ``GraphModule.meta`` for the paths of layers that have been corrected already."""


class CorrectBiasFromNorms(Pass):
    """Correct the bias of quantized layers by what their weights' errors do to the mean inputs (Nagel et al. 2019, section 4.2.1).

        bn -> relu -> conv(Wq, b)                   =>     bn -> relu -> conv(Wq, b')          b' = b - (Wq - W) E[x]

    A rounded weight shifts the mean of its output by ``(Wq - W) E[x]``, and ``E[x]`` of each channel follows from the batch norm that was
    folded into the layer in front (`fxquant.expectations`). No image is read: this is for networks without calibration data for it;
    `CorrectBias` measures the means, of activations' errors too, and corrects more.

    Refused where ``E[x]`` is not known: behind the images, a layer that had no batch norm or one without statistics, or what changes means
    by more than a norm tells (max pooling, a ReLU behind a sum, GELU); in transposed convolutions, whose outputs read a share of the taps;
    and in frozen layers. Zero padding is not counted: at borders, where some taps read it, too much is corrected.
    """

    after = (FoldBatchNorm, InsertFakeQuant)
    preserves_output = False
    verb = "corrected"

    def run(self, gm: GraphModule) -> None:
        known, done = expectations(gm), set(gm.meta.get(DONE, ()))
        for node in [node for node in gm.graph.nodes if is_layer(node)]:
            layer, path = module_of(node), str(node.target)
            if not isinstance(layer, QuantizedLayer) or path in done:
                continue
            means = _inputs(node, layer, known[node.all_input_nodes[0]])
            if isinstance(means, str):
                self.skip(node, means)
                continue
            put_module(gm, path, layer.scaled(layer.weight.new_ones(len(layer.weight_quantizer.scale)), -_shift(layer, means)))
            done.add(path)
            self.changed()
        gm.meta[DONE] = tuple(sorted(done))


def _inputs(node: Node, layer: QuantizedLayer, known: Expected | str) -> Tensor | str:
    """Return the mean of each input of a layer, or why it is not known."""
    if layer.frozen:
        return "is frozen: what its weights were before they were rounded is not known"
    if kind(node) == "conv_transpose":
        return "is a transposed convolution, whose outputs read a share of the taps each"
    if isinstance(known, str):
        return known
    why = why_not_read(node, node.all_input_nodes[0], known.place)
    return known.mean.repeat_interleave(known.place.width) if why is None else why


@torch.no_grad()
def _shift(layer: QuantizedLayer, means: Tensor) -> Tensor:
    """Return the mean that the weights' errors add to each output channel."""
    error = blocks(layer, (layer.used_weight() - layer.weight).contiguous()).double().sum(3)
    return (error @ means.view(len(error), -1, 1)).flatten().to(layer.weight)
