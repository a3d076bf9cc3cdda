"""One safetensors file for a quantized network: dense integer weights, scales, CAT, recipe and report. No pickle.

    save:  weight [C, ...] float on its grid  ->  codes  ->  bits packed densely      "conv1.weight"            uint8
                                                  scale, zero-point a channel         "conv1.weight_quantizer.scale", ".zero_point"
           everything else                                                            as it is
    load:  float architecture -> trace -> PREPARE -> place quantizers as recorded -> fill in

A file is written beside its place and moved there when complete. A file is read and checked as a whole (length, checksum, version, the
graph it was made from, every name, shape and type) before a network is built from it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.cat import CAT
from fxquant.errors import ConfigError, StorageError
from fxquant.graph import called, fingerprint, insert_behind, is_traced, put_module
from fxquant.kinds import WEIGHTED, kind
from fxquant.packing import pack, unpack
from fxquant.passes import PREPARE, InsertFakeQuant, InsertObservers
from fxquant.passes.append_cat import logits_node
from fxquant.passes.insert_observers import FOLDER
from fxquant.pipeline import Pipeline
from fxquant.placement import LayerPlan, TensorPlan
from fxquant.quantizers import HistogramObserver, QuantSpec, UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.record import Record
from fxquant.tracing import trace
from fxquant.tracing.leaves import unwrap

FORMAT = "fxquant"
VERSION = 1
_HEADER = ("record", "quantizers", "cat", "graph")


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
    tensors = {name: value.detach().cpu() for name, value in gm.state_dict().items()}
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
        elif isinstance(module, CAT):
            cats[name] = [module.classes, module.clusters]
    for name, spec in quantizers.items():
        qmin = QuantSpec.from_dict({key: value for key, value in spec.items() if key != "shape"}).qmin
        tensors[f"{name}.zero_point"] = (tensors[f"{name}.zero_point"] - qmin).to(torch.uint8)
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    parts = (record.to_dict(), quantizers, cats, record.graph)
    header = {"format": FORMAT, "version": str(VERSION), **{k: json.dumps(v) for k, v in zip(_HEADER, parts, strict=True)}}
    header["checksum"] = _checksum(header, tensors)
    _write(Path(path), to_bytes(tensors, header))


def load(path: str | os.PathLike[str], model: nn.Module) -> GraphModule:
    """Return the quantized network in `path`, rebuilt from its float architecture; outputs are bit-identical to those of the saved one.

    Args:
        path: a file that `save` wrote.
        model: the float architecture (or what `fxquant.trace` made of it); its weights do not matter and it is not changed.

    Raises:
        StorageError: the file is missing, damaged, truncated, foreign, of a newer version, or belongs to another architecture.
        TraceError: `model` cannot be traced.
    """
    path = Path(path)
    header, tensors = _read(path)
    data, quantizers, cats, graph = (json.loads(header[part]) for part in _HEADER)
    record = Record.from_dict({**data, "graph": graph})
    dtype = getattr(torch, record.input_dtype)
    example = torch.zeros(2, *record.input_shape, dtype=dtype)
    gm = copy.deepcopy(model) if is_traced(model) else trace(copy.deepcopy(model).eval().to("cpu", dtype), example)
    gm = Pipeline([step() for step in PREPARE]).run(gm)
    _compare_graphs(path, gm, graph)

    def quantizer(name: str) -> UniformQuantizer:
        spec = QuantSpec.from_dict({key: value for key, value in quantizers[name].items() if key != "shape"})
        scale = tensors.pop(f"{name}.scale")
        return UniformQuantizer(spec, scale, tensors.pop(f"{name}.zero_point").to(scale) + spec.qmin)

    def activation(tensor: TensorPlan, observer: HistogramObserver) -> UniformQuantizer:
        return quantizer(f"{FOLDER}.{tensor.node}")

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
            tensors[f"{name}.weight"] = quantizer.dequantize(codes.to(quantizer.scale) + quantizer.spec.qmin)
            tensors |= {f"{name}.weight_quantizer.{key}": value for key, value in quantizer.state_dict().items()}
            layer.frozen = True
        elif isinstance(layer, UniformQuantizer):
            tensors |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
        if kind(node) in WEIGHTED and layer.bias is None and f"{name}.bias" in tensors:
            layer.bias = nn.Parameter(torch.empty_like(tensors[f"{name}.bias"]), requires_grad=False)
    wanted = gm.state_dict()
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise _foreign(path, f"{name} is {'missing in the file' if name in wanted else 'not part of the network'}")
    for name, value in wanted.items():
        if value.shape != tensors[name].shape:
            raise _foreign(path, f"{name} has shape {list(tensors[name].shape)}, the network wants {list(value.shape)}")
    gm.load_state_dict(tensors, assign=True)
    gm.requires_grad_(False)


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
        fix="Build the network as it was when it was quantized (same library versions, same arguments)",
    )


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise StorageError("is no file", where=str(path), fix="Check the path")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StorageError(
            f"is damaged, truncated, or no safetensors file ({error})", where=str(path), fix="Copy it again, or save it anew"
        ) from error
    if header.get("format") != FORMAT:
        raise StorageError("is a safetensors file, but not one of fxquant", where=str(path), fix="Load a file that fxquant.save wrote")
    if not header.get("version", "").isdigit() or int(header["version"]) > VERSION:
        raise StorageError(
            f"has format version {header.get('version')}, this fxquant reads up to {VERSION}", where=str(path), fix="Upgrade fxquant"
        )
    if header.get("checksum") != _checksum(header, tensors):
        raise StorageError("is damaged: its checksum does not match", where=str(path), fix="Copy it again, or save it anew")
    return header, tensors


def _checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for part in ("version", *_HEADER):
        digest.update(header.get(part, "").encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write beside the file, then move over it: whoever opens `path` finds the old file or the whole new one."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error}", where=str(path), fix="Check the folder, its permissions and the free space"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
