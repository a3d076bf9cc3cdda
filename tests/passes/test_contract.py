"""What every pass promises, for every pass on every tiny net."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from nets import NETS, apply, images, once_traced, prepared, traced
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_manager import PassManager

from fxquant.calibration import activation_quantizers, weight_quantizers
from fxquant.cat import CAT
from fxquant.errors import CATError
from fxquant.graph import called
from fxquant.passes import (
    PREPARE,
    QUANTIZE,
    AppendCAT,
    CorrectBias,
    FinishNetwork,
    Freeze,
    InsertFakeQuant,
    InsertObservers,
    ReconstructUnits,
    ReduceError,
    ReparameterizeNorms,
)
from fxquant.pipeline import Pass, Pipeline
from fxquant.placement import place
from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.recipe import Recipe

RECIPE = Recipe(
    weight_range="minmax",
    activation_range="minmax",
    **dict.fromkeys(("unit_iterations", "scales_iterations", "output_kl_iterations", "finish_iterations"), 3),
    **dict.fromkeys(("unit_batch", "output_kl_batch", "finish_batch"), 4),
    finish_checks=1,
)
CPU = torch.device("cpu")
LEARNING = (ReduceError, ReconstructUnits, FinishNetwork)


def before(step: type[Pass], gm: GraphModule) -> tuple[GraphModule, Pass]:
    """Return the graph that `step` gets in a full run on the traced `gm`, and the step itself."""
    if step in PREPARE:
        return Pipeline([earlier() for earlier in PREPARE[: PREPARE.index(step)]]).run(gm), step()
    teacher = Pipeline([earlier() for earlier in PREPARE]).run(gm)
    dtype = next(teacher.parameters()).dtype
    batches = [images(4, dtype), images(3, dtype)]
    plan = place(teacher, 3, 4)
    build: dict[type[Pass], Callable[[], Pass]] = {
        ReparameterizeNorms: lambda: ReparameterizeNorms(plan, batches, RECIPE),
        InsertObservers: lambda: InsertObservers(plan),
        InsertFakeQuant: lambda: InsertFakeQuant(plan, activation_quantizers(RECIPE), weight_quantizers(RECIPE)),
        CorrectBias: lambda: CorrectBias(teacher, batches, gain="spread"),
        ReduceError: lambda: ReduceError(teacher, batches, plan, weight_quantizers(RECIPE), RECIPE),
        ReconstructUnits: lambda: ReconstructUnits(teacher, batches, RECIPE, 0, CPU),
        FinishNetwork: lambda: FinishNetwork(teacher, batches, batches, RECIPE, 0, CPU),
        Freeze: Freeze,
        AppendCAT: lambda: AppendCAT(some_cat(dtype)),
    }
    steps = [build[each]() for each in QUANTIZE[: QUANTIZE.index(step) + 1]]
    gm = teacher
    for earlier in steps[:-1]:
        gm = earlier(gm).graph_module
        if isinstance(earlier, InsertObservers):
            with torch.no_grad():
                for batch in batches:
                    gm(batch)
    return gm, steps[-1]


def some_cat(dtype: torch.dtype, clusters: int = 2) -> CAT:
    generator = torch.Generator().manual_seed(0)
    gamma, beta, centers = (torch.rand(clusters, 5, generator=generator, dtype=torch.float64) + 0.5 for _ in range(3))
    return CAT.from_clusters(gamma, beta, 0.5, centers if clusters > 1 else None, dtype=dtype)


def returns_logits(name: str) -> bool:
    return name != "several_outputs"


CASES = [(step, name) for step in (*PREPARE, *QUANTIZE) for name in NETS if step is not AppendCAT or returns_logits(name)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def case(request) -> tuple[GraphModule, Pass]:
    step, name = request.param
    # Rounding noise moves a value over the edge of a quantization step now and then, which bias correction then corrects.
    return before(step, once_traced(name, torch.float64 if step is CorrectBias else torch.float32))


def test_contract(case, untouched):
    gm, step = case
    code, modules, graph = gm.code, dict(gm.named_modules()), str(gm.graph)
    with untouched(gm):
        result = step(gm)
    with untouched(result.graph_module):
        again = step(result.graph_module)
    new = result.graph_module
    new.graph.lint()
    assert not new.training
    assert result.modified == (new is not gm)
    if isinstance(step, CorrectBias):
        assert_nothing_left_to_correct(new, again.graph_module)
    elif isinstance(step, LEARNING):
        # A second run may learn more.
        assert_learned(gm, new)
        assert_learned(new, again.graph_module)
    else:
        assert not again.modified, step.log
        assert again.graph_module is new
    assert (gm.code, str(gm.graph)) == (code, graph)
    assert all(module is modules[path] for path, module in gm.named_modules())

    for count in (1, 2, 5):
        x = images(count, next(gm.parameters()).dtype)
        assert_same_outputs(run(gm, x), run(new, x), close=step.preserves_output)
    assert_same_outputs(run(new, x), run(copy.deepcopy(new).eval(), x), close=True)


@torch.no_grad()
def run(gm: GraphModule, x: Tensor) -> object:
    return gm(x.clone())


def assert_same_outputs(a: object, b: object, *, close: bool) -> None:
    """Assert equal values, or without `close` the same structure and shapes of finite values."""
    leaves_a, tree_a = torch.utils._pytree.tree_flatten(a)
    leaves_b, tree_b = torch.utils._pytree.tree_flatten(b)
    assert tree_a == tree_b
    for x, y in zip(leaves_a, leaves_b, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype and bool(y.isfinite().all())
        if close:
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 if x.dtype == torch.float32 else 1e-10)


def assert_nothing_left_to_correct(once: GraphModule, twice: GraphModule) -> None:
    for (node, a), (_, b) in zip(called(once), called(twice), strict=True):
        if isinstance(a, QuantizedLayer):
            assert isinstance(b, QuantizedLayer)
            torch.testing.assert_close(a.weight_quantizer.scale, b.weight_quantizer.scale, rtol=1e-3, atol=1e-6, msg=str(node.target))
            torch.testing.assert_close(a.bias, b.bias, rtol=1e-3, atol=1e-3, msg=str(node.target))


def assert_learned(before: GraphModule, behind: GraphModule) -> None:
    """Assert that a pass that learns left the graph as it was, and every weight where its codes say."""
    assert (before.code, str(before.graph)) == (behind.code, str(behind.graph))
    for (node, old), (_, new) in zip(called(before), called(behind), strict=True):
        assert type(new) is type(old), node.target
        if isinstance(new, QuantizedLayer):
            assert_on_grid(new.weight_quantizer, old.weight_quantizer)
            assert not new.frozen
            assert not any(value.requires_grad for value in new.parameters())
            assert new.weight.shape == old.weight.shape and new.weight.dtype == old.weight.dtype
            assert torch.equal(new.used_weight(), new.weight_quantizer(new.weight))
            assert torch.equal(new.used_weight(), new.weight_quantizer.dequantize(new.codes()))
        elif isinstance(new, UniformQuantizer):
            assert_on_grid(new, old)


def assert_on_grid(new: UniformQuantizer, old: UniformQuantizer) -> None:
    """Assert that a quantizer has the bits and the axis it had, scales above 0 and zero-points among its codes."""
    assert new.spec == old.spec
    for mine, theirs in ((new.scale, old.scale), (new.zero_point, old.zero_point)):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype and bool(mine.isfinite().all())
    assert bool((new.scale > 0).all())
    assert torch.equal(new.zero_point, new.zero_point.round())
    assert bool(((new.zero_point >= new.spec.qmin) & (new.zero_point <= new.spec.qmax)).all())


VARIANTS: dict[str, dict[str, object]] = {
    "layer by layer, weights alone": {"unit_granularity": "layer", "unit_activations": False, "unit_input_drop": 0.0},
    "the whole network": {"unit_granularity": "network", "unit_bias_rate": 1e-3, "unit_scale_rate": 1e-3},
    "packs, bfloat16 cache": {"unit_granularity": "pack", "cache_dtype": "bfloat16", "unit_sampling": "epochs"},
    "behind the Fisher matrix": {"unit_fisher": "full", "precision": "bfloat16"},
    "towards the logits": {"unit_kl_weight": 1.0, "unit_correction_iterations": 2, "unit_ranges": "prefix"},
    "scales alone": {"stage": "scales"},
    "by the output": {"stage": "output_kl"},
    "mixed, averaged, bfloat16": {"stage": "finish", "finish_mix": 0.5, "finish_averaging": 0.9, "precision": "bfloat16"},
    "channels not matched": {"stage": "finish", "finish_match": False},
    "without feature matching": {"stage": "finish", "finish_feature_weight": 0.0, "finish_blend": 1.0, "finish_bias_rate": 0.0},
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_to_learn(name, variant, untouched):
    changes = dict(VARIANTS[variant])
    stage = str(changes.pop("stage", "units"))
    recipe = RECIPE.replace(**changes)
    gm, images_, teacher = quantized(name)
    if stage in ("units", "scales"):
        step: Pass = ReconstructUnits(teacher, images_, recipe, 0, CPU, stage)
    else:
        step = FinishNetwork(teacher, images_, images_, recipe, 0, CPU, stage)
    with untouched(gm), untouched(teacher):
        new = step(gm).graph_module
    assert_learned(gm, new)
    assert_same_outputs(run(gm, images(3)), run(new, images(3)), close=False)


@functools.cache
def quantized(name: str) -> tuple[GraphModule, list[Tensor], GraphModule]:
    """Return a network with quantizers, its calibration images, and its float graph."""
    gm, step = before(ReconstructUnits, once_traced(name))
    assert isinstance(step, ReconstructUnits)
    return gm, list(step.images), step.teacher


@pytest.mark.parametrize("step", [*PREPARE, *QUANTIZE])
@pytest.mark.parametrize("name", ["residual", "Functional", "norm_act", "transposed", "attention"])
def test_float64(step, name):
    gm, step = before(step, once_traced(name, torch.float64))
    new = step(gm).graph_module
    x = images(dtype=torch.float64)
    assert all(value.dtype == torch.float64 for value in new.parameters())
    assert_same_outputs(run(gm, x), run(new, x), close=step.preserves_output)


@pytest.mark.parametrize("name", ["residual", "norm_act"])
def test_inside_torchs_pass_manager(name):
    manager = PassManager(passes=[step() for step in PREPARE], run_checks_after_each_pass=True)
    result = manager(traced(name))
    assert result.modified
    assert str(result.graph_module.graph) == str(prepared(name).graph)
    assert not manager(result.graph_module).modified


@pytest.mark.parametrize("step", [*PREPARE, *QUANTIZE])
def test_the_listed_order_satisfies_every_pass(step):
    order = [*PREPARE, *QUANTIZE]
    assert all(order.index(earlier) < order.index(step) for earlier in step.after)
    assert step.__doc__
    assert "=>" in step.__doc__


def test_append_cat_refuses_a_network_without_logits():
    gm, step = before(AppendCAT, traced("several_outputs"))
    with pytest.raises(CATError, match=r"Net: returns a dict, not one tensor of logits \[N, C\]. Use cat=False."):
        step(gm)


def test_one_pass_object_serves_many_graphs():
    step = PREPARE[0]()
    _, first = apply(traced("chain"), step)
    assert first.count == 3
    _, second = apply(traced("attention"), step)
    assert (first.count, second.count) == (3, 0)
