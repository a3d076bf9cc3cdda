"""A zoo of tiny networks, each with one thing that a graph pass can get wrong, and what the tests ask of a graph.

`NETS` maps a name to a builder; every network takes ``[N, 3, 16, 16]``, is in eval mode, and has batch norms that are far from
the identity.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, GroupNormAct
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant import trace
from fxquant.graph import module_of
from fxquant.kinds import kind
from fxquant.passes import PREPARE
from fxquant.pipeline import Pass, PassLog, Pipeline


class Net(nn.Module):
    """A module whose forward is ``body(self, x)``: members and what is done with them stand in one place."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **members: Any):
        super().__init__()
        self.body = body
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def conv_bn(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]


def head(channels: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, classes))


def chain() -> nn.Module:
    return nn.Sequential(*conv_bn(3, 8, stride=2), nn.ReLU(), nn.Identity(), *conv_bn(8, 8), nn.ReLU(inplace=True), head(8))


class Block(nn.Module):
    """torchvision's BasicBlock: one ReLU, in place, called twice."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, outputs, stride=stride)
        self.conv2, self.bn2 = conv_bn(outputs, outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(*conv_bn(inputs, outputs, 1, stride)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def residual() -> nn.Module:
    stem = nn.Sequential(*conv_bn(3, 8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    return Net(lambda s, x: s.fc(s.layers(s.stem(x))), stem=stem, layers=nn.Sequential(Block(8, 8), Block(8, 12, 2)), fc=head(12))


def mobile() -> nn.Module:
    def block(inputs: int, outputs: int) -> nn.Sequential:
        wide = 2 * inputs
        depthwise = conv_bn(wide, wide, groups=wide)
        return nn.Sequential(
            *conv_bn(inputs, wide, 1), nn.ReLU6(inplace=True), *depthwise, nn.ReLU6(inplace=True), *conv_bn(wide, outputs, 1)
        )

    def body(s: Any, x: Tensor) -> Tensor:
        x = s.b(s.stem(x))
        return s.fc(x + s.c(x))

    return Net(body, stem=nn.Sequential(*conv_bn(3, 4), nn.ReLU6()), b=block(4, 6), c=block(6, 6), fc=head(6))


def squeeze_excite() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        x = s.stem(x)
        scale = s.expand(F.relu(s.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        return s.fc(x * scale)

    stem = nn.Sequential(*conv_bn(3, 8), nn.Hardswish())
    return Net(body, stem=stem, reduce=nn.Conv2d(8, 4, 1), expand=nn.Conv2d(4, 8, 1), fc=head(8))


def dense() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        x = s.stem(x)
        for conv, bn in ((s.conv1, s.bn1), (s.conv2, s.bn2)):
            x = torch.cat([x, conv(F.relu(bn(x), True))], 1)
        return s.fc(F.relu(s.last(x)))

    convs = {"conv1": nn.Conv2d(4, 4, 3, padding=1), "conv2": nn.Conv2d(8, 4, 3, padding=1)}
    norms = {"bn1": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(8), "last": nn.BatchNorm2d(12)}
    return Net(body, stem=nn.Conv2d(3, 4, 3, 2, 1), fc=head(12), **convs, **norms)


def shuffle() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        left, right = s.stem(x).chunk(2, dim=1)
        x = torch.cat((left, s.branch(right)), dim=1)
        n, c, h, w = x.size()
        return s.fc(x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w))

    stem, branch = nn.Sequential(*conv_bn(3, 8), nn.ReLU()), nn.Sequential(*conv_bn(4, 4, groups=4), *conv_bn(4, 4, 1), nn.ReLU())
    return Net(body, stem=stem, branch=branch, fc=head(8))


def transposed() -> nn.Module:
    up = nn.ConvTranspose2d(8, 6, 2, 2, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU()
    again = nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*conv_bn(3, 8, stride=4), nn.ReLU(), *up, *again, head(4))


def one_dimension() -> nn.Module:
    layers = nn.Conv1d(16, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 1), nn.BatchNorm1d(6), nn.ReLU()
    return Net(
        lambda s, x: s.fc(s.layers(s.stem(x).flatten(2)).mean(2)),
        stem=nn.Conv2d(3, 16, 4, 4),
        layers=nn.Sequential(*layers),
        fc=nn.Linear(6, 5),
    )


def linear_norm() -> nn.Module:
    tail = nn.Linear(8 * 16, 12, bias=False), nn.BatchNorm1d(12, affine=False), nn.ReLU(), nn.Linear(12, 5), nn.BatchNorm1d(5)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), *tail)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8))
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)
        self.head = nn.ParameterDict({"weight": torch.randn(5, 8), "bias": torch.randn(5)})

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, None, 2, padding=(1, 1))
        x = F.batch_norm(x, self.mean, self.var, self.scale, self.shift, False, 0.1, 1e-3)
        x = F.dropout(F.relu(x, True), training=self.training)
        return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self.head["weight"], self.head["bias"])


def in_place() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        x = s.conv1(x)
        y = s.act(x)
        y.add_(1)
        z = s.conv2(x)
        z.add_(x).mul_(0.5)
        z /= 2
        torch.relu_(z)
        return s.fc(F.hardtanh(z, -1.0, 1.0, True) - x)

    return Net(body, conv1=nn.Conv2d(3, 4, 3), conv2=nn.Conv2d(4, 4, 3, padding=1), act=nn.LeakyReLU(inplace=True), fc=head(4))


def shared() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        x = s.act(s.stem(x))
        x = s.act(s.bn1(s.conv(x)))
        return s.fc(s.act(s.bn2(s.conv(x))))

    convs = {"stem": nn.Conv2d(3, 4, 3), "conv": nn.Conv2d(4, 4, 3, padding=1)}
    return Net(body, **convs, bn1=nn.BatchNorm2d(4), bn2=nn.BatchNorm2d(4), act=nn.ReLU(), fc=head(4))


def tied() -> nn.Module:
    net = nn.Sequential(*conv_bn(3, 4), nn.ReLU(), *conv_bn(4, 4), nn.ReLU(), *conv_bn(4, 4), head(4))
    net[6].weight = net[3].weight
    return net


def norm_act() -> nn.Module:
    convs = Conv2dSame(3, 8, 3, stride=2, bias=False), nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(
        convs[0], BatchNormAct2d(8), convs[1], GroupNormAct(8, 2), nn.Conv2d(8, 6, 1), BatchNormAct2d(6, apply_act=False), head(6)
    )


def attention() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        x = s.patch(x).flatten(2).transpose(1, 2)
        y = s.norm(x)
        x = x + s.mha(y, y, y, need_weights=False)[0]
        x = x + (x @ x.transpose(1, 2)).softmax(-1) @ x
        return s.fc(x.mean(1))

    mha = nn.MultiheadAttention(8, 2, batch_first=True)
    return Net(body, patch=nn.Conv2d(3, 8, 4, 4), norm=nn.LayerNorm(8), mha=mha, fc=nn.Linear(8, 5))


def fused_attention() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        x = s.patch(x).flatten(2).transpose(1, 2)
        n, t, c = x.shape
        q, k, v = s.qkv(s.norm(x)).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=s.bias)
        x = x + s.proj(y.transpose(1, 2).reshape(n, t, c))
        return s.fc(x.mean(1))

    layers = {"norm": nn.LayerNorm(8), "qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8), "fc": nn.Linear(8, 5)}
    return Net(body, patch=nn.Conv2d(3, 8, 4, 4), bias=nn.Parameter(torch.randn(2, 16, 16)), **layers)


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2), *conv_bn(4, 6), nn.ReLU(), head(6))


def several_outputs() -> nn.Module:
    def body(s: Any, x: Tensor) -> dict[str, Any]:
        x = s.stem(x)
        y = s.conv(x)
        return {"logits": s.fc(s.bn(y)), "features": [x, y]}

    return Net(body, stem=nn.Sequential(*conv_bn(3, 4), nn.ReLU()), conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4), fc=head(4))


_PLAIN = (chain, residual, mobile, squeeze_excite, dense, shuffle, transposed, one_dimension, linear_norm, pooled)
_ODD = (Functional, in_place, shared, tied, norm_act, attention, fused_attention, several_outputs)
NETS: dict[str, Callable[[], nn.Module]] = {build.__name__: build for build in (*_PLAIN, *_ODD)}


def parameter(*shape: int) -> nn.Parameter:
    """Return random numbers, the same for the same number of axes."""
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))))


def filled(net: nn.Module, value: float) -> nn.Module:
    """Return a copy whose parameters all are `value`."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for weight in other.parameters():
            weight.fill_(value)
    return other


def scrambled(net: nn.Module) -> nn.Module:
    """Return `net` in eval mode with batch norms that do something."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(std=0.5)
            module.running_var.uniform_(0.2, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return net.eval()


def make(name: str) -> nn.Module:
    torch.manual_seed(sum(name.encode()))
    return scrambled(NETS[name]())


def images(count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count)).to(dtype)


def traced(net: nn.Module | str) -> GraphModule:
    return trace(make(net) if isinstance(net, str) else scrambled(net), images())


def once_traced(name: str, dtype: torch.dtype = torch.float32) -> GraphModule:
    """Return the graph of a tiny net, traced once: a pass or `quantize` makes a copy of it."""
    return _once_traced(name, dtype)


@functools.cache
def _once_traced(name: str, dtype: torch.dtype) -> GraphModule:
    return trace(make(name).to(dtype), images(dtype=dtype))


def prepared(net: nn.Module | str) -> GraphModule:
    return Pipeline([step() for step in PREPARE]).run(net if isinstance(net, GraphModule) else traced(net))


def apply(gm: GraphModule, *steps: Pass) -> tuple[GraphModule, PassLog]:
    """Run the steps and return the graph with the log of the last one."""
    return Pipeline(steps).run(gm), steps[-1].log


def ops(gm: GraphModule) -> Counter[str]:
    """Count what the graph computes, by kind."""
    return Counter(kind(node) for node in gm.graph.nodes if kind(node) not in ("input", "output", "constant"))


def classes(gm: GraphModule) -> Counter[str]:
    """Count the modules that the graph calls, by class."""
    return Counter(type(module_of(node)).__name__ for node in gm.graph.nodes if node.op == "call_module")


def names(gm: GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes]


@torch.no_grad()
def assert_equal(a: nn.Module, b: nn.Module, x: Tensor | None = None, steps: Sequence[float] | None = None) -> None:
    """Assert equal outputs, up to the rounding of a fold; ``steps=(rtol, atol)`` for another tolerance."""
    x = images() if x is None else x
    rtol, atol = steps or ((1e-9, 1e-9) if x.dtype == torch.float64 else (1e-3, 1e-4))
    torch.testing.assert_close(a(x.clone()), b(x.clone()), rtol=rtol, atol=atol)
