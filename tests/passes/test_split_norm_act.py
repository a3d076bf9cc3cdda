"""SplitNormAct: a norm with an activation inside becomes a norm and an activation."""

from __future__ import annotations

import pytest
import torch
from nets import Net, apply, assert_equal, classes, names, ops, prepared, traced
from timm.layers import BatchNormAct2d, GroupNormAct, LayerNormAct, LayerNormAct2d, SyncBatchNormAct
from torch import nn

from fxquant.graph import called
from fxquant.passes import FoldBatchNorm, SplitNormAct


def split(*layers: nn.Module):
    gm = traced(nn.Sequential(nn.Conv2d(3, 8, 1), *layers))
    new, log = apply(gm, SplitNormAct())
    assert_equal(gm, new)
    return gm, new, log


@pytest.mark.parametrize(
    ("norm", "parts"),
    [
        (lambda: BatchNormAct2d(8), ["BatchNorm2d", "ReLU"]),
        (lambda: BatchNormAct2d(8, act_layer=nn.SiLU, inplace=False, eps=1e-2), ["BatchNorm2d", "SiLU"]),
        (lambda: BatchNormAct2d(8, apply_act=False), ["BatchNorm2d"]),
        (lambda: BatchNormAct2d(8, affine=False), ["BatchNorm2d", "ReLU"]),
        (lambda: BatchNormAct2d(8, drop_layer=nn.Dropout), ["BatchNorm2d", "Dropout", "ReLU"]),
        (lambda: SyncBatchNormAct(8), ["SyncBatchNorm"]),
        (lambda: GroupNormAct(8, 2), ["GroupNorm", "ReLU"]),
        (lambda: GroupNormAct(8, 4, apply_act=False), ["GroupNorm"]),
        (lambda: LayerNormAct(16), ["LayerNorm", "ReLU"]),
    ],
)
def test_parts(norm, parts):
    norm = norm()
    if isinstance(norm, SyncBatchNormAct):
        norm.act, norm.drop = nn.Identity(), nn.Identity()
    if isinstance(norm, LayerNormAct):  # over the last of four axes
        gm = traced(Net(lambda s, x: s.norm(x.flatten(2).mean(1)), norm=LayerNormAct(256)))
        new, log = apply(gm, SplitNormAct())
        assert_equal(gm, new)
        assert classes(new) == {"LayerNorm": 1, "ReLU": 1}
        return
    gm, new, log = split(norm)
    assert ops(gm)["norm_act"] == 1
    assert [type(part).__name__ for _, part in called(new)][1:] == parts
    assert (log.count, log.skipped) == (1, [])
    assert not any(getattr(part, "inplace", False) for _, part in called(new))


def test_the_plain_norm_keeps_name_weight_and_statistics():
    gm, new, _ = split(BatchNormAct2d(8))
    assert [node.target for node, _ in called(new)] == ["0", "1", "1_act"]
    assert names(new)[:-1] == [*names(gm)[:-1], "_1_act"]
    old, norm = gm.get_submodule("1"), new.get_submodule("1")
    assert type(norm) is nn.BatchNorm2d
    assert norm.weight is old.weight and norm.running_var is old.running_var
    assert norm.eps == old.eps and not norm.training


def test_split_then_folded():
    gm = traced("norm_act")
    assert ops(gm)["norm_act"] == 3
    new = prepared("norm_act")
    assert ops(new)["norm_act"] == ops(new)["batch_norm"] == 0
    assert ops(new)["group_norm"] == 1
    assert ops(new)["relu"] == 2
    assert_equal(gm, new)


def test_the_activation_of_a_shared_norm_is_not_shared():
    _, new, log = split(BatchNormAct2d(8), nn.Conv2d(8, 8, 1), BatchNormAct2d(8))
    assert len({id(part) for _, part in called(new)}) == 6
    assert log.count == 2


def test_channels_first_layer_norm_is_refused():
    gm = traced(nn.Sequential(nn.Conv2d(3, 8, 1), LayerNormAct2d(8)))
    new, log = apply(gm, SplitNormAct())
    assert new is gm
    assert log.skipped == [("1", "LayerNormAct2d normalizes channels of a channels-first tensor, which a plain layer norm does not")]


def test_something_else_with_an_act_is_refused():
    class Odd(nn.BatchNorm2d):
        def __init__(self, channels: int):
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(x) + super().forward(x)

    gm = traced(nn.Sequential(nn.Conv2d(3, 4, 1), Odd(4)))
    new, _ = apply(gm, SplitNormAct(), FoldBatchNorm())
    assert_equal(gm, new)
    assert ops(new)["norm_act"] == 1
    assert apply(gm, SplitNormAct())[1].skipped == [("1", "Odd has a forward of its own, which may be more than a norm and its activation")]
