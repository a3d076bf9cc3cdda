"""One safetensors file for a quantized network: dense integer weights, scales, CAT, recipe and report. No pickle.

    save:  weight [C, ...] integers in floats ->  codes  ->  bits packed densely      "conv1.weight"            uint8
                                                  scale, zero-point a channel         "conv1.weight_quantizer.scale", ".zero_point"
           everything else                                                            as it is
    load:  float architecture -> trace -> PREPARE -> place quantizers as recorded -> fill in

A file is written beside its place and moved there when complete. A file is read and checked as a whole (length, checksum, version, the
graph it was made from, every name, shape and type) before a network is built from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.cat import CAT
from fxquant.errors import ConfigError, StorageError, TraceError
from fxquant.files import checksum, write_whole
from fxquant.graph import called, fingerprint, insert_behind, is_traced, put_module, quantizer_path
from fxquant.inspection import check_network
from fxquant.kinds import WEIGHTED, kind
from fxquant.packing import pack, unpack
from fxquant.passes import PREPARE, Freeze, InsertFakeQuant, InsertObservers
from fxquant.passes.append_cat import logits_node
from fxquant.pipeline import Pipeline
from fxquant.placement import LayerPlan, TensorPlan
from fxquant.quantizers import DualQuantizer, LogQuantizer, Observer, QuantSpec, UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.record import Record
from fxquant.tracing import copied, trace
from fxquant.tracing.leaves import unwrap

FORMAT = "fxquant"
VERSION = 1


def save(qmodel: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized network to a safetensors file, atomically.

    Args:
        qmodel: what `fxquant.quantize` or `fxquant.load` returned.
        path: the file; an existing one is replaced in one step, and stays as it was when anything fails.

    Raises:
        ModelError: `qmodel` carries no record of a quantization.
        StorageError: the folder is missing or cannot be written.
    """
    record = Record.from_module(qmodel)
    gm = unwrap(qmodel)
    assert isinstance(gm, GraphModule)
    tensors = {name: value.detach().cpu() for name, value in _state_of(gm).items()}
    quantizers: dict[str, Any] = {}
    cats: dict[str, list[int]] = {}
    for node, module in called(gm):
        name = str(node.target)
        if isinstance(module, QuantizedLayer):
            quantizer = module.weight_quantizer
            tensors[f"{name}.weight"] = pack((module.codes() - quantizer.spec.qmin).to(torch.uint8).cpu(), quantizer.spec.bits)
            quantizers[f"{name}.weight_quantizer"] = {**quantizer.spec.to_dict(), "shape": list(module.weight.shape)}
        elif isinstance(module, UniformQuantizer):
            quantizers[name] = module.spec.to_dict()
        elif isinstance(module, LogQuantizer):
            quantizers[name] = {**module.spec.to_dict(), "grid": module.grid}
        elif isinstance(module, CAT):
            cats[name] = [module.classes, module.clusters]
    for name, spec in quantizers.items():
        if f"{name}.zero_point" in tensors:
            tensors[f"{name}.zero_point"] = (tensors[f"{name}.zero_point"] - _spec(spec).qmin).to(torch.uint8)
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    header = {"version": VERSION, "record": record.to_dict(), "quantizers": quantizers, "cat": cats}
    header["checksum"] = checksum(json.dumps(header), tensors)
    try:
        write_whole(Path(path), to_bytes(tensors, {FORMAT: json.dumps(header)}))
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error}", where=str(path), fix="Check the folder, its permissions and the free space"
        ) from error


def load(path: str | os.PathLike[str], model: nn.Module) -> GraphModule:
    """Return the quantized network in `path`, on the CPU, rebuilt from its float architecture; outputs are bit-identical to the saved ones.

    Args:
        path: a file that `save` wrote.
        model: the float architecture (or what `fxquant.trace` made of it); its weights do not matter and it is not changed.

    Raises:
        StorageError: the file is missing, damaged, truncated, foreign, of a newer version, or belongs to another architecture.
        ModelError: `model` is no float network with weights.
        TraceError: `model` holds something that cannot be copied.
    """
    path = Path(path)
    header, tensors = _read(path)
    quantizers, cats = header["quantizers"], header["cat"]
    record = Record.from_dict(header["record"])
    dtype = getattr(torch, record.input_dtype)
    example = torch.zeros(2, *record.input_shape, dtype=dtype)
    network = copied(check_network(model, architecture=True)).eval().cpu()
    network = network.double() if dtype == torch.float64 else network.float()  # `to` would take the imaginary part of complex weights
    try:
        gm = network if isinstance(network, GraphModule) and is_traced(network) else trace(network, example)
    except TraceError as error:
        raise _foreign(path, f"images of shape {list(record.input_shape)} do not go through the network ({error})") from error
    del network  # `trace` made a copy of its own
    gm = Pipeline([step() for step in PREPARE]).run(gm)
    _compare_graphs(path, gm, record.graph)

    def quantizer(name: str) -> UniformQuantizer:
        spec = _spec(quantizers[name])
        scale = tensors.pop(f"{name}.scale")
        zero_point = tensors.pop(f"{name}.zero_point").to(scale) + spec.qmin
        if f"{name}.outlier" in tensors:
            return DualQuantizer(spec, scale, zero_point, tensors.pop(f"{name}.outlier"))
        return UniformQuantizer(spec, scale, zero_point)

    def activation(tensor: TensorPlan, observer: Observer) -> UniformQuantizer | LogQuantizer:
        name = quantizer_path(tensor.node)
        stored = quantizers[name]
        return LogQuantizer(_spec(stored), tensors.pop(f"{name}.scale"), stored["grid"]) if "grid" in stored else quantizer(name)

    def weight(layer: LayerPlan, module: nn.Module) -> UniformQuantizer:
        return quantizer(f"{layer.name}.weight_quantizer")

    try:
        gm = Pipeline([InsertObservers(record.plan), InsertFakeQuant(record.plan, activation, weight)]).run(gm)
    except (KeyError, ConfigError) as error:
        raise _foreign(path, f"its quantizers do not fit: {error}") from error
    for name, (classes, clusters) in cats.items():
        logits = logits_node(gm)
        if isinstance(logits, str):
            raise _foreign(path, f"the network {logits}")
        put_module(gm, name, CAT(classes, clusters, dtype=dtype))
        insert_behind(logits, name)
    _fill(path, gm, tensors, quantizers)
    gm = Pipeline([Freeze()]).run(gm)
    gm.graph.lint()
    gm.recompile()
    record.attach(gm)
    return gm.eval()


def _fill(path: Path, gm: GraphModule, tensors: dict[str, Tensor], quantizers: Mapping[str, Any]) -> None:
    """Put the stored weights, biases and buffers into `gm`, all of them or none."""
    for node, layer in called(gm):
        name = str(node.target)
        if isinstance(layer, QuantizedLayer):
            spec = quantizers[f"{name}.weight_quantizer"]
            count = torch.Size(spec["shape"]).numel()
            codes = unpack(tensors[f"{name}.weight"], spec["bits"], count).view(spec["shape"])
            quantizer = layer.weight_quantizer
            weight = codes.to(quantizer.scale) + quantizer.spec.qmin
            tensors[f"{name}.weight"] = weight - quantizer.along(quantizer.zero_point, weight)
            tensors |= {f"{name}.weight_quantizer.{key}": value for key, value in quantizer.state_dict().items()}
            layer.frozen = True
        elif isinstance(layer, UniformQuantizer | LogQuantizer):
            tensors |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
        if kind(node) in WEIGHTED and layer.bias is None and f"{name}.bias" in tensors:
            layer.bias = nn.Parameter(torch.empty_like(tensors[f"{name}.bias"]), requires_grad=False)
    wanted = _state_of(gm)
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise _foreign(path, f"{name} is {'missing in the file' if name in wanted else 'not part of the network'}")
    for name, value in wanted.items():
        if value.shape != tensors[name].shape:
            raise _foreign(path, f"{name} has shape {list(tensors[name].shape)}, the network wants {list(value.shape)}")
    for name, old in wanted.items():
        owner, _, leaf = name.rpartition(".")
        new = nn.Parameter(tensors[name], requires_grad=False) if isinstance(old, nn.Parameter) else tensors[name]
        setattr(gm.get_submodule(owner), leaf, new)


def _spec(stored: Mapping[str, Any]) -> QuantSpec:
    """Return the integers of a stored quantizer; beside them are the shape of a weight, and the grid where it is not uniform."""
    return QuantSpec.from_dict({key: value for key, value in stored.items() if key not in ("shape", "grid")})


def _state_of(gm: GraphModule) -> dict[str, Tensor]:
    """Return all tensors of `gm`, by name, those too that a state_dict leaves out, but for what is a copy of another tensor."""
    copies = {f"{node.target}.input_scale" for node, module in called(gm) if isinstance(module, QuantizedLayer)}
    tensors = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    return {name: value for name, value in tensors if name not in copies}


def _compare_graphs(path: Path, gm: GraphModule, saved: list[str]) -> None:
    lines = fingerprint(gm)
    if lines == saved:
        return
    nodes = list(gm.graph.nodes)
    place = next((i for i, (a, b) in enumerate(zip(lines, saved, strict=False)) if a != b), min(len(lines), len(saved)))
    where = nodes[place].format_node() if place < len(nodes) else "its end"
    raise _foreign(path, f"it was made from a graph of {len(saved)} nodes, this network has {len(lines)}; they part at {where}")


def _foreign(path: Path, problem: str) -> StorageError:
    return StorageError(
        f"belongs to another architecture: {problem}",
        where=str(path),
        fix="Build the network as it was when it was quantized (same library versions, same arguments); where passes such as "
        "EqualizeChannels changed its graph in front, run them again and pass that graph",
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise StorageError("is no file", where=str(path), fix="Check the path")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copies, since the file is anywhere in memory, and kernels round by how their operands are aligned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StorageError(
            f"is damaged, truncated, or no safetensors file ({error})", where=str(path), fix="Copy it again, or save it anew"
        ) from error
    if FORMAT not in metadata:
        raise StorageError("is a safetensors file, but not one of fxquant", where=str(path), fix="Load a file that fxquant.save wrote")
    try:
        header = json.loads(metadata[FORMAT])
        version, expected = header["version"], header.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError("is damaged: its header cannot be read", where=str(path), fix="Copy it again, or save it anew") from error
    if version != VERSION:
        raise StorageError(f"has format version {version!r}, this fxquant reads {VERSION}", where=str(path), fix="Upgrade fxquant")
    if expected != checksum(json.dumps(header), tensors):
        raise StorageError("is damaged: its checksum does not match", where=str(path), fix="Copy it again, or save it anew")
    return header, tensors
