"""Pass and Pipeline: order, logs, reasons, and what happens when a pass breaks the graph."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch
from nets import images, prepared, traced
from torch.fx import GraphModule, Node

from fxquant import graph
from fxquant.calibration import activation_quantizers, weight_quantizers
from fxquant.errors import PassError
from fxquant.passes import (
    PREPARE,
    Canonicalize,
    CorrectBias,
    FoldBatchNorm,
    Freeze,
    InsertFakeQuant,
    InsertObservers,
    ModularizeWeights,
    SplitNormAct,
    UnshareModules,
)
from fxquant.pipeline import Pass, PassLog, Pipeline, Skip
from fxquant.placement import place
from fxquant.recipe import Recipe


class Double(Pass):
    """relu(x) => 2 relu(x), but not for the last one."""

    verb = "doubled"

    def match(self, node: Node) -> object | Skip | None:
        if node.target not in ("2", "6"):
            return None
        return Skip("the last one") if node.target == "6" else node

    def rewrite(self, gm: GraphModule, node: Node, match: object) -> None:
        assert match is node
        with gm.graph.inserting_after(node):
            new = gm.graph.call_function(torch.mul, (node, 2))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.note("twice as large")


class Tangle(Pass):
    """Break the graph: let a node read a later one."""

    def run(self, gm: GraphModule) -> None:
        nodes = list(gm.graph.nodes)
        nodes[1].args = (nodes[3],)
        self.changed()


class Nothing(Pass):
    """Do nothing."""

    def run(self, gm: GraphModule) -> None:
        self.skip("somewhere", "no wish to")


class Later(Pass):
    after = (Double, Tangle)


def test_match_and_rewrite():
    gm = traced("chain")
    step = Double()
    result = step(gm)
    assert (result.modified, step.log.count) == (True, 1)
    assert step.log.skipped == [("6", "the last one")]
    assert step.log.notes == ["twice as large"]
    assert step.log.milliseconds > 0
    assert result.graph_module is not gm
    assert not torch.equal(result.graph_module(images()), gm(images()))


def test_the_given_graph_comes_back_when_there_was_nothing_to_do():
    gm = traced("chain")
    step = Nothing()
    result = step(gm)
    assert result.graph_module is gm
    assert not result.modified
    assert step.log.skipped == [("somewhere", "no wish to")]


def test_names():
    assert [step.name() for step in (FoldBatchNorm, SplitNormAct, Double)] == ["fold_batch_norm", "split_norm_act", "double"]
    assert type("AppendCAT", (Pass,), {}).name() == "append_cat"


def test_order():
    with pytest.raises(PassError, match=r"^pass 0: Later must run after Tangle. Order the passes as in fxquant.passes.PREPARE.$"):
        Pipeline([Later(), Tangle()])
    with pytest.raises(PassError, match="pass 1: Later must run after Double, Tangle"):
        Pipeline([Nothing(), Later(), Double(), Tangle()])
    with pytest.raises(PassError, match="FoldBatchNorm must run after Canonicalize, ModularizeWeights, UnshareModules, SplitNormAct"):
        Pipeline([step() for step in reversed(PREPARE)])
    Pipeline([Later()])  # what is needed may have run before, in another pipeline
    Pipeline([Double(), Tangle(), Later()])


def test_logs_and_lines():
    said: list[PassLog] = []
    pipeline = Pipeline([step() for step in PREPARE], said.append)
    pipeline.run(traced("dense"))
    assert said == pipeline.logs
    assert [log.name for log in said] == [step.name() for step in PREPARE]
    assert re.fullmatch(r"canonicalize            3 cleaned                            +\d+ ms", str(said[0]))
    assert re.fullmatch(r"fold_batch_norm         0 folded, 3 skipped                  +\d+ ms", str(said[-1]))
    assert len({len(str(log)) for log in said}) == 1, "the lines form a table"


def test_a_pipeline_edits_a_fork():
    gm = traced("residual")
    code = gm.code
    Pipeline([Canonicalize(), ModularizeWeights(), UnshareModules(), SplitNormAct(), FoldBatchNorm()]).run(gm)
    assert gm.code == code
    assert code != prepared("residual").code


def test_a_pass_that_breaks_the_graph_is_named():
    pipeline = Pipeline([Nothing(), Tangle()])
    with pytest.raises(
        PassError, match=r"^tangle: left a broken graph behind: Argument '_2' of Node '_0' was used before .* Please report the network"
    ) as caught:
        pipeline.run(traced("chain"))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert [log.name for log in pipeline.logs] == ["nothing"]


def test_a_pass_without_a_body_says_so():
    with pytest.raises(NotImplementedError, match="Later has neither match nor run"):
        Later()(traced("chain"))
    half = type("Half", (Pass,), {"match": lambda self, node: node})
    with pytest.raises(NotImplementedError, match="Half has neither rewrite nor run"):
        half()(traced("chain"))


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), torch.OutOfMemoryError("out of memory"), ValueError("no"), KeyError(3)]
)
def test_an_error_inside_a_pass_goes_through_unchanged(error):
    class Fails(Pass):
        def run(self, gm: GraphModule) -> None:
            self.changed()
            raise error

    pipeline = Pipeline([Nothing(), Fails()])
    with pytest.raises(type(error)) as caught:
        pipeline.run(traced("chain"))
    assert caught.value is error
    assert [log.name for log in pipeline.logs] == ["nothing"]


def test_track_sees_the_long_loops():
    seen: list[tuple[str, int | None, int]] = []

    def track(items, stage, total=None):
        count = 0
        for item in items:
            count += 1
            yield item
        seen.append((stage, total, count))

    teacher = prepared("chain")
    plan = place(teacher, 4, 4)
    observed = InsertObservers(plan)(teacher).graph_module
    observed(images())
    recipe = Recipe(weight_range="minmax", activation_range="minmax")
    steps = [InsertFakeQuant(plan, activation_quantizers(recipe), weight_quantizers(recipe)), CorrectBias(teacher, [images()]), Freeze()]
    plain = Pipeline(steps).run(observed)
    assert seen == [], "nothing is shown unless asked for"
    again = Pipeline(steps, track=track).run(observed)
    modules = sum(node.op == "call_module" for node in observed.graph.nodes)
    assert [stage for stage, _, _ in seen] == ["choose ranges", "correct bias"]
    assert seen[0] == ("choose ranges", None, modules)
    assert seen[1][1] == len(observed.graph.nodes)
    assert 0 < seen[1][2] <= len(observed.graph.nodes)
    assert all(step.track is track for step in steps)
    assert torch.equal(plain(images()), again(images()))


def test_what_a_pass_replaced_is_freed(monkeypatch):
    """A GraphModule refers to itself, and with it to its weights, until Python looks for such cycles."""
    alive: list[weakref.ref[GraphModule]] = []

    class Remember(Double):
        def run(self, gm: GraphModule) -> None:
            alive.append(weakref.ref(gm))
            super().run(gm)

    gc.disable()
    try:
        for large in (True, False):
            alive.clear()
            monkeypatch.setattr(graph, "LARGE", 0 if large else 2**28)
            last = Pipeline([Remember(), Remember(), Remember()]).run(traced("chain"))
            assert [other() is not None for other in alive] == [not large, not large, True]
            assert alive[-1]() is last
    finally:
        gc.enable()
