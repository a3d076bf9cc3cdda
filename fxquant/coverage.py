"""How much of a network's work is done on quantized operands: multiply-adds, counted while one image goes through the graph.

    relu -[q]-> conv(Wq)            counts as quantized: so many multiply-adds
    images ---> conv(Wq)            float: reads the images
    lstm                            float: opaque
    deform_conv2d(W)                float: has a weight, and multiply-adds that are not known

The counts are those of `torch.utils.flop_counter` (convolutions, matrix products and attention, whoever calls them), so what a module that
stayed opaque does counts too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode

from fxquant.execution import sweep
from fxquant.graph import constant_of, is_tensor, module_of
from fxquant.kinds import QUANTIZED, WEIGHTED, kind
from fxquant.placement import layer_name, operands, source
from fxquant.quantizers import LogQuantizer, UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.tracing.attention import without_fast_path

_COUNTED = ("torch", "_operator", "builtins", "math")
"""Homes of functions that the counter knows, or that do not multiply (but for ``F.bilinear``); operations of libraries
(``torch._ops.torchvision``) are neither."""
_NO_PRODUCTS = (nn.Embedding, nn.EmbeddingBag, nn.RMSNorm)
"""Modules whose weights are looked up, or scale element by element."""


@dataclass(frozen=True)
class Work:
    """The multiply-adds of one node for one image, and why they are not on quantized operands (nothing: they are)."""

    name: str
    multiply_adds: int
    float_because: str = ""


def count_work(gm: GraphModule, image: Tensor) -> list[Work]:
    """Return every node of `gm`, float or quantized, that multiplies and adds; with 0 what has a weight, and a count that is not known.

    Args:
        gm: a graph whose nodes carry ``meta["val"]``.
        image: ``[1, C, H, W]``, on the device of `gm`.
    """
    found, before = [], 0
    with _Counter() as counter:
        for node, _ in sweep(gm, [image]):
            total = counter.get_total_flops()
            if total > before:
                found.append(Work(layer_name(node), (total - before) // 2, _why_float(node)))
            elif _hides_work(node):
                found.append(Work(layer_name(node), 0, "has a weight, and multiply-adds that are not known"))
            before = total
    return found


def count_multiply_adds(network: Callable[[Tensor], Any], image: Tensor) -> int:
    """Return the multiply-adds of any network for one image, graph or not."""
    with torch.no_grad(), without_fast_path(), _Counter() as counter:  # a fused encoder layer would hide what it multiplies
        network(image)
    return counter.get_total_flops() // 2


def summary(work: list[Work]) -> dict[str, Any]:
    """Return the sums and all work on floats, the largest first, as JSON-able values: what a record keeps."""
    floats = sorted((row for row in work if row.float_because), key=lambda row: -row.multiply_adds)
    total = sum(row.multiply_adds for row in work)
    left = [[row.name, row.multiply_adds, row.float_because] for row in floats]
    return {"all": total, "quantized": total - sum(row.multiply_adds for row in floats), "float": left}


def share_quantized(work: Mapping[str, Any]) -> float:
    """Return the share of what `summary` gives that is on quantized operands, from 0 to 1; 1 where there is nothing to count."""
    return work["quantized"] / work["all"] if work["all"] else 1.0


def describe_work(work: Mapping[str, Any]) -> str:
    """Return what `summary` gives as one line."""
    text = f"{work['all'] / 1e6:,.2f} million multiply-adds an image, {100 * share_quantized(work):.2f} % on quantized operands"
    counted = [f"{name} {100 * count / work['all']:.2f} % ({why})" for name, count, why in work["float"] if count]
    left = counted[:3] + ([f"{len(counted) - 3} more in the record's work"] if len(counted) > 3 else [])
    left += [f"{name} ({why})" for name, count, why in work["float"] if not count]
    return f"{text}; float: {', '.join(left)}" if left else text


class _Counter(FlopCounterMode):
    """Torch's counter without its table, with recurrent layers and attention on processors, and without its hooks on every module."""

    def __init__(self) -> None:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # some releases of torch leave it out
        super().__init__(display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops, attention: _attention_flops})
        self.mod_tracker = _Nowhere()  # type: ignore[assignment]


class _Nowhere(AbstractContextManager[None]):
    """Stands for the tracker of modules, which puts hooks on parameters that a module is called with, and fails without gradients."""

    parents = frozenset({"Global"})

    def __exit__(self, *error: object) -> None:
        pass


def _recurrent_flops(inputs: Any, input_weight: Any, state_weight: Any, *_: Any, **__: Any) -> int:
    """Return the operations of one recurrent layer from shapes: every step of every row is multiplied with both weights."""
    return 2 * math.prod(inputs[:-1]) * (math.prod(input_weight) + math.prod(state_weight))


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Return the operations of one fused attention from shapes ``[..., L, d]``: those of both matrix products."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _hides_work(node: Node) -> bool:
    """Say whether `node` computes something that torch's counter does not know from a weight of two axes or more."""
    if node.op == "call_module":
        module = module_of(node)
        return kind(node) == "other" and type(module) not in _NO_PRODUCTS and any(value.ndim > 1 for value in module.parameters())
    home = str(getattr(node.target, "__module__", ""))
    known = home == "torch._ops.aten" or (home.partition(".")[0] in _COUNTED and not home.startswith("torch._ops."))
    if node.op != "call_function" or (known and node.target is not F.bilinear):
        return False
    weights = (constant_of(other) for other in node.all_input_nodes)
    return any(isinstance(value, nn.Parameter) and value.ndim > 1 for value in weights)


def _why_float(node: Node) -> str:
    word = kind(node)
    if word not in QUANTIZED:
        return "opaque" if node.op == "call_module" else f"{word} operation"
    if word in WEIGHTED and not (node.op == "call_module" and isinstance(module_of(node), QuantizedLayer)):
        return "its weight is float" if node.op == "call_module" else "its weight is computed"
    given = operands(node)
    needed = {"matmul": 2, "attention": 3}.get(word, 1)
    if len(given) < needed and node.target is not torch.einsum:
        return "an operand is no tensor of its own"
    for operand in given:
        made_by = source(operand)
        if not (made_by.op == "call_module" and isinstance(module_of(made_by), UniformQuantizer | LogQuantizer)):
            what = {"input": "the images", "constant": "a constant"}.get(kind(made_by), made_by.name)
            return f"reads {what} in float" if is_tensor(made_by) else f"reads {made_by.name}, which is no tensor"
    return ""
