"""InsertObservers: one behind every planned tensor, seen by every reader."""

from __future__ import annotations

import pytest
import torch
from nets import NETS, Net, apply, images, names, ops, prepared
from torch import nn

from fxquant.graph import called
from fxquant.passes import InsertObservers
from fxquant.placement import Plan, TensorPlan, place
from fxquant.quantizers import HistogramObserver, ImageObserver


@pytest.mark.parametrize("name", NETS)
def test_every_planned_tensor_and_nothing_else(name):
    gm = prepared(name)
    plan = place(gm, 2, 2)
    new, log = apply(gm, InsertObservers(plan))
    observers = {node: part for node, part in called(new) if isinstance(part, ImageObserver)}
    assert log.count == len(observers) == len(plan.tensors)
    assert [node.args[0].name for node in observers] == [tensor.node for tensor in plan.tensors.values()]
    assert all(list(node.args[0].users) == [node] for node in observers), "every reader reads through the observer"
    assert all(node.target == f"activations.{node.args[0].name}" for node in observers)
    assert ops(new) - ops(gm) == {"other": len(observers)}
    x = images()
    torch.testing.assert_close(new(x), gm(x), rtol=0, atol=0)
    assert all(part.seen and part.name == node.args[0].name for node, part in observers.items())


def test_names_of_all_nodes_are_kept():
    gm = prepared("residual")
    new, _ = apply(gm, InsertObservers(place(gm, 2, 2)))
    assert [name for name in names(new) if not name.startswith("activations")] == names(gm)


def test_residual_branches_and_outputs_read_the_observer():
    gm = prepared("residual")
    new, _ = apply(gm, InsertObservers(place(gm, 2, 2)))
    nodes = {node.name: node for node in new.graph.nodes}
    assert [user.name for user in nodes["activations_layers_0_relu_1"].users] == ["layers_1_conv1", "layers_1_downsample_0"]
    assert [user.name for user in nodes["activations_stem_2"].users] == ["stem_3"]


def test_a_network_that_has_a_module_called_activations():
    """The observers go next to it, and nothing is hung into the module of the graph that was given."""
    gm = prepared(
        Net(lambda s, x: s.fc(s.activations(s.conv(x)).mean((2, 3))), conv=nn.Conv2d(3, 4, 1), activations=nn.ReLU(), fc=nn.Linear(4, 5))
    )
    new, log = apply(gm, InsertObservers(place(gm, 2, 2)))
    assert log.count == 1
    assert not list(gm.activations.children())
    assert torch.equal(gm(images()), new(images()))


def test_an_empty_plan_changes_nothing():
    gm = prepared("chain")
    assert apply(gm, InsertObservers(Plan()))[0] is gm
    assert apply(gm, InsertObservers(Plan({}, {"gone": TensorPlan("gone", 2, ())})))[0] is gm


def test_an_observed_graph_moves_as_a_whole():
    gm = prepared("residual")
    observed = InsertObservers(place(gm, 2, 2))(gm).graph_module
    observed(torch.randn(2, 3, 8, 8))
    moved = observed.to("meta")
    wholes = [part for part in moved.modules() if isinstance(part, ImageObserver)]
    assert len(wholes) == 5 and all(part.seen for part in wholes)
    observers = [part for part in moved.modules() if isinstance(part, HistogramObserver)]
    assert len(observers) == sum(len(part.classes) for part in wholes)
    for part in observers:
        tensors = [value for value in vars(part).values() if isinstance(value, torch.Tensor)] + list(part.buffers())
        assert tensors
        assert {value.device.type for value in tensors} == {"meta"}


@pytest.mark.parametrize(("scales", "noted"), [("tensor", []), ("head", ["add", "softmax_1"])])
def test_operands_without_heads_are_noted_where_heads_were_asked_for(scales, noted):
    """The last product of the tiny net pools tokens, of three axes; those in front of it have heads."""
    gm = prepared("attention")
    _, log = apply(gm, InsertObservers(place(gm, 8, 8, matmul_scales=scales), scales))
    assert [note.partition(" for ")[2].partition(":")[0] for note in log.notes] == [", ".join(noted)] * bool(noted)
