"""Multi-head attention written out in linears, matrix products and a softmax.

`torch.nn.MultiheadAttention` ends in one opaque call in which neither the weights nor the two matrix products can be seen,
let alone quantized. The tracer puts this in its place, with the batch in front throughout:

    q, k, v  =  linear(x, W_in, b_in)            [N, L, 3E]  ->  3 x [N, heads, L, E/heads]
    P        =  softmax(q k^T / sqrt(E/heads) + mask)
    y        =  linear(P v, W_out, b_out)        [N, L, E]

Where there is a mask, and nobody asks for the weights P, the middle stays `scaled_dot_product_attention`, as in torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Let torch's attention and encoder layers call what they are made of, in place of one fused operation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def explicit_forward(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `module.forward` computes, from the same arguments."""
    return _attend(
        query,
        key,
        value,
        heads=module.num_heads,
        batch_first=module.batch_first,
        in_proj=None if module.in_proj_weight is None else module.in_proj_weight,
        separate=(module.q_proj_weight, module.k_proj_weight, module.v_proj_weight),
        in_bias=module.in_proj_bias,
        bias_kv=(module.bias_k, module.bias_v),
        add_zero_attn=module.add_zero_attn,
        out_proj=(module.out_proj.weight, module.out_proj.bias),
        dropout=module.dropout if module.training else 0.0,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        average=average_attn_weights,
        is_causal=is_causal,
    )


def explicit_functional(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `torch.nn.functional.multi_head_attention_forward` computes, from the same arguments.

    Raises:
        NotImplementedError: for `static_k` and `static_v`, which no module of torch uses.
    """
    if static_k is not None or static_v is not None:
        raise NotImplementedError("multi_head_attention_forward with static_k or static_v")
    return _attend(
        query,
        key,
        value,
        heads=num_heads,
        batch_first=False,
        in_proj=None if use_separate_proj_weight else in_proj_weight,
        separate=(q_proj_weight, k_proj_weight, v_proj_weight),
        in_bias=in_proj_bias,
        bias_kv=(bias_k, bias_v),
        add_zero_attn=add_zero_attn,
        out_proj=(out_proj_weight, out_proj_bias),
        dropout=dropout_p if training else 0.0,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        average=average_attn_weights,
        is_causal=is_causal,
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    batch_first: bool,
    in_proj: Tensor | None,
    separate: tuple[Tensor | None, Tensor | None, Tensor | None],
    in_bias: Tensor | None,
    bias_kv: tuple[Tensor | None, Tensor | None],
    add_zero_attn: bool,
    out_proj: tuple[Tensor, Tensor | None],
    dropout: float,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    batched = query.dim() == 3
    to_batch_first = _rearrangement(batched, batch_first)
    query, key, value = _map_same(to_batch_first, query, key, value)
    n, length, embed = query.shape
    size = embed // heads

    if is_causal and attn_mask is None:
        raise ValueError("is_causal is a hint about attn_mask and needs one")
    # Without weights to return and without padding, torch takes the hint for the mask; the mask itself is not read.
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if causal else _additive(attn_mask, query.dtype)
    padding = _additive(key_padding_mask, query.dtype)
    if mask is not None and mask.dim() == 3:
        mask = mask.reshape(n, heads, length, mask.shape[-1]) if batched else mask
    if padding is not None:
        padding = padding.reshape(n, 1, 1, padding.shape[-1])

    q, k, v = _project(query, key, value, in_proj, separate, in_bias)
    if bias_kv[0] is not None and bias_kv[1] is not None:
        k = torch.cat([k, bias_kv[0].expand(n, 1, embed)], dim=1)
        v = torch.cat([v, bias_kv[1].expand(n, 1, embed)], dim=1)
        mask, padding = _one_more_key(mask), _one_more_key(padding)
    q, k, v = (t.reshape(n, t.shape[1], heads, size).transpose(1, 2) for t in (q, k, v))
    if add_zero_attn:
        zeros = k.new_zeros(n, heads, 1, size)
        k, v = torch.cat([k, zeros], dim=2), torch.cat([v, zeros], dim=2)
        mask, padding = _one_more_key(mask), _one_more_key(padding)
    if causal:
        mask = _causal(length, k.shape[2], query)

    if not need_weights and not (mask is None and padding is None):
        # Queries that must look at nothing get zeros from this call; `OpenAttention` takes it apart, and knows which masks have such.
        masks = [extra for extra in (mask, padding) if extra is not None]
        mixed = F.scaled_dot_product_attention(q, k, v, sum(masks[1:], masks[0]), dropout)
        return _joined(mixed.transpose(1, 2).reshape(n, length, embed), out_proj, batched, batch_first), None
    scores = torch.matmul(q * math.sqrt(1.0 / size), k.transpose(-2, -1))
    for extra in (mask, padding):
        scores = scores if extra is None else scores + extra
    weights = F.softmax(scores, dim=-1)
    if dropout > 0.0:
        weights = F.dropout(weights, p=dropout)
    mixed = torch.matmul(weights, v).transpose(1, 2).reshape(n, length, embed)
    output = _joined(mixed, out_proj, batched, batch_first)
    if not need_weights:
        return output, None
    weights = weights.mean(dim=1) if average else weights
    return output, weights if batched else weights.squeeze(0)


def _joined(mixed: Tensor, out_proj: tuple[Tensor, Tensor | None], batched: bool, batch_first: bool) -> Tensor:
    """Return the output for the values ``[N, L, E]`` of all heads, in the layout of the inputs."""
    output = F.linear(mixed, *out_proj)
    if not batched:
        return output.squeeze(0)
    return output if batch_first else output.transpose(0, 1)


def _rearrangement(batched: bool, batch_first: bool) -> Any:
    if not batched:
        return lambda t: t.unsqueeze(0)
    return (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))


def _map_same(change: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`change` applied to each, once for tensors that are the same object: they must stay recognizable as the same."""
    new_query = change(query)
    new_key = new_query if key is query else change(key)
    return new_query, new_key, new_key if value is key else change(value)


def _project(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Tensor | None,
    separate: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if packed is not None and query is key and key is value:
        q, k, v = F.linear(query, packed, bias).chunk(3, dim=-1)
        return q, k, v
    weights = separate if packed is None else packed.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))  # type: ignore[arg-type]
    return q, k, v


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask (True: do not look) as numbers to add to the scores."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _one_more_key(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else F.pad(mask, (0, 1))


def _causal(length: int, keys: int, like: Tensor) -> Tensor:
    future = torch.ones(length, keys, dtype=torch.bool, device=like.device).triu(1)
    return torch.zeros(length, keys, dtype=like.dtype, device=like.device).masked_fill(future, -math.inf)
