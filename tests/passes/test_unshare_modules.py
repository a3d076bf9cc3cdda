"""UnshareModules: one call, one module, one weight."""

from __future__ import annotations

import torch
from nets import Net, apply, assert_equal, classes, prepared, traced
from torch import nn

from fxquant.graph import called
from fxquant.passes import Canonicalize, FoldBatchNorm, ModularizeWeights, UnshareModules


def unshared(net):
    gm = traced(net)
    new, log = apply(gm, UnshareModules())
    assert_equal(gm, new)
    parameters = [value for _, part in called(new) for value in part.parameters()]
    assert len({id(value) for value in parameters}) == len(parameters)
    assert len({id(part) for _, part in called(new)}) == len(list(called(new)))
    return gm, new, log


def test_a_module_called_twice_becomes_two():
    gm, new, log = unshared("shared")
    assert classes(new) == classes(gm)
    assert [node.target for node, _ in called(gm)].count("conv") == 2
    assert [node.target for node, part in called(new) if isinstance(part, nn.Conv2d)] == ["stem", "conv", "conv_1"]
    assert log.count == 3  # conv once, the ReLU twice
    assert log.notes == ["conv_1: second call of a shared module, now its own copy"]
    assert torch.equal(new.get_parameter("conv.weight"), new.get_parameter("conv_1.weight"))
    assert new.get_submodule("conv") is gm.get_submodule("conv")


def test_tied_weights_become_two():
    _, new, log = unshared("tied")
    assert (log.count, log.notes) == (1, ["6.weight: shared with 3.weight, now its own copy"])
    assert new.get_parameter("6.weight") is not new.get_parameter("3.weight")


def test_free_names_are_taken():
    net = Net(lambda s, x: s.conv(s.conv(s.conv_1(x))), conv=nn.Conv2d(3, 3, 1), conv_1=nn.Conv2d(3, 3, 1))
    _, new, log = unshared(net)
    assert [node.target for node, _ in called(new)] == ["conv_1", "conv", "conv_2"]
    assert log.count == 1


def test_a_module_called_three_times_and_tied_to_another():
    conv, other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, bias=False)
    other.weight = conv.weight
    _, new, log = unshared(Net(lambda s, x: s.other(s.conv(s.conv(s.conv(x)))), conv=conv, other=other))
    assert [node.target for node, _ in called(new)] == ["conv", "conv_1", "conv_2", "other"]
    assert log.count == 3


def test_a_shared_batch_norm_gets_its_own_buffers():
    net = Net(lambda s, x: s.bn(s.b(s.bn(s.a(x)))), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    _, new, _ = unshared(net)
    assert new.get_buffer("bn.running_mean") is not new.get_buffer("bn_1.running_mean")
    folded, log = apply(new, FoldBatchNorm())
    assert log.count == 2
    assert_equal(new, folded)


def test_a_weight_that_is_also_read_by_itself():
    """Folding scales the weight of the layer; what else reads the weight must go on seeing the old one."""
    net = Net(lambda s, x: s.bn(s.conv(x)) * s.conv.weight.mean(), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    gm, new, log = unshared(net)
    assert log.notes == ["conv.weight: also read outside of its module, now conv_weight there"]
    assert new.get_parameter("conv_weight") is gm.get_parameter("conv.weight")
    folded, _ = apply(new, FoldBatchNorm())
    assert_equal(gm, folded)
    assert_equal(gm, prepared(gm))


def test_functional_layer_over_the_weight_of_a_module():
    net = Net(lambda s, x: s.bn(s.conv(x)) + nn.functional.conv2d(x, s.conv.weight), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    gm = traced(net)
    new, log = apply(gm, Canonicalize(), ModularizeWeights(), UnshareModules())
    assert classes(new) == {"Conv2d": 2, "BatchNorm2d": 1}
    assert log.notes == ["conv_1.weight: shared with conv.weight, now its own copy"]
    assert_equal(gm, prepared(gm))


def test_nothing_to_do():
    gm, new, log = unshared("chain")
    assert new is gm
    assert (log.count, log.notes) == (0, [])
