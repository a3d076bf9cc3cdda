"""OpenAttention: fused attention becomes two matrix products and a softmax."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph import bypass, constant_of, device_of, free_path, is_tensor, put_constant
from fxquant.kinds import WEIGHTED, kind
from fxquant.passes.canonicalize import Canonicalize
from fxquant.pipeline import Pass, Skip
from fxquant.tracing.values import insert_before

_ARGUMENTS = {"query": None, "key": None, "value": None, "attn_mask": None, "dropout_p": 0.0, "is_causal": False}
_OPTIONS = {"scale": None, "enable_gqa": False}
_ARITHMETIC = {"add", "sub", "mul", "sigmoid", "tanh", "relu", "gelu", "silu", "mean"}
_FINITE = _ARITHMETIC | WEIGHTED | {"input", "constant", "view", "getitem", "concat"}
"""Kinds that make finite values from finite ones."""


class OpenAttention(Pass):
    """Write ``F.scaled_dot_product_attention`` out, so that the operands of both its matrix products can be quantized.

        q, k, v -> attention                        =>     s q, k^T -> matmul -> + mask -> softmax, v -> matmul

        y = softmax(s q k^T + mask) v,      s = 1 / sqrt(d) unless given

    A boolean mask (True: take part) and a causal one (``j <= i``, aligned top left) put -inf where they forbid; with ``enable_gqa`` heads
    of k and v are repeated. A row that may look at nothing gives zeros, as torch does; the softmax of such a row is uniform here, and its
    product is overwritten, so that no NaN reaches a quantizer. Refused while it drops values at random: ``dropout_p`` of the function does
    not know of eval mode.
    """

    after = (Canonicalize,)
    preserves_output = True
    verb = "opened"

    def run(self, gm: GraphModule) -> None:
        self.causal = dict[tuple[int, int], str]()
        super().run(gm)

    def match(self, node: Node) -> dict[str, Any] | Skip | None:
        if kind(node) != "attention":
            return None
        given: dict[str, Any] = {**_ARGUMENTS, **_OPTIONS, **dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
        tensors = [given[name] for name in ("query", "key", "value", "attn_mask") if name != "attn_mask" or given[name] is not None]
        if not all(isinstance(part, Node) and is_tensor(part) for part in tensors):
            return Skip("the shapes of what it reads are not known")
        dropout, causal = given["dropout_p"], given["is_causal"]
        if isinstance(dropout, Node) or dropout > 0:
            how = "is computed" if isinstance(dropout, Node) else f"is {dropout}"
            return Skip(f"its dropout_p {how}, which drops values in eval mode too; write dropout_p=self.p if self.training else 0.0")
        if causal and given["attn_mask"] is not None:
            return Skip("has a mask and is_causal=True, of which torch takes one")
        query, key = (part.meta["val"].shape for part in tensors[:2])
        if not all(isinstance(size, int) for size in (query[-1], *((query[-2], key[-2]) if causal else ()))):
            return Skip("its head or, being causal, its length depends on the batch size")
        return given

    def rewrite(self, gm: GraphModule, node: Node, match: object) -> None:
        assert isinstance(match, dict)
        query, key, value, mask = (match[name] for name in ("query", "key", "value", "attn_mask"))

        def add(target: Any, *args: Any) -> Node:
            return insert_before(node, target, *args)

        def repeated(part: Node) -> Node:
            axes, times = part.meta["val"].ndim, _heads(query) // _heads(part)
            return add("flatten", add("expand", add("unsqueeze", part, -3), *[-1] * (axes - 2), times, -1, -1), -4, -3)

        if match["enable_gqa"]:
            key, value = (part if _heads(part) == _heads(query) else repeated(part) for part in (key, value))
        scale = 1 / math.sqrt(query.meta["val"].shape[-1]) if match["scale"] is None else match["scale"]
        scores = add(torch.matmul, add(operator.mul, query, scale), add("transpose", key, -2, -1))
        blind = None
        if match["is_causal"]:
            future = add("get_attr", self._future(gm, *scores.meta["val"].shape[-2:]))
            scores = add("masked_fill", scores, future, -math.inf)
        elif mask is not None:
            allowed, may_blind = mask.meta["val"].dtype == torch.bool, _may_blind(mask)
            blocked = add(torch.logical_not, mask) if allowed else add(torch.eq, mask, -math.inf) if may_blind else None
            # Half of the lowest number, since a finite score is added to it.
            low = torch.finfo(scores.meta["val"].dtype).min / 2 if may_blind else -math.inf
            if allowed:
                scores = add("masked_fill", scores, blocked, low)
            else:
                scores = add(operator.add, scores, add("clamp_min", mask, low) if may_blind else mask)
            blind = add(torch.all, blocked, -1, True) if may_blind else None
        mixed = add(torch.matmul, add(F.softmax, scores, -1), value)
        bypass(node, mixed if blind is None else add("masked_fill", mixed, blind, 0.0))

    def _future(self, gm: GraphModule, queries: int, keys: int) -> str:
        """Return the path of a buffer ``[queries, keys]``, True where a query must not look; calls of one size share it."""
        if (queries, keys) not in self.causal:
            path = self.causal[queries, keys] = free_path(gm, f"future_{queries}x{keys}")
            put_constant(gm, path, torch.ones(queries, keys, dtype=torch.bool, device=device_of(gm)).triu(1))
        return self.causal[queries, keys]


def _heads(node: Node) -> int:
    return node.meta["val"].shape[-3]


def _may_blind(mask: Node) -> bool:
    """Say whether a row of `mask` may forbid everything; those of a buffer are looked at, of a computed mask its arithmetic is."""
    stored = _buffer_of(mask)
    if stored is not None:
        return bool((~stored if stored.dtype == torch.bool else stored == -math.inf).all(-1).any())
    return mask.meta["val"].dtype == torch.bool or not _is_finite(mask)


def _buffer_of(node: Node) -> Tensor | None:
    """Return the buffer that `node` reads. A parameter passes for finite: its values, which a file may bring, have no say in the graph."""
    stored = constant_of(node)
    return None if isinstance(stored, nn.Parameter) else stored


def _is_finite(node: Node) -> bool:
    """Say whether `node` surely holds no infinity: made of finite constants and the images by arithmetic that stays finite."""
    todo, seen = [node], set[Node]()
    while todo:
        current = todo.pop()
        seen.add(current)
        stored = _buffer_of(current)
        numbers = [value for value in (*current.args, *current.kwargs.values()) if isinstance(value, float)]
        if stored is not None and not bool(stored.isfinite().all()):
            return False
        if is_tensor(current) and (kind(current) not in _FINITE or not all(map(math.isfinite, numbers))):
            return False
        todo += [parent for parent in current.all_input_nodes if parent not in seen]
    return True
