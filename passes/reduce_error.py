"""ReduceError: closed forms in place of learning, layer by layer from the front."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.erq import Gram, gram_bytes, ridge, round_compensated, search_ridge, sums_of_halves
from fxquant.execution import Values, last_readers, sweep
from fxquant.files import gib
from fxquant.graph import module_of, put_module, sharing_copy
from fxquant.kinds import is_layer
from fxquant.passes.insert_fake_quant import InsertFakeQuant
from fxquant.passes.reparameterize_norms import DONE
from fxquant.pipeline import Pass
from fxquant.placement import LayerPlan, Plan, source
from fxquant.quantizers import DualQuantizer, UniformQuantizer
from fxquant.quantizers.dual import outlier_columns
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.recipe import Recipe


class ReduceError(Pass):
    """Fit every layer to its quantized inputs by ridge regression, then round it so that the weights left make up for those rounded (ERQ).

        x' -> linear(Q(W), b)                       =>     x' -> linear(Wq, b')         min E |Wq x' + b' - (W x + b)|^2

    x is what reaches the layer in the float network, x' what reaches it behind all layers done so far, activations quantized; `fxquant.erq`
    has the formulas. One forward pass in all: sums over the images are all that is kept. An output whose error would not be smaller than it
    was stays as it is. With ``weight_groups="dual"``, a linear layer that reads a reparameterized layer norm gets two grids an output; one
    that has two keeps them. A frozen layer is thawed, for a later `Freeze`.

    Args:
        teacher: the float graph, with the same layers in the same order.
        batches: calibration images ``[N, C, H, W]`` on the device of the graphs.
        plan: the bits of every layer.
        weights: makes the quantizer of a weight from its plan and its layer.
        recipe: `erq_ridge`, `erq_flips`, `weight_groups` and `memory_gib`.
    """

    after = (InsertFakeQuant,)
    preserves_output = False
    verb = "fitted"

    def __init__(
        self,
        teacher: GraphModule,
        batches: Sequence[Tensor],
        plan: Plan,
        weights: Callable[[LayerPlan, nn.Module], UniformQuantizer],
        recipe: Recipe,
    ):
        super().__init__()
        self.teacher, self.batches, self.plan, self.weights, self.recipe = teacher, batches, plan, weights, recipe

    def run(self, gm: GraphModule) -> None:
        float_layers = ((module_of(node), values) for node, values in sweep(self.teacher, self.batches) if is_layer(node))
        parents = {node.all_input_nodes[0] for node in gm.graph.nodes if is_layer(node)}
        last, inputs = last_readers(gm), dict[Node, Values]()
        for node, values in self.track(sweep(gm, self.batches), "reduce errors", len(gm.graph.nodes)):
            if node in parents:
                inputs[node] = values
            if is_layer(node):
                self._reduce(gm, node, *next(float_layers), inputs[node.all_input_nodes[0]], values)  # keeps none of the values
            for parent in [parent for parent in inputs if last[parent] is node]:
                del inputs[parent]
        self.note(f"fitted to {sum(map(len, self.batches))} images")

    def _reduce(self, gm: GraphModule, node: Node, teacher: nn.Module, wanted: Values, read: Values, values: Values) -> None:
        """Fit the layer at `node` and put what it gives then in the place of `values`."""
        layer = module_of(node)
        if not isinstance(layer, QuantizedLayer):
            return
        reason = self._unfit(layer)
        if reason:
            self.skip(node, reason)
            return
        sizes = node.all_input_nodes[0].meta["val"].shape
        axis = next((axis for axis, size in enumerate(sizes) if not isinstance(size, int)), 0)  # only that of the images is not fixed
        folds = sums_of_halves(layer, axis, read, wanted, [len(batch) for batch in self.batches])
        new = self._fitted(str(node.target), layer, teacher, folds, self._has_two_grids(node, layer))
        put_module(gm, str(node.target), new)
        with torch.no_grad():
            for place, x in enumerate(read):
                values[place] = new(x)  # one by one: the old ones and the new ones together would be beyond the budget
        self.changed()

    def _unfit(self, layer: nn.Module) -> str | None:
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            return f"is a {type(layer).__name__.removeprefix('Quantized')}, no linear layer or 2-D convolution"
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1:
                return "has groups"
            if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                return f"pads with {layer.padding_mode!r}, {layer.padding!r}"
        need = gram_bytes(layer.weight[0].numel(), len(layer.weight))
        if need > self.recipe.memory_gib * 2**30:
            return f"its sums take {gib(need)}, which is beyond memory_gib"
        return None

    def _has_two_grids(self, node: Node, layer: QuantizedLayer) -> bool:
        """Say whether it reads a layer norm that the last reparameterization was over (8 bits need no second grid), or has two already."""
        if isinstance(layer.weight_quantizer, DualQuantizer):
            return True
        if self.recipe.weight_groups == "one" or not isinstance(layer, nn.Linear) or layer.weight_quantizer.spec.bits == 8:
            return False
        read = node.all_input_nodes[0]
        while read.op == "call_module" and isinstance(module_of(read), UniformQuantizer):
            read = source(read.all_input_nodes[0])
        return source(read).name in node.graph.owning_module.meta.get(DONE, ()) and layer.in_features > 1

    def _quantizer(self, name: str, layer: nn.Module, dual: bool, old: UniformQuantizer) -> UniformQuantizer:
        """Return the grids of the float `layer`, of the groups of columns of its `old` ones where these are two."""
        if not dual:
            return self.weights(self.plan.layers[name], layer)
        assert isinstance(layer.weight, Tensor)
        outlier, parts = old.outlier if isinstance(old, DualQuantizer) else outlier_columns(layer.weight), []
        for columns in (~outlier, outlier):
            part = sharing_copy(layer)
            part.weight = nn.Parameter(layer.weight[:, columns], requires_grad=False)
            parts.append(self.weights(self.plan.layers[name], part))
        scale, zero_point = (torch.stack([getattr(part, key) for part in parts], 1) for key in ("scale", "zero_point"))
        return DualQuantizer(parts[0].spec, scale, zero_point, outlier)

    @torch.no_grad()
    def _fitted(self, name: str, layer: QuantizedLayer, teacher: nn.Module, folds: tuple[Gram, Gram], dual: bool) -> QuantizedLayer:
        """Return the layer with new weights, scales and bias; with two grids if `dual`."""
        assert isinstance(teacher, nn.Linear | nn.Conv2d)
        gram = folds[0] + folds[1]
        start = _with_bias(teacher.weight, teacher.bias)
        share = self.recipe.erq_ridge or search_ridge(folds, start)
        real = start if share is None else ridge(gram, start, share)
        float_layer = sharing_copy(teacher)
        float_layer.weight = nn.Parameter(real[:, :-1].reshape(teacher.weight.shape).to(teacher.weight), requires_grad=False)
        quantizer = self._quantizer(name, float_layer, dual, layer.weight_quantizer)
        quantizer, codes, bias = round_compensated(gram, real, quantizer, share or 1e-2, self.recipe.erq_flips)
        return _taken(layer, gram, quantizer, codes.reshape(layer.weight.shape), bias)


def _taken(layer: QuantizedLayer, gram: Gram, quantizer: UniformQuantizer, codes: Tensor, bias: Tensor) -> QuantizedLayer:
    """Return the layer with those of the new outputs that have a smaller error than they have now, as computed in its own precision."""
    old, like = layer.weight_quantizer, layer.weight
    weight, bias = quantizer.dequantize(codes.to(like)), bias.to(like)
    before = gram.error(_with_bias(layer.used_weight(), layer.bias))
    better = gram.error(_with_bias(weight, bias)) < before
    old_bias = torch.zeros_like(bias) if layer.bias is None else layer.bias
    new = sharing_copy(layer)
    new.frozen = False  # its weight is on the grid, in floats
    new.register_buffer("input_scale", None)
    new.weight_quantizer = quantizer.with_grid(
        _chosen(better, quantizer.scale, old.scale), _chosen(better, quantizer.zero_point, old.zero_point)
    )
    new.weight = nn.Parameter(_chosen(better, weight, layer.used_weight()), requires_grad=False)
    new.bias = nn.Parameter(torch.where(better, bias, old_bias), requires_grad=False)
    return new


def _chosen(better: Tensor, mine: Tensor, its: Tensor) -> Tensor:
    """Return the numbers of each output; one that keeps its single grid has it twice where the others have two."""
    return torch.where(_column(better, mine.ndim), mine, _column(its, mine.ndim))


def _column(values: Tensor, ndim: int) -> Tensor:
    return values.view(*values.shape, *[1] * (ndim - values.ndim))


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``[outputs, inputs + 1]`` in float64, the biases last."""
    rows = weight.detach().flatten(1).double()
    return torch.cat([rows, (rows.new_zeros(len(rows)) if bias is None else bias.detach().double())[:, None]], 1)
