"""One word for what a node computes.

An operation has many spellings (``nn.ReLU``, ``F.relu``, ``torch.relu``, ``x.relu_()``); `kind` maps them to one word, so that a
pass asks ``kind(node) == "relu"`` and never looks at names.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch.fx import Node


def _spell(word: str, *spellings: Any) -> dict[Any, str]:
    return dict.fromkeys(spellings, word)


_MODULES: dict[type[nn.Module], str] = {
    **_spell("conv", nn.Conv1d, nn.Conv2d, nn.Conv3d),
    **_spell("conv_transpose", nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear: "linear",
    **_spell("batch_norm", nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    nn.LayerNorm: "layer_norm",
    nn.GroupNorm: "group_norm",
    nn.Identity: "identity",
    **_spell("dropout", nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, DropPath),
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardtanh: "hardtanh",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.ELU: "elu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Softmax: "softmax",
    **_spell("max_pool", nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    **_spell("avg_pool", nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    **_spell("view", nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    **_spell("pad", nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad2d),
    **_spell("interpolate", nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
}

_FUNCTIONS: dict[Callable, str] = {
    **_spell("conv", F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d),
    **_spell("conv_transpose", F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    F.linear: "linear",
    **_spell("matmul", torch.matmul, torch.bmm, torch.mm, torch.einsum, operator.matmul),
    F.scaled_dot_product_attention: "attention",
    F.batch_norm: "batch_norm",
    F.layer_norm: "layer_norm",
    F.group_norm: "group_norm",
    **_spell("dropout", F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    **_spell("relu", F.relu, F.relu_, torch.relu, torch.relu_),
    F.relu6: "relu6",
    **_spell("hardtanh", F.hardtanh, F.hardtanh_),
    **_spell("leaky_relu", F.leaky_relu, F.leaky_relu_),
    F.prelu: "prelu",
    **_spell("elu", F.elu, F.elu_),
    F.gelu: "gelu",
    F.silu: "silu",
    F.mish: "mish",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    **_spell("sigmoid", F.sigmoid, torch.sigmoid, torch.sigmoid_),
    **_spell("tanh", F.tanh, torch.tanh, torch.tanh_),
    **_spell("softmax", F.softmax, torch.softmax),
    **_spell("add", torch.add, operator.add, operator.iadd),
    **_spell("sub", torch.sub, operator.sub, operator.isub),
    **_spell("mul", torch.mul, operator.mul, operator.imul),
    **_spell("div", torch.div, operator.truediv, operator.itruediv),
    **_spell("concat", torch.cat, torch.concat, torch.concatenate),
    torch.mean: "mean",
    **_spell("max_pool", F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d),
    **_spell("max_pool", torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    **_spell("avg_pool", F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d),
    **_spell("view", torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze),
    **_spell("view", torch.chunk, torch.split, torch.unbind, torch.tensor_split, torch.movedim, torch.swapaxes),
    **_spell("view", torch.roll, torch.flip, torch.narrow, torch.select, torch.unflatten, torch.broadcast_to),
    **_spell("view", F.pixel_shuffle, F.pixel_unshuffle, torch.channel_shuffle, torch.clone),
    operator.getitem: "getitem",
    getattr: "getattr",
    F.pad: "pad",
    **_spell("interpolate", F.interpolate, F.upsample),
}

_METHODS: dict[str, str] = {
    **_spell("view", "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "expand"),
    **_spell("view", "chunk", "split", "unbind", "t", "clone", "roll", "flip", "narrow", "select", "unflatten", "expand_as"),
    **_spell("view", "view_as", "reshape_as", "movedim", "swapaxes", "repeat", "tensor_split", "mT"),
    **_spell("relu", "relu", "relu_"),
    **_spell("sigmoid", "sigmoid", "sigmoid_"),
    **_spell("tanh", "tanh", "tanh_"),
    **_spell("add", "add", "add_"),
    **_spell("sub", "sub", "sub_"),
    **_spell("mul", "mul", "mul_"),
    **_spell("div", "div", "div_"),
    **_spell("matmul", "matmul", "bmm", "mm", "__matmul__"),
    "softmax": "softmax",
    "mean": "mean",
    "size": "size",
}

_TRUSTED = ("torch.", "fxquant.")

_NODE_OPS = {"placeholder": "input", "output": "output", "get_attr": "constant"}

WEIGHTED = frozenset({"conv", "conv_transpose", "linear"})
"""Kinds that own a weight."""

QUANTIZED = WEIGHTED | {"matmul", "attention"}
"""Kinds whose operands are quantized: where the multiply-adds are."""


def kind(node: Node) -> str:
    """Return the one word for what `node` computes: ``"conv"``, ``"relu"``, ``"view"``, ...

    Module, functional, method and in-place spellings of an operation share a word. A norm that carries an activation inside
    (timm's ``BatchNormAct2d``) is ``"norm_act"``. Anything unknown, and a subclass of a weighted layer or batch norm that computes
    something else, is ``"other"``.
    """
    if node.op in _NODE_OPS:
        return _NODE_OPS[node.op]
    if node.op == "call_module":
        owner = node.graph.owning_module
        assert owner is not None, "the graph has no GraphModule yet"
        return _module_kind(owner.get_submodule(str(node.target)))
    if node.op == "call_method":
        return _METHODS.get(str(node.target), "other")
    return _FUNCTIONS.get(node.target, "other") if callable(node.target) else "other"


def is_layer(node: Node) -> bool:
    """Say whether `node` calls a module that owns a weight: a convolution, a transposed one or a linear layer."""
    return node.op == "call_module" and kind(node) in WEIGHTED


def _module_kind(module: nn.Module) -> str:
    base = next((base for base in type(module).__mro__ if base in _MODULES), None)
    if base is None:
        return "other"
    if isinstance(getattr(module, "act", None), nn.Module):
        return "norm_act"
    # A subclass from elsewhere that has its own forward may do anything with the weight.
    own_forward = type(module).forward is not base.forward and not type(module).__module__.startswith(_TRUSTED)
    return "other" if own_forward and _MODULES[base] in WEIGHTED | {"batch_norm"} else _MODULES[base]
