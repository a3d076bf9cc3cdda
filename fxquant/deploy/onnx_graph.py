"""Quantizers in an ONNX graph: markers become QuantizeLinear and DequantizeLinear, weights become integers.

    x -> [marker]          =>    x -> (Clip) -> QuantizeLinear -> DequantizeLinear (-> shield)
    weight -> [marker]     =>    codes (2, 4 or 8 bits, packed) -> DequantizeLinear(axis) (-> shield)
    two grids a channel    =>    codes -> DequantizeLinear -> Sub(Where) -> Mul(Where)
    p -> [log marker]      =>    p -> Div -> Log -> Mul -> Round -> Max -> Min -> Cast -> Gather (of 2^bits values) -> Mul

ONNX has integers of 2, 4 and 8 bits. A type that is wider than the grid would keep values that the grid cuts off, so a Clip to the first
and last level stands in front of the rounding; rounding is monotone and both ends round to their own codes, so this is exact.

A logarithmic grid has no QuantizeLinear: its codes are computed with plain ops, and looked up in a table of what each stands for (0 for
those too small to be kept), which has the bits of the simulation where powers of a runtime might not.

By default onnxruntime (1.31 was measured) moves quantizers across pools and views, and fuses what it finds between them:

* a convolution becomes QLinearConv, with a bias rounded to multiples of the two scales: next to nothing at 8 bits, a percent at 2;
* a linear layer becomes MatMulNBits, which rounds its activations to 8 bits on its own (relative error 0.001 to 0.04);
* for integers of 2 and 4 bits it then has no kernels (MaxPool, Reshape, QLinearConv), and it stops at a Clip in front of a QuantizeLinear;
* values of more than 2^31 steps wrap around at 2 bits;
* a product of two tensors becomes MatMulIntegerToFloat, which stops at a scale a head.

So a DequantizeLinear of less than 8 bits, of the weight of a linear layer, or with a scale a head, has a shield behind it: a Max of one
input, which changes nothing and which no fusion sees through. Where the type has less than 8 bits, the Clip is there whether or not the
bits fill the type, and is written as Max and Min, as every other Clip of the graph is then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph import called, fork, put_module, sharing_copy
from fxquant.packing import pack
from fxquant.quantizers import DualQuantizer, LogQuantizer, QuantSpec, UniformQuantizer
from fxquant.quantizers.affine import along
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.quantizers.logarithmic import STEPS

DOMAIN = "fxquant"
OPSETS = {2: 25, 4: 21, 8: 18}
"""The first operator set with integers of a width; 18 is the lowest that torch exports."""


class Marker(nn.Module):
    """Stands where a quantizer was: one node of the ONNX graph that nothing computes or folds, with the quantizer's name."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(f"{DOMAIN}::Quantizer", (x,), {"name": self.name}, dtype=x.dtype, shape=x.shape, version=1)


def marked(gm: GraphModule) -> GraphModule:
    """Return a fork of `gm` with a `Marker` for every quantizer, of activations and weights."""
    new = fork(gm)
    for node, module in called(gm):
        name = str(node.target)
        if isinstance(module, UniformQuantizer | LogQuantizer):
            put_module(new, name, Marker(name))
        elif isinstance(module, QuantizedLayer):
            layer = sharing_copy(module)
            layer.frozen, layer.weight_quantizer = False, Marker(name)
            put_module(new, name, layer)
    new.recompile()
    return new


def width(spec: QuantSpec, clip: bool) -> int:
    """Return the bits of the smallest ONNX integer that holds the codes."""
    return 8 if clip or spec.bits > 4 else 4 if spec.bits > 2 else 2


def quantizers(gm: GraphModule) -> dict[str, UniformQuantizer | LogQuantizer | QuantizedLayer]:
    """Return every quantizer of activations and every quantized layer, by name."""
    kinds = UniformQuantizer | LogQuantizer | QuantizedLayer
    return {str(node.target): module for node, module in called(gm) if isinstance(module, kinds)}


def opset_of(gm: GraphModule, clip: bool) -> int:
    """Return the lowest operator set that has the types that the network needs."""
    typed = [m for m in quantizers(gm).values() if not isinstance(m, LogQuantizer)]  # whose codes are stored as integers
    specs = [(m if isinstance(m, UniformQuantizer) else m.weight_quantizer).spec for m in typed]
    return max((OPSETS[width(spec, clip)] for spec in specs), default=OPSETS[8])


@dataclass
class Rewriter:
    """Replaces the markers in an ``onnx.ModelProto``, in place.

    Args:
        gm: the quantized network that the markers name parts of.
        clip: only 8-bit integers.
    """

    gm: GraphModule
    clip: bool
    values: dict[str, str] = field(default_factory=dict)
    """The ONNX value behind the quantizer of each activation, by its name in `gm`."""

    def run(self, model: Any) -> None:
        """Replace all markers; float weights that nothing reads any more go."""
        import onnx

        self.helper, self.types = onnx.helper, onnx.TensorProto
        graph = model.graph
        self.tensors: dict[str, Any] = {}
        modules, nodes, floats = quantizers(self.gm), [], set()
        shielded = any(isinstance(m, UniformQuantizer) and width(m.spec, self.clip) < 8 for m in modules.values())
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
            if node.domain != DOMAIN:
                nodes += self._clip(node.input, node.output[0], True) if node.op_type == "Clip" and shielded else [node]
                continue
            name = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "name")
            module = modules[name]
            if isinstance(module, QuantizedLayer):
                floats.add(node.input[0])
                nodes += self._weight(name, module, node.output[0])
                continue
            if isinstance(module, LogQuantizer):
                nodes += self._logarithmic(name, module, node.input[0], node.output[0])
            else:
                nodes += self._activation(name, module, node.input[0], node.output[0])
            self.values[name] = node.output[0]
        for node in nodes:
            node.name = node.name or node.output[0]
        read = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
        kept = [tensor for tensor in graph.initializer if tensor.name not in floats - read]
        for value in [graph, *kept, *graph.input, *graph.output]:
            value.doc_string = ""
            del value.metadata_props[:]
        for values, new in ((graph.node, nodes), (graph.initializer, [*kept, *self.tensors.values()]), (graph.value_info, [])):
            del values[:]
            values.extend(new)
        for entry in [entry for entry in model.opset_import if entry.domain == DOMAIN]:
            model.opset_import.remove(entry)
        model.ir_version = self.helper.find_min_ir_version_for(list(model.opset_import))

    def _activation(self, name: str, quantizer: UniformQuantizer, x: str, y: str) -> list[Any]:
        spec, make, bits = quantizer.spec, self.helper.make_node, width(quantizer.spec, self.clip)
        axis: dict[str, Any] = {} if spec.axis is None else {"axis": spec.axis}
        nodes, grid, codes = [], self._grid(name, quantizer), f"{name}.codes"
        if spec.bits < bits or bits < 8:
            # A head's ends stand where its values do, and Clip takes single numbers: Max and Min take any.
            like = quantizer.scale if spec.axis is None else quantizer.scale.new_ones(1, len(quantizer.scale), 1, 1)
            ends = [quantizer.dequantize(torch.full_like(like, code)) for code in (spec.qmin, spec.qmax)]
            low, high, inside = self._float(f"{name}.low", ends[0]), self._float(f"{name}.high", ends[1]), f"{name}.inside"
            nodes = self._clip([x, low, high], inside, bits < 8 or spec.axis is not None)
            x = inside
        if spec.bits == 8 and spec.axis is None:
            return [*nodes, make("QuantizeLinear", [x, *grid], [codes]), make("DequantizeLinear", [codes, *grid], [y])]
        values = f"{name}.values"  # shielded
        nodes += [make("QuantizeLinear", [x, *grid], [codes], **axis), make("DequantizeLinear", [codes, *grid], [values], **axis)]
        return [*nodes, make("Max", [values], [y])]

    def _logarithmic(self, name: str, quantizer: LogQuantizer, x: str, y: str) -> list[Any]:
        """Return the nodes of ``table[min(max(round(-k log2(x / d)), 0), n)] * d``; of 0, the logarithm and so the code are infinite."""
        unit = LogQuantizer(QuantSpec(quantizer.spec.bits, symmetric=True), torch.tensor(1.0), quantizer.grid)
        values = unit(unit.dequantize(torch.arange(quantizer.spec.levels, dtype=torch.float32)))  # twice: what is too small is 0
        broadcast = along(quantizer.scale, torch.empty([1] * 4), quantizer.spec.axis)  # those of heads stand in the second of four axes
        scale, table, zero = self._float(f"{name}.scale", broadcast), self._float(f"{name}.table", values), self._float(f"{name}.zero", 0.0)
        factor = self._float(f"{name}.steps", -STEPS[quantizer.grid] / math.log(2))
        last = self._float(f"{name}.last", float(quantizer.spec.qmax))
        steps: list[tuple[str, list[str], dict[str, Any]]] = [
            ("Div", [scale], {}),
            ("Max", [zero], {}),
            ("Log", [], {}),
            ("Mul", [factor], {}),
            ("Round", [], {}),
            ("Max", [zero], {}),
            ("Min", [last], {}),
            ("Cast", [], {"to": self.types.INT64}),
        ]
        nodes = []
        for place, (op, more, attributes) in enumerate(steps):
            nodes.append(self.helper.make_node(op, [x, *more], [f"{name}.step{place}"], **attributes))
            x = f"{name}.step{place}"
        looked_up = f"{name}.values"
        return [*nodes, self.helper.make_node("Gather", [table, x], [looked_up]), self.helper.make_node("Mul", [looked_up, scale], [y])]

    def _clip(self, inputs: Sequence[str], y: str, shielded: bool) -> list[Any]:
        """Return the nodes that clip a value to ``[value, low, high]``; either end may be missing."""
        make, (x, low, high) = self.helper.make_node, (*inputs, "", "")[:3]
        if not shielded:
            return [make("Clip", list(inputs), [y])]
        above = f"{y}.above"
        return [make("Max", [x, *filter(None, [low])], [above]), make("Min", [above, *filter(None, [high])], [y])]

    def _weight(self, name: str, layer: QuantizedLayer, y: str) -> list[Any]:
        quantizer, make = layer.weight_quantizer, self.helper.make_node
        if isinstance(quantizer, DualQuantizer):
            return self._dual_weight(f"{name}.weight", layer.codes(), quantizer, y)
        inputs = [self._integers(f"{name}.weight.codes", layer.codes(), quantizer.spec), *self._grid(f"{name}.weight", quantizer)]
        if quantizer.spec.bits == 8 and not isinstance(layer, nn.Linear):
            return [make("DequantizeLinear", inputs, [y], axis=quantizer.spec.axis)]
        values = f"{name}.weight.values"
        return [make("DequantizeLinear", inputs, [values], axis=quantizer.spec.axis), make("Max", [values], [y])]

    def _dual_weight(self, name: str, codes: Tensor, quantizer: DualQuantizer, y: str) -> list[Any]:
        """Return ``(codes - z) * s``, where each column takes z and s of its group: DequantizeLinear has one of each a channel."""
        make, spec = self.helper.make_node, quantizer.spec
        integers, one = self._integers(f"{name}.codes", codes, spec), self._float(f"{name}.one", 1.0)
        mask = f"{name}.outlier"
        self.tensors[mask] = self.types(
            name=mask, data_type=self.types.BOOL, dims=quantizer.outlier.shape, raw_data=quantizer.outlier.numpy().tobytes()
        )
        nodes, parts = [make("DequantizeLinear", [integers, one], [f"{name}.floats"])], []
        for word, values in (("zero_point", quantizer.zero_point), ("scale", quantizer.scale)):
            ends = [self._float(f"{name}.{word}.{group}", values[:, group, None]) for group in (1, 0)]
            parts.append(f"{name}.{word}")
            nodes.append(make("Where", [mask, *ends], [parts[-1]]))
        centered = f"{name}.centered"
        return [*nodes, make("Sub", [f"{name}.floats", parts[0]], [centered]), make("Mul", [centered, parts[1]], [y])]

    def _grid(self, name: str, quantizer: UniformQuantizer) -> tuple[str, str]:
        scale = self._float(f"{name}.scale", quantizer.scale)
        return scale, self._integers(f"{name}.zero_point", quantizer.zero_point, quantizer.spec)

    def _float(self, name: str, value: Tensor | float) -> str:
        value = torch.as_tensor(value, dtype=torch.float32)
        raw = value.detach().contiguous().numpy().tobytes()
        self.tensors[name] = self.types(name=name, data_type=self.types.FLOAT, dims=value.shape, raw_data=raw)
        return name

    def _integers(self, name: str, codes: Tensor, spec: QuantSpec) -> str:
        bits = width(spec, self.clip)
        kind = self.types.DataType.Value(f"{'' if spec.signed else 'U'}INT{bits}")
        # Two's complement, and the same order as in a file of this library: the first code in the lowest bits of the first byte.
        raw = pack(codes.long() % 2**bits, bits).numpy().tobytes()
        self.tensors[name] = self.types(name=name, data_type=kind, dims=codes.shape, raw_data=raw)
        return name
