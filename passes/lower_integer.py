"""LowerInteger: from a simulation in floats to a graph that runs on integers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.deploy.between import copy_on_bytes, float_operations, pooled_bytes, quantize_in_front_of_concats
from fxquant.deploy.bytes import Dequantize, Quantize, cast_images
from fxquant.deploy.integers import Grid, IntegerLayer, integer_layer
from fxquant.deploy.pooled import PooledIntegerLayer
from fxquant.graph import called, free_path, is_tensor, module_of, put_module
from fxquant.grids import AveragedPart, carried_grids, cut_of, terms_of
from fxquant.kinds import QUANTIZED, WEIGHTED, kind
from fxquant.passes.append_cat import AppendCAT
from fxquant.passes.freeze import Freeze
from fxquant.pipeline import Pass
from fxquant.placement import layer_name
from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer


class Backend(Protocol):
    """What runs integer layers somewhere."""

    def refusal(self, layer: IntegerLayer, residual: Grid | None = None) -> str | None:
        """Say why `layer` cannot run there, or return None."""

    def build(self, layer: IntegerLayer, residual: Grid | None = None) -> nn.Module:
        """Return a module of bytes (and the bytes of a residual) that computes `layer`."""
        ...


@dataclass(frozen=True)
class Fusion:
    """What one call computes: a layer, the bytes that are added to it, and the grid of the quantizer behind with the cuts in between."""

    layer: Node
    residual: Node | None
    output: Grid


class LowerInteger(Pass):
    """Let quantized layers compute on bytes, each in one call with everything up to the next quantizer.

        q -> conv -> relu -> q                      =>     bytes -> integer conv -> bytes
        q -> conv -> (+ q) -> relu -> q             =>     bytes, bytes -> integer conv -> bytes
        conv, conv -> concat -> q                   =>     bytes, bytes -> concat -> bytes
        q -> global pool -> fc                      =>     bytes -> pooled integer linear -> float

    A tensor with a quantizer travels as bytes; views, zero padding, max pooling and concatenations work on the bytes. Everything else reads
    the floats that the bytes stand for, as in the simulation; a compiler fuses those conversions into it, and a note says where.
    What stays simulated is skipped with its reason: layers that read floats (the first), matmuls, weights that do not fit a signed byte,
    sums and concatenations of floats, means over windows that give a map.

    Args:
        backend: what builds and refuses integer layers.
    """

    after = (Freeze, AppendCAT)
    preserves_output = False  # where layers read floats (images), sums of another order can move a value across the border of two codes
    verb = "lowered"

    def __init__(self, backend: Backend):
        super().__init__()
        self.backend = backend

    def run(self, gm: GraphModule) -> None:
        self.gm, self.pooled = gm, dict[Node, tuple[Node, AveragedPart]]()
        concats = quantize_in_front_of_concats(gm)
        quantizers = ((node, module) for node, module in called(gm) if isinstance(module, UniformQuantizer))
        self.quantizers = {node: Grid.of(module) for node, module in quantizers if module.spec.axis is None}
        self.grids = carried_grids(gm, self.quantizers | concats)
        self.layers = {node: found for node in gm.graph.nodes if kind(node) in QUANTIZED and (found := self._integers(node)) is not None}
        self.order = {node: place for place, node in enumerate(gm.graph.nodes)}
        fusions = {quantizer: fusion for quantizer in self.quantizers if (fusion := self._fusion(quantizer)) is not None}
        fused = {fusion.layer for fusion in fusions.values()}
        self.bytes: dict[Node, Node] = {}
        for node in self.order:
            if node in fusions:
                self._fuse(node, fusions[node])
            elif node in self.quantizers:
                self._enter(node)
            elif node in self.grids:
                self._stand_in(node, copy_on_bytes(gm, node, self.bytes, self.grids[node]))
            elif node in self.layers and node not in fused:
                self._lower(node)
        if self.log.count:
            floats, reasons = float_operations(gm, self.grids)
            for node, reason in reasons.items():
                self.skip(node, reason)
            if floats:
                told = (f"{len(names)} {word} ({_some(names)})" for word, names in sorted(floats.items()))
                self.note(f"computed in floats: {', '.join(told)}")
            cast_images(gm)

    def _integers(self, node: Node) -> IntegerLayer | None:
        """Return a layer that reads bytes, or means of their maps, as integers; otherwise note why it is none."""
        module = module_of(node) if node.op == "call_module" else None
        if not isinstance(module, QuantizedLayer):
            two = "multiplies two tensors, the products are of floats"
            self.skip(layer_name(node), "its weight is float" if kind(node) in WEIGHTED else two)
            return None
        source = node.all_input_nodes[0]
        if source not in self.grids:
            pooled = pooled_bytes(node, self.grids)
            if pooled is None:
                self.skip(node, f"reads {source}, which is not quantized")
                return None
            source, _ = self.pooled[node] = pooled
        found = integer_layer(module, self.grids[source], _image_shape(node.all_input_nodes[0]))
        refusal = found if isinstance(found, str) else self.backend.refusal(found)
        if refusal is not None:
            self.skip(node, refusal)
        return found if isinstance(found, IntegerLayer) and refusal is None else None

    def _fusion(self, quantizer: Node) -> Fusion | None:
        """Return what one call can compute together with `quantizer`, or None."""
        node, grid = quantizer.all_input_nodes[0], self.grids[quantizer]
        while len(node.users) == 1 and (cut := cut_of(node)) is not None:
            node, grid = node.all_input_nodes[0], grid.within(*cut)
        if self._is_fusible(node):
            return Fusion(node, None, grid)
        terms = terms_of(node) if len(node.users) == 1 else ()
        for layer in sorted(terms, key=self.order.__getitem__, reverse=True):
            other = next((term for term in terms if term is not layer), layer)
            if self._is_fusible(layer) and other in self.grids:
                wanted = replace(self.layers[layer], output=grid)
                if self.backend.refusal(wanted, self.grids[other]) is None:
                    return Fusion(layer, other, grid)
        return None

    def _is_fusible(self, node: Node) -> bool:
        return node in self.layers and len(node.users) == 1 and node.all_input_nodes[0] in self.grids

    def _fuse(self, quantizer: Node, fusion: Fusion) -> None:
        inputs, residual = [self.bytes[fusion.layer.all_input_nodes[0]]], None
        if fusion.residual is not None:
            residual = self.grids[fusion.residual]
            inputs.append(self.bytes[fusion.residual])
        module = self.backend.build(replace(self.layers[fusion.layer], output=fusion.output), residual)
        self._stand_in(quantizer, self._call(quantizer, str(fusion.layer.target), module, *inputs))
        self.changed()

    def _enter(self, quantizer: Node) -> None:
        module = Quantize(self.grids[quantizer])
        self._stand_in(quantizer, self._call(quantizer, str(quantizer.target), module, quantizer.all_input_nodes[0]))

    def _lower(self, node: Node) -> None:
        layer, source, name = self.layers[node], node.all_input_nodes[0], str(node.target)
        if source in self.grids:
            new = self._call(node, name, self.backend.build(layer), self.bytes[source])
        else:
            source, part = self.pooled[node]
            module = PooledIntegerLayer(layer, node.meta["val"].ndim == 4, self.backend.build, part, name)
            new = self._call(node, name, module, self.bytes[source])
        node.replace_all_uses_with(new)
        self.changed()

    def _stand_in(self, node: Node, codes: Node) -> None:
        """Let `codes` be the bytes of `node`, and whoever reads `node` read the floats that they stand for."""
        self.bytes[node] = codes
        if is_tensor(node):
            codes.meta["val"] = torch.empty_like(node.meta["val"], dtype=torch.uint8)
            floats = self._call(codes, free_path(self.gm, f"{node.name}_floats"), Dequantize(self.grids[node]), codes)
            node.replace_all_uses_with(floats)
            for reader in [user for user in floats.users if kind(user) == "size"]:
                reader.replace_input_with(floats, codes)
            self.bytes[floats], self.grids[floats] = codes, self.grids[node]

    def _call(self, behind: Node, path: str, module: nn.Module, *inputs: Node) -> Node:
        put_module(self.gm, path, module)
        with self.gm.graph.inserting_after(behind):
            return self.gm.graph.call_module(path, inputs)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _image_shape(node: Node) -> tuple[int, ...] | None:
    """Return the shape of one image of what was traced at `node`, where it is fixed."""
    shape = tuple(node.meta["val"].shape[1:])
    return shape if all(isinstance(size, int) for size in shape) else None
