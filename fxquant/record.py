"""The record of a run: what was asked, what every pass did, what every layer costs. It travels with the GraphModule and its file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.coverage import count_work, summary
from fxquant.errors import ModelError
from fxquant.execution import sweep
from fxquant.graph import called, fingerprint
from fxquant.metrics import sqnr
from fxquant.pipeline import PassLog
from fxquant.placement import Plan, layer_name
from fxquant.quantizers.dual import DualQuantizer
from fxquant.quantizers.layers import QuantizedLayer, channel_axis
from fxquant.recipe import Recipe
from fxquant.tracing.leaves import unwrap

META_KEY = "fxquant"
"""The key of ``GraphModule.meta`` under which the record is kept; it survives ``copy.deepcopy``."""


@dataclass
class LayerRow:
    """One line of the report: signal-to-noise in dB (None where nothing was quantized), sizes in bytes.

    The signal-to-noise of a weight is that of its shape: each output channel is scaled to fit before it is measured.
    """

    name: str
    kind: str
    w: int | None
    a: int | None
    edge: str
    weight_sqnr: float | None
    output_sqnr: float | None
    bytes: int
    float_bytes: int


@dataclass
class Record:
    """Everything a report or a file needs to know about a run; JSON-able through `to_dict`."""

    recipe: Recipe
    plan: Plan
    edges: str
    seed: int
    images: int
    input_shape: tuple[int, ...]
    input_dtype: str
    passes: list[PassLog] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)
    cat: dict[str, Any] = field(default_factory=dict)
    work: dict[str, Any] = field(default_factory=dict)
    """Multiply-adds for one image: ``"all"``, those ``"quantized"``, and ``"float"`` ones as ``[name, count, why]``, the largest first
    (count 0: not known)."""
    graph: list[str] = field(default_factory=list)
    """Fingerprint of the float graph that was quantized (`fxquant.graph.fingerprint`)."""
    torch_version: str = torch.__version__
    lowered: str = ""
    """The backend whose integers the network computes on; a simulation has none."""

    @classmethod
    def of(cls, recipe: Recipe, plan: Plan, edges: str, seed: int, batches: Sequence[Tensor], teacher: GraphModule) -> Record:
        """Start a record; `batches` are the calibration images, `teacher` is the float graph that will be quantized."""
        shape, kind = tuple(batches[0].shape[1:]), str(batches[0].dtype).removeprefix("torch.")
        return cls(recipe, plan, edges, seed, sum(map(len, batches)), shape, kind, graph=fingerprint(teacher))

    def measure(self, teacher: GraphModule, student: GraphModule, batches: Sequence[Tensor]) -> None:
        """Note what every layer of `student` costs against the float `teacher` on `batches`, and how much work is on quantized operands."""
        self.layers = layer_rows(teacher, student, self.plan, batches)
        self.work = summary(count_work(student, batches[0][:1]))

    def attach(self, gm: GraphModule) -> None:
        """Keep the record with `gm`."""
        gm.meta[META_KEY] = self

    @staticmethod
    def from_module(model: nn.Module, lowered: bool = False) -> Record:
        """Return the record of a quantized network.

        Args:
            model: the network.
            lowered: take one that was lowered to integers, too.

        Raises:
            ModelError: the network was not made by fxquant, or is lowered.
        """
        model = unwrap(model) if isinstance(model, nn.Module) else model
        record = getattr(model, "meta", {}).get(META_KEY) if isinstance(model, GraphModule) else None
        if not isinstance(record, Record):
            raise ModelError(
                "carries no record of a quantization", where=type(model).__name__, fix="Pass what fxquant.quantize or fxquant.load returned"
            )
        if record.lowered and not lowered:
            raise ModelError(
                f"is lowered to integers (backend {record.lowered!r})",
                where=type(model).__name__,
                fix="Pass the simulation that it was lowered from",
            )
        return record

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings; no times (same seed, same record), infinite noise ratios as ``"inf"``."""
        rows = [{key: "inf" if value == math.inf else value for key, value in asdict(row).items()} for row in self.layers]
        return {
            "recipe": self.recipe.to_dict(),
            "plan": self.plan.to_dict(),
            "edges": self.edges,
            "seed": self.seed,
            "images": self.images,
            "input_shape": list(self.input_shape),
            "input_dtype": self.input_dtype,
            "passes": [{key: value for key, value in asdict(log).items() if key != "milliseconds"} for log in self.passes],
            "layers": rows,
            "cat": self.cat,
            "work": self.work,
            "graph": self.graph,
            "torch_version": self.torch_version,
            "lowered": self.lowered,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """Return the record that `to_dict` wrote."""
        plain: list[dict[str, Any]] = [{key: math.inf if value == "inf" else value for key, value in row.items()} for row in data["layers"]]
        rows = [LayerRow(**row) for row in plain]
        logs = [PassLog(**{**log, "skipped": [(where, why) for where, why in log["skipped"]]}) for log in data["passes"]]
        given = {key: data[key] for key in ("edges", "seed", "images", "input_dtype", "cat", "graph", "torch_version")}
        return cls(
            recipe=Recipe.from_dict({"activation_error": "absolute", **data["recipe"]}),  # what files without this field were made with
            plan=Plan.from_dict(data["plan"]),
            input_shape=tuple(data["input_shape"]),
            passes=logs,
            layers=rows,
            work=data.get("work", {}),
            lowered=data.get("lowered", ""),
            **given,
        )


def layer_rows(teacher: GraphModule, student: GraphModule, plan: Plan, batches: Sequence[Tensor]) -> list[LayerRow]:
    """Measure every planned layer of `student` against the float `teacher` on `batches`; outputs see all errors in front of them."""
    noise: dict[str, float] = {}
    ahead = (item for item in sweep(teacher, batches) if layer_name(item[0]) in plan.layers)
    for node, values in sweep(student, batches):
        if layer_name(node) in plan.layers:
            wanted, signal = next(ahead)
            assert layer_name(wanted) == layer_name(node), "the student has the layers of its teacher, in their order"
            noise[layer_name(node)] = sqnr(*(torch.cat([value.flatten() for value in part]) for part in (signal, values)))
    teachers, students = (({str(node.target): module for node, module in called(gm)}) for gm in (teacher, student))
    rows = []
    for name, layer in plan.layers.items():
        mine, theirs = students.get(name), teachers.get(name)
        weight_noise = None
        if isinstance(mine, QuantizedLayer) and theirs is not None:
            assert isinstance(theirs.weight, Tensor)
            weight_noise = sqnr(theirs.weight.detach(), _without_gain(theirs.weight.detach(), mine))
        sizes = stored_bytes(mine), stored_bytes(theirs)
        rows.append(LayerRow(name, layer.kind, layer.w, layer.a, layer.edge, weight_noise, noise.get(name), *sizes))
    return rows


def _without_gain(weight: Tensor, layer: QuantizedLayer) -> Tensor:
    """Return the weight of `layer` with each output channel scaled to fit `weight` best: corrections scale channels on purpose."""
    axis = channel_axis(layer)
    mine = layer.used_weight().detach()
    others = [other for other in range(weight.ndim) if other != axis]
    gain = (mine * weight).sum(others, keepdim=True) / (mine * mine).sum(others, keepdim=True).clamp_min(1e-30)
    return gain * mine


def stored_bytes(module: nn.Module | None) -> int:
    """Return the bytes that `module` takes in a file: a quantized weight as dense codes, a scale and a one-byte zero-point a grid."""
    if module is None:
        return 0
    if not isinstance(module, QuantizedLayer):
        return sum(value.numel() * value.element_size() for value in module.state_dict().values())
    quantizer = module.weight_quantizer
    codes = -(-module.weight.numel() * quantizer.spec.bits // 8)
    channels = quantizer.scale.numel()
    bias = 0 if module.bias is None else module.bias.numel() * module.bias.element_size()
    named = len(quantizer.outlier) if isinstance(quantizer, DualQuantizer) else 0
    return codes + channels * (quantizer.scale.element_size() + 1) + named + bias
