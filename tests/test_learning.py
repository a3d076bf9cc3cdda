"""Learning from one end to the other: what comes out, what is left behind by a kill, and what a user can get wrong."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.ops import DeformConv2d

import fxquant
from fxquant.cat import CAT
from fxquant.errors import CheckpointError, ConfigError, FxquantWarning
from fxquant.graph import called
from fxquant.metrics import kl_divergence
from fxquant.passes import FinishNetwork
from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.recipe import PRESETS, Recipe
from fxquant.reconstruction import checkpoint as checkpoints
from fxquant.reconstruction.network import NetworkTraining
from fxquant.reconstruction.unit import UnitLearning

BRIEFLY: dict[str, Any] = {
    **dict.fromkeys(("unit_iterations", "scales_iterations", "output_kl_iterations"), 6),
    **dict.fromkeys(("unit_batch", "output_kl_batch", "finish_batch", "finish_iterations"), 8),
    "unit_correction_iterations": 3,
    "finish_checks": 4,
}
"""Constants with which the stages that learn are over in a moment."""

RATES: dict[str, Any] = {
    "unit_rounding_rate": 0.03,
    "unit_scale_rate": 1e-5,
    "output_kl_rate": 3e-3,
    "finish_weight_rate": 0.1,
    "finish_level_power": 1.0,
    "finish_fine_power": 0.0,
    **dict.fromkeys(("unit_activation_rate", "unit_bias_rate", "scales_rate"), 1e-3),
    **dict.fromkeys(("finish_scale_rate", "finish_activation_rate", "finish_bias_rate"), 2e-3),
}
"""Rates with which so few steps change something."""

STAGES = ("ranges", "bias", "units", "scales", "output_kl", "finish")
SIMPLE = {key: value for key, value in BRIEFLY.items() if key != "unit_correction_iterations"}
ALL = Recipe(name="all", stages=STAGES, finish_mix=0.5, **SIMPLE, **RATES)
NAMES = ("units", "scales", "output_kl", "finish")
ONE = {stage: Recipe(name=stage, stages=("ranges", stage), **SIMPLE, **RATES) for stage in NAMES}
CPU = torch.device("cpu")


GRAPHS: WeakKeyDictionary[nn.Module, GraphModule] = WeakKeyDictionary()
"""The graphs of networks that are quantized again and again, none of which changes meanwhile: tracing takes longer than such a run."""


def quantize(model: nn.Module, loader: Any, *args: Any, **options: Any) -> GraphModule:
    if isinstance(loader, list) and loader and isinstance(loader[0], torch.Tensor) and not isinstance(model, GraphModule):
        if model not in GRAPHS:
            GRAPHS[model] = fxquant.trace(model, loader[0])
        model = GRAPHS[model]
    return fxquant.quantize(model, loader, *args, **{"progress": False, "cat": False, "recipe": ALL, **options})


def brief(name: str, **changes: Any) -> Recipe:
    recipe = PRESETS[name]
    return recipe.replace(**{"name": name, **(BRIEFLY if recipe.unit_correction_iterations else SIMPLE), **changes})


def record_of(model: nn.Module) -> Any:
    return fxquant.report(model).record


def notes_of(model: nn.Module, stage: str) -> list[str]:
    """Return the notes of the pass that does a stage that only it does in this recipe."""
    name = {"units": "reconstruct_units", "scales": "reconstruct_units", "output_kl": "finish_network", "finish": "finish_network"}.get(
        stage, stage
    )
    (log,) = [log for log in record_of(model).passes if log.name == name]
    return log.notes


def same_state(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(value, theirs[name]) for name, value in mine.items())


def check_same(a: GraphModule, b: GraphModule, x: Tensor) -> None:
    """Assert equal values, equal logits and equal reports, bit for bit."""
    assert same_state(a, b)
    assert torch.equal(a(x), b(x))
    mine, theirs = (record_of(model).to_dict() for model in (a, b))
    assert mine["passes"] == theirs["passes"]
    assert mine == theirs


def check_grids(quantized: nn.Module) -> None:
    """Assert that every weight is on the grid that the plan says, and finite."""
    layers = {name: module for name, module in quantized.named_modules() if isinstance(module, QuantizedLayer)}
    for row in record_of(quantized).layers:
        assert (row.name in layers) == (row.w is not None)
    for name, layer in layers.items():
        quantizer, bits = layer.weight_quantizer, record_of(quantized).plan.layers[name].w
        assert quantizer.spec.bits == bits and layer.frozen
        codes = quantizer.quantize(layer.used_weight())
        assert torch.equal(codes, layer.codes())
        assert quantizer.spec.qmin <= codes.min() and codes.max() <= quantizer.spec.qmax
        assert all(channel.unique().numel() <= 2**bits for channel in layer.weight.unbind(quantizer.spec.axis))
        assert layer.weight.isfinite().all() and (quantizer.scale > 0).all()
        assert not layer.weight.requires_grad and (layer.bias is None or not layer.bias.requires_grad)
    assert all(value.isfinite().all() for value in quantized.state_dict().values())


# ---- every named recipe ----


@pytest.mark.parametrize("name", PRESETS)
def test_named_recipes_give_a_quantized_network(net, images, name, monkeypatch, random_states, untouched, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda *args, **options: pytest.fail("compiled"))
    before = random_states()
    with untouched(net):
        quantized = quantize(net, images, 2, 3, recipe=brief(name))
    assert random_states() == before
    assert type(quantized).__name__ == "Residual"
    assert {row.name: row.w for row in record_of(quantized).layers} == {"conv1": 8, "blocks.0.0.0": 2, "blocks.0.2.0": 2, "fc": 8}
    check_grids(quantized)
    seen: dict[str, int] = {}
    for node, module in called(quantized):
        if isinstance(module, UniformQuantizer):
            module.register_forward_hook(
                lambda part, args, out, path=node.target: seen.update({path: (out.unique().numel(), part.spec.bits)})
            )
    out = quantized(torch.cat(images))
    assert out.isfinite().all() and len(seen) == 3
    assert all(levels <= 2**bits for levels, bits in seen.values())
    assert sorted(bits for _, bits in seen.values()) == [3, 3, 8]
    for module in quantized.modules():
        module._forward_hooks.clear()
    text = str(fxquant.report(quantized))
    assert name in text
    fxquant.save(quantized, tmp_path / "net.safetensors")
    check_same(fxquant.load(tmp_path / "net.safetensors", net), quantized, images[0])


LEARNED = [name for name in PRESETS if name not in ("fast", "erq")]
"""The named recipes that learn."""


@pytest.mark.parametrize("name", PRESETS)
def test_same_seed_same_result(net, images, name):
    recipe = brief(name, **(RATES if name in LEARNED else {}))
    if "finish" in recipe.stages:  # what is kept must be other than where it starts, which bias correction has made good
        recipe = recipe.replace(name=name, stages=("ranges", "finish"), finish_iterations=16, finish_checks=16)
    first, second, third = (quantize(net, images, recipe=recipe, seed=seed) for seed in (3, 3, 4))
    check_same(first, second, images[0])
    if name in LEARNED:
        assert not same_state(first, third)


@pytest.mark.parametrize("stage", NAMES)
def test_every_stage_changes_something_and_its_seed_counts(net, images, stage):
    plain = quantize(net, images, recipe=Recipe(stages=("ranges",)))
    learned, other = (quantize(net, images, recipe=ONE[stage], seed=seed) for seed in (0, 1))
    assert not same_state(plain, learned)
    assert not same_state(learned, other)
    check_grids(learned)


LONGER = {"unit_iterations": 150, "scales_iterations": 100, "output_kl_iterations": 100, "finish_iterations": 60, "finish_weight_rate": 0.1}


@pytest.mark.parametrize("name", LEARNED)
def test_learning_brings_the_logits_closer_to_the_float_ones(net, images, name):
    """On the calibration images, against what the ranges alone give."""
    x, bits = torch.cat(images), (2, 8 if name == "adaround" else 4)
    rates = {"unit_rounding_rate": 3e-2, "unit_activation_rate": 1e-3} if name != "output_kl" else {"output_kl_rate": 1e-2}
    recipe = brief(name, **{**LONGER, **rates})
    recipes = recipe.replace(stages=("ranges",)), recipe
    divergence = [kl_divergence(quantize(net, images, *bits, recipe=r)(x), net(x)).mean().item() for r in recipes]
    assert divergence[1] < divergence[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_learning_helps_at_two_bits_on_other_images(make_net, images, name):
    net = make_net(depth=2)
    x = torch.cat(images)
    fresh = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    recipe = brief(name, unit_iterations=1500, scales_iterations=500, finish_iterations=600, output_kl_iterations=500, output_kl_rate=1e-3)
    divergence = [
        kl_divergence(quantize(net, images, 2, 4, recipe=r)(fresh), net(fresh)).mean().item() for r in (Recipe(stages=("ranges",)), recipe)
    ]
    assert divergence[1] < divergence[0]


def test_all_stages_run_in_their_order(net, images):
    record = record_of(quantize(net, images, recipe=ALL, cat=True))
    names = [log.name for log in record.passes]
    assert names[-5:] == ["correct_bias", "reconstruct_units", "reconstruct_units", "finish_network", "finish_network"]
    assert all(log.count for log in record.passes[-5:])


@pytest.mark.parametrize(
    ("stage", "mode"), [*((stage, torch.no_grad) for stage in NAMES), ("units", torch.inference_mode), ("finish", torch.inference_mode)]
)
def test_inside_no_grad_and_inference_mode(net, images, stage, mode):
    expected = quantize(net, images, recipe=ONE[stage])
    with mode():
        quantized = quantize(net, images, recipe=ONE[stage])
    check_same(quantized, expected, images[0])


@pytest.mark.parametrize("stage", NAMES)
def test_float64(make_net, images, stage):
    net = make_net().double()
    quantized = quantize(net, images, 3, 3, recipe=ONE[stage])
    check_grids(quantized)
    assert {value.dtype for value in quantized.state_dict().values()} == {torch.float64}
    assert quantized(images[0].double()).dtype == torch.float64


def test_gradients_of_the_caller_stay(net, images):
    net(images[0]).sum().backward()
    before = {name: value.grad.clone() for name, value in net.named_parameters()}
    quantize(net, images)
    assert all(torch.equal(value.grad, before[name]) for name, value in net.named_parameters())


@pytest.mark.parametrize("stage", ["units", "finish"])
def test_bfloat16_steps_give_a_float32_network(net, images, stage):
    quantized = quantize(net, images, recipe=ONE[stage].replace(precision="bfloat16", cache_dtype="bfloat16"))
    check_grids(quantized)
    assert {value.dtype for value in quantized.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("stage", ["finish", "units"])
def test_where_an_operation_has_no_bfloat16_it_learns_in_float32(images, stage):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Deformed(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    net(images[0])
    recipe = ONE[stage].replace(precision="bfloat16")
    with pytest.warns(FxquantWarning, match="does not run in bfloat16, so it learns in float32, which is slower: .*not implemented for"):
        result = quantize(net.eval(), images, recipe=recipe)
    same = quantize(net, images, recipe=recipe.replace(precision="float32"))
    assert torch.equal(result(images[0]), same(images[0]))


class Deformed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offsets, self.conv = nn.Conv2d(8, 18, 3), DeformConv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.offsets(x))


def test_disk_and_memory_give_the_same(make_net):
    """A budget of a mebibyte, which the cache is beyond."""
    net = make_net(width=16)
    x = [torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    places: set[str] = set()
    real = fxquant.reconstruction.store.Store._allocate

    def watched(self, *args):
        value, place = real(self, *args)
        places.add(place)
        return value, place

    recipe = Recipe(stages=("ranges", "units", "scales"), **BRIEFLY, **RATES)
    found = []
    for gib in (2.0, 0.001):
        places.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fxquant.reconstruction.store.Store, "_allocate", watched)
            found.append(quantize(net, x, recipe=recipe.replace(name="r", memory_gib=gib)))
        assert places == ({"host"} if gib == 2.0 else {"host", "disk"})
    assert same_state(*found)
    assert [log.notes for log in record_of(found[0]).passes] == [log.notes for log in record_of(found[1]).passes]


# ---- kill and resume ----


class Killed(Exception):
    """What stands for a kill."""


def killed_behind(patch: pytest.MonkeyPatch, save: int, error: type[BaseException] = Killed) -> None:
    """Let a run die right behind its `save`-th checkpoint, counted from 1."""
    real, done = checkpoints.Checkpoints.save, []

    def wrapped(self, tensors, state):
        real(self, tensors, state)
        done.append(state)
        if len(done) == save:
            raise error

    patch.setattr(checkpoints.Checkpoints, "save", wrapped)


def count_saves(monkeypatch: pytest.MonkeyPatch, run: Callable[[], GraphModule]) -> tuple[GraphModule, list[tuple[str, int]]]:
    """Run, and return the result and where the run was at each checkpoint."""
    states: list[tuple[str, int]] = []
    real = checkpoints.Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoints.Checkpoints,
            "save",
            lambda self, tensors, state: (real(self, tensors, state), states.append((state["stage"], state["done"])))[0],
        )
        return run(), states


def kill_and_resume(
    monkeypatch: pytest.MonkeyPatch, folder: Path, save: int, model: nn.Module, images: Any, *args: Any, **options: Any
) -> GraphModule:
    with monkeypatch.context() as patch:
        killed_behind(patch, save)
        with pytest.raises(Killed):
            quantize(model, images, *args, checkpoint=folder, **options)
    assert [path.name for path in folder.iterdir()] == [checkpoints.FILE]
    return quantize(model, images, *args, resume=folder, **options)


_plain: list[GraphModule] = []


@pytest.fixture
def plain(net, images) -> GraphModule:
    """What `ALL` comes to when nothing happens."""
    if not _plain:
        _plain.append(quantize(net, images))
    return _plain[0]


def test_a_checkpoint_behind_every_unit_and_every_look(net, images, tmp_path, monkeypatch, plain):
    quantized, states = count_saves(monkeypatch, lambda: quantize(net, images, checkpoint=tmp_path / "run"))
    units = [(stage, unit) for stage in ("units", "scales") for unit in (1, 2, 3)]
    assert states[:6] == units
    assert [stage for stage, _ in states[6:]] == ["output_kl"] * 7 + ["finish"] * 5
    assert states[-1] == ("finish", 8)
    check_same(quantized, plain, images[0])
    assert not (tmp_path / "run").exists()


def some_slow(values: Any, fast: Any) -> list[Any]:
    """Return parameters of which all but a few are slow tests."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("save", some_slow(range(1, 19), (1, 3, 4, 6, 7, 13, 14, 18)))
def test_kill_and_resume_is_the_same_bit_for_bit(net, images, tmp_path, monkeypatch, plain, save):
    again = kill_and_resume(monkeypatch, tmp_path / "run", save, net, images)
    check_same(again, plain, images[0])
    assert not (tmp_path / "run").exists()


def test_a_kill_at_every_checkpoint_of_one_run(net, images, tmp_path, monkeypatch, plain):
    folder, kills = tmp_path / "run", 0
    while True:
        with monkeypatch.context() as patch:
            killed_behind(patch, 1)
            try:
                again = quantize(net, images, **{"resume" if kills else "checkpoint": folder})
                break
            except Killed:
                kills += 1
    assert kills == 18
    check_same(again, plain, images[0])


KILLED = """
import signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process that was started in the background ignores
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
import nets
from test_learning import LONG, quantize
quantize(nets.make("chain"), [nets.images(12)], 3, 3, recipe=LONG, checkpoint=sys.argv[3])
"""
LONG = ALL.replace(name="long", unit_iterations=60, finish_iterations=60)


@pytest.mark.parametrize("signal_", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_leaves_a_checkpoint(tmp_path, signal_):
    words = [str(Path(__file__).parent), str(torch.get_num_threads()), str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *words], stderr=subprocess.PIPE, text=True)
    file = tmp_path / "run" / checkpoints.FILE
    while not file.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal_)
    said = process.communicate()[1]
    assert process.returncode in (-signal_, 1), said
    assert ("KeyboardInterrupt" in said) == (signal_ == signal.SIGINT), said
    resumed = quantize(nets.make("chain"), [nets.images(12)], 3, 3, recipe=LONG, resume=tmp_path / "run")
    check_same(resumed, quantize(nets.make("chain"), [nets.images(12)], 3, 3, recipe=LONG), nets.images(4))


OTHERS: dict[str, dict[str, Any]] = {
    "packs": {"unit_granularity": "pack", "pack_length": 2},
    "layers": {"unit_granularity": "layer"},
    "prefix": {"unit_ranges": "prefix"},
    "fisher": {"unit_fisher": "diagonal"},
    "pdquant": {"unit_kl_weight": 1.0, "unit_ranges": "prefix"},
    "epochs": {"unit_sampling": "epochs"},
    "weights first": {"unit_activations": False, "unit_input_drop": 0.0},
    "averaging": {"finish_averaging": 0.9},
    "unmatched": {"finish_match": False},
    "disk": {"memory_gib": 0.001},
    "narrow": {"cache_dtype": "bfloat16", "precision": "bfloat16"},
    "symmetric": {"activation_symmetric": True, "weight_symmetric": True},
    "no rates": {"scales_rate": 0.0},
}


@pytest.mark.parametrize("name", ["packs", "prefix", "fisher", "weights first", "averaging", "unmatched", "symmetric"])
def test_other_recipes_resume_as_well(make_net, images, tmp_path, monkeypatch, name):
    net, recipe = make_net(depth=2 if name == "packs" else 1), ALL.replace(name=name, **OTHERS[name])
    plain, states = count_saves(monkeypatch, lambda: quantize(net, images, recipe=recipe, checkpoint=tmp_path / "all"))
    save = len(states) - 2 if name in ("averaging", "unmatched") else states.index(("scales", 1)) + 1
    again = kill_and_resume(monkeypatch, tmp_path / "run", save, net, images, recipe=recipe)
    check_same(again, plain, images[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_recipes_resume_from_everywhere(make_net, images, tmp_path, monkeypatch, name):
    net, recipe = make_net(depth=4), ALL.replace(name=name, **OTHERS[name])
    plain, states = count_saves(monkeypatch, lambda: quantize(net, images, recipe=recipe, checkpoint=tmp_path / "all"))
    for save in range(1, len(states) + 1):
        again = kill_and_resume(monkeypatch, tmp_path / f"run{save}", save, net, images, recipe=recipe)
        check_same(again, plain, images[0])


@pytest.mark.parametrize(
    ("net_name", "name"),
    [
        ("several_outputs", "brecq"),
        ("several_outputs", "pdquant"),
        ("several_outputs", "finish"),
        ("dense", "pdquant"),
        ("attention", "packptq"),
    ],
)
def test_other_networks_resume_as_well(tmp_path, monkeypatch, name, net_name):
    net, x = nets.make(net_name), list(nets.images(20).split(7))
    options: dict[str, Any] = {"recipe": brief(name, unit_fisher="diagonal" if name == "brecq" else "none", **RATES)}
    plain, states = count_saves(monkeypatch, lambda: quantize(net, x, checkpoint=tmp_path / "all", **options))
    for save in {1, len(states) - 1}:
        again = kill_and_resume(monkeypatch, tmp_path / f"run{save}", save, net, x, **options)
        assert same_state(again, plain)
        assert record_of(again).to_dict() == record_of(plain).to_dict()


@pytest.mark.slow
def test_compiled_steps_go_on_as_they_would_have(net, images, tmp_path, monkeypatch):
    recipe = ONE["finish"].replace(name="compiled", compile=True, finish_iterations=8, finish_checks=4)
    compiled = quantize(net, images, recipe=recipe)
    check_same(kill_and_resume(monkeypatch, tmp_path / "run", 2, net, images, recipe=recipe), compiled, images[0])
    plain = quantize(net, images, recipe=recipe.replace(compile=False))
    torch.testing.assert_close(compiled(images[0]), plain(images[0]), rtol=0.1, atol=0.1 * plain(images[0]).abs().max().item())


def test_weights_keep_their_memory_format_behind_a_resume(images, tmp_path, monkeypatch):
    """Kernels sum in another order for another format."""
    net, x = nets.make("residual").to(memory_format=torch.channels_last), images[0].contiguous(memory_format=torch.channels_last)
    plain, states = count_saves(monkeypatch, lambda: quantize(net, images, checkpoint=tmp_path / "all"))
    for save in (1, len(states) - 1):
        again = kill_and_resume(monkeypatch, tmp_path / f"run{save}", save, net, images)
        check_same(again, plain, x)
        strides = [{name: value.stride() for name, value in graph.state_dict().items()} for graph in (again, plain)]
        assert strides[0] == strides[1]


@pytest.mark.parametrize("missing", ["unit_iterations", "scales_iterations", "output_kl_iterations"])
def test_resume_behind_a_stage_without_iterations(net, images, tmp_path, monkeypatch, missing):
    recipe = ALL.replace(**{missing: 0})
    plain = quantize(net, images, recipe=recipe)
    again = kill_and_resume(monkeypatch, tmp_path / "run", 8 if missing == "output_kl_iterations" else 12, net, images, recipe=recipe)
    check_same(again, plain, images[0])


def test_resume_behind_a_stage_with_nothing_to_train(net, images, tmp_path, monkeypatch):
    recipe = ALL.replace(output_kl_rate=0.0, output_kl_zero_point_rate=0.0)
    plain = quantize(net, images, recipe=recipe)
    assert any("nothing to train" in note for log in record_of(plain).passes for note in log.notes)
    again = kill_and_resume(monkeypatch, tmp_path / "run", 8, net, images, recipe=recipe)
    check_same(again, plain, images[0])


@pytest.mark.parametrize("augmenting", [False, True])
def test_resume_behind_all_learning(net, images, tmp_path, monkeypatch, augmenting):
    """CAT fails, say: the learning is not done again, and views that a loader makes of the images are what they would have been."""
    recipe, batch = ALL.replace(stages=(*STAGES, "cat"), cat_clusters=4, cat_pca=3), images[0]
    if augmenting:
        images = DataLoader(Noisy(torch.cat(images)), 16)
    plain = quantize(net, images, recipe=recipe, cat="paper")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["fxquant.quantize"], "append_selected", _raising(Killed()))
        with pytest.raises(Killed):
            quantize(net, images, recipe=recipe, cat="paper", checkpoint=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(UnitLearning, "backward", _raising(AssertionError("learned again")))
        patch.setattr(NetworkTraining, "backward", _raising(AssertionError("learned again")))
        again = quantize(net, images, recipe=recipe, cat="paper", resume=tmp_path / "run")
    check_same(again, plain, batch)
    assert any(isinstance(module, CAT) for module in again.modules())
    assert not (tmp_path / "run").exists()


def _raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    return fail


def interrupted(patch: pytest.MonkeyPatch, loop: type, call: int) -> None:
    """Raise KeyboardInterrupt in the `call`-th step of a loop."""
    real, calls = loop.backward, []  # type: ignore[attr-defined]

    def backward(self, *args):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(self, *args)

    patch.setattr(loop, "backward", backward)


@pytest.mark.parametrize(
    ("loop", "call", "left"),
    [
        (UnitLearning, 9, ("units", 1)),
        (UnitLearning, 18, ("units", 2)),
        (UnitLearning, 26, ("scales", 1)),
        (NetworkTraining, 3, ("output_kl", 1)),
        (NetworkTraining, 11, ("finish", 3)),
    ],
)
def test_ctrl_c_leaves_a_valid_checkpoint(net, images, tmp_path, monkeypatch, untouched, random_states, plain, loop, call, left):
    folder, before = tmp_path / "run", random_states()
    with untouched(net), monkeypatch.context() as patch:
        interrupted(patch, loop, call)
        with pytest.raises(KeyboardInterrupt):
            quantize(net, images, checkpoint=folder)
    assert random_states() == before
    assert [path.name for path in folder.iterdir()] == [checkpoints.FILE]
    with checkpoints.safe_open(folder / checkpoints.FILE, "pt") as file:
        text = file.metadata()[checkpoints._KEY]
    assert f'"stage": "{left[0]}", "done": {left[1]}' in text
    check_same(quantize(net, images, resume=folder), plain, images[0])


def test_ctrl_c_before_the_first_checkpoint(net, images, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupted(patch, UnitLearning, 3)
        with pytest.raises(KeyboardInterrupt):
            quantize(net, images, checkpoint=folder)
    assert list(folder.iterdir()) == []
    with pytest.raises(CheckpointError, match="there is no checkpoint to resume from"):
        quantize(net, images, resume=folder)


def test_divergence_is_the_same_behind_a_resume(net, images, tmp_path, monkeypatch):
    """Killed while the network is trained again at a tenth of the rates."""
    real = NetworkTraining._loss

    def diverging(self, *given):
        low = [learner.latent for learner in self.latents if learner.spec.levels == 4]
        moved = [(p - s).abs().max().item() for p, s in zip(self.parameters, self.start, strict=True) if any(p is latent for latent in low)]
        return real(self, *given) * (float("nan") if max(moved) > 0.3 else 1.0)

    monkeypatch.setattr(NetworkTraining, "_loss", diverging)
    recipe = ONE["finish"].replace(finish_iterations=22, finish_checks=11, finish_weight_rate=0.2)
    plain, states = count_saves(monkeypatch, lambda: quantize(net, images, recipe=recipe, checkpoint=tmp_path / "all"))
    assert any("trained again at a tenth" in note for note in notes_of(plain, "finish"))
    assert len(states) > 12, "some before the loss was not finite, all of the second time"
    for save in (2, len(states) - 2, len(states)):
        again = kill_and_resume(monkeypatch, tmp_path / f"run{save}", save, net, images, recipe=recipe)
        check_same(again, plain, images[0])


def test_a_unit_that_diverges_is_noted_behind_a_resume(net, images, tmp_path, monkeypatch):
    real = UnitLearning.loss
    monkeypatch.setattr(
        UnitLearning,
        "loss",
        lambda self, rows, done: real(self, rows, done) * (float("nan") if "blocks.0" in self.data.visit.unit.name else 1),
    )
    plain = quantize(net, images)
    assert any(
        "its loss was not finite at a tenth of the rates, so it is left as it was" in note
        for log in record_of(plain).passes
        for note in log.notes
    )
    check_same(kill_and_resume(monkeypatch, tmp_path / "run", 2, net, images), plain, images[0])


# ---- checkpoints that cannot be used ----


@pytest.fixture
def begun(net, images, tmp_path, monkeypatch) -> Path:
    """A folder with the checkpoint of a run of `ALL` behind its second unit."""
    with monkeypatch.context() as patch:
        killed_behind(patch, 2)
        with pytest.raises(Killed):
            quantize(net, images, checkpoint=tmp_path / "begun")
    return tmp_path / "begun"


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "recipe": ({"recipe": ALL.replace(unit_iterations=7)}, "recipe.unit_iterations was 6, is 7"),
    "seed": ({"seed": 1}, "seed was 0, is 1"),
    "w": ({"w": 3}, r"\bw was 2, is 3"),
    "a": ({"a": 3}, r"\b(a|bits) was 2, is 3"),
    "edges": ({"edges": "same"}, "edge"),
    "overrides": ({"overrides": {"fc": {"w": 4}}}, "w was (8|not there), is 4"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_resume_with_other_arguments(net, images, begun, name):
    changes, said = CHANGES[name]
    content = (begun / checkpoints.FILE).read_bytes()
    with pytest.raises(CheckpointError, match=f"is of another run: the recipe differs .*{said}") as caught:
        quantize(net, images, resume=begun, **changes)
    assert "Repeat the arguments that the run was begun with" in str(caught.value)
    assert len(str(caught.value)) < 700, "short enough to be read"
    assert (begun / checkpoints.FILE).read_bytes() == content
    quantize(net, images, resume=begun)


def test_resume_with_another_model(make_net, net, images, begun):
    for other in (make_net(seed=1), make_net(depth=2)):
        with pytest.raises(CheckpointError, match="the network differs"):
            quantize(other, images, resume=begun)


def test_resume_with_other_images(net, images, begun):
    for other in (images[:3], images[::-1], [image + 1e-3 for image in images]):
        with pytest.raises(CheckpointError, match="the calibration images differ"):
            quantize(net, other, resume=begun)


def test_resume_with_images_in_other_batches(net, images, begun, plain):
    check_same(quantize(net, list(torch.cat(images).split(9)), resume=begun), plain, images[0])


def test_resume_with_another_version(net, images, begun, monkeypatch):
    monkeypatch.setattr(checkpoints, "_version", lambda: "99.0")
    with pytest.raises(CheckpointError, match=r"the version differs \(fxquant .* wrote it, this is fxquant 99.0, torch .*, format 3\)"):
        quantize(net, images, resume=begun)


@pytest.mark.parametrize("damage", ["truncated", "a flipped byte", "empty", "another file"])
def test_resume_with_a_damaged_file(net, images, begun, plain, damage):
    path = begun / checkpoints.FILE
    content = path.read_bytes()
    middle = len(content) - 100
    path.write_bytes(
        {
            "truncated": content[:middle],
            "a flipped byte": content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :],
            "empty": b"",
            "another file": b"PK\x03\x04 not this",
        }[damage]
    )
    with pytest.raises(CheckpointError, match="is damaged, truncated, or no checkpoint"):
        quantize(net, images, resume=begun)
    path.unlink()
    check_same(quantize(net, images, checkpoint=begun), plain, images[0])


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None])
def test_resume_from_nothing(net, images, tmp_path, make):
    folder = tmp_path / "nothing"
    make(folder)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint to resume from.*Begin with checkpoint="):
        quantize(net, images, resume=folder)


@pytest.mark.parametrize("word", ["checkpoint", "resume"])
def test_a_folder_that_is_a_file(net, images, tmp_path, word):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(CheckpointError):
        quantize(net, images, **{word: tmp_path / "file"})
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_two_folders(net, images, begun, tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint, resume: .*are two folders\. Give the one to go on from as resume"):
        quantize(net, images, checkpoint=tmp_path / "other", resume=begun)
    assert not (tmp_path / "other").exists()


def test_one_folder_twice(net, images, begun, plain):
    check_same(quantize(net, images, checkpoint=begun, resume=str(begun)), plain, images[0])


@pytest.mark.parametrize("word", ["checkpoint", "resume"])
@pytest.mark.parametrize("value", [7, True, 0.5, [], b"folder"])
def test_no_folder_at_all(net, images, word, value):
    with pytest.raises(ConfigError, match=f"^{word}: .* is no folder"):
        quantize(net, images, **{word: value})


def test_a_folder_of_the_user_stays_with_what_is_in_it(net, images, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    quantize(net, images, checkpoint=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_forgotten_resume_loses_nothing(net, images, begun, plain):
    with pytest.raises(CheckpointError, match=r"there is a checkpoint already.*Go on from it with resume="):
        quantize(net, images, checkpoint=begun)
    check_same(quantize(net, images, resume=begun), plain, images[0])


def test_a_recipe_that_learns_nothing_leaves_nothing(net, images, tmp_path):
    quantize(net, images, recipe="fast", checkpoint=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("save", "code"), [(1, errno.ENOSPC), (2, errno.ENOSPC), (5, errno.EDQUOT), (9, errno.ENOSPC), (18, errno.EDQUOT)])
def test_a_full_disk_loses_nothing(net, images, tmp_path, monkeypatch, untouched, plain, save, code):
    folder, calls = tmp_path / "run", []
    real = os.fsync

    def full(file: int) -> None:
        calls.append(1)
        if len(calls) == save:
            raise OSError(code, os.strerror(code))
        real(file)

    with monkeypatch.context() as patch, untouched(net):
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=re.escape(os.strerror(code))) as caught:
            quantize(net, images, checkpoint=folder)
    assert "GiB free" in str(caught.value)
    if save == 1:
        assert "nothing of this run is there yet" in str(caught.value) and list(folder.iterdir()) == []
        return
    assert "nothing is lost: the checkpoint of " in str(caught.value)
    assert [path.name for path in folder.iterdir()] == [checkpoints.FILE]
    check_same(quantize(net, images, resume=folder), plain, images[0])


def test_the_advice_of_a_full_disk_can_be_followed(net, images, tmp_path, monkeypatch):
    """`resume` is a folder here, not True."""
    calls: list[int] = []
    real = checkpoints.write_whole

    def full(path, content):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    monkeypatch.setattr(checkpoints, "write_whole", full)
    with pytest.raises(CheckpointError) as caught:
        quantize(net, images, checkpoint=tmp_path / "run")
    assert "resume=True" not in str(caught.value)
    assert f"resume={str(tmp_path / 'run')!r}" in str(caught.value)


# ---- what can be asked for ----


def test_fewer_images_than_a_batch(net, images):
    recipe = ALL.replace(unit_batch=32, finish_batch=32, output_kl_batch=32, stages=("ranges", "units", "finish"))
    quantized = quantize(net, [images[0][:10]], recipe=recipe)
    check_grids(quantized)
    assert "batches of 10: there are no more images" in notes_of(quantized, "units")
    assert any(note.startswith("8 steps of 9 views: ") and note.endswith("; 1 images held out") for note in notes_of(quantized, "finish"))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("stage", NAMES)
def test_hardly_any_image(net, images, stage, count):
    quantized = quantize(net, [images[0][:count]], recipe=ONE[stage])
    check_grids(quantized)
    assert quantized(images[1]).isfinite().all()


@pytest.mark.parametrize("name", some_slow(LEARNED, ("brecq", "pdquant", "packptq", "standard")))
def test_one_image_for_every_recipe(net, images, name):
    quantized = quantize(net, [images[0][:1]], recipe=brief(name), cat=True)
    check_grids(quantized)


@pytest.mark.parametrize("name", some_slow(nets.NETS, ("dense", "one_dimension", "linear_norm", "attention", "several_outputs", "shared")))
def test_all_stages_on_every_tiny_network(name, untouched):
    net, x = nets.make(name), list(nets.images(20).split(7))
    with untouched(net):
        quantized = quantize(net, x, 3, 3)
    check_grids(quantized)
    assert all(log.count for log in record_of(quantized).passes if log.name in ("reconstruct_units", "finish_network"))


@pytest.mark.parametrize("name", some_slow(LEARNED, ("adaround", "brecq", "pdquant", "packptq", "output_kl", "finish")))
def test_a_network_without_logits(name):
    net, x = nets.make("several_outputs"), list(nets.images(20).split(7))
    quantized = quantize(net, x, 3, 3, recipe=brief(name), cat=True)
    check_grids(quantized)
    assert quantized(x[0]).keys() == net(x[0]).keys()
    if name == "pdquant":
        said = [note for note in notes_of(quantized, "units") if "no logits" in note]
        assert said == ["the network returns no logits [N, C] of several classes, so their KL is not used"]
    if name == "packptq":
        said = [note for note in notes_of(quantized, "units") if "no logits" in note]
        assert said == ["the network returns no logits [N, C] of several classes, so packs are cut by their length alone"]


def test_batch_norms_without_statistics_correct_no_inputs():
    """As in files whose norms were folded before."""
    net = nets.make("chain")
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.zero_()
            norm.running_var.fill_(1)
    quantized = quantize(net, [nets.images(12)], 3, 3, recipe=brief("pdquant"))
    assert "inputs are not corrected by 2 batch norms that have no statistics, as that of 0" in notes_of(quantized, "units")
    quantized = quantize(nets.make("chain"), [nets.images(12)], 3, 3, recipe=brief("pdquant"))
    assert not any("no statistics" in note for note in notes_of(quantized, "units"))


def test_a_network_without_logits_gets_closer_too():
    net, x = nets.make("several_outputs"), nets.images(24)
    absolute = {"activation_error": "absolute", "activation_p": 2.4}  # sixty steps do not get past what relative errors start with
    ranges = Recipe(stages=("ranges",), **absolute)
    fixed = {"finish_holdout": 0.5, "finish_augment": "none", "finish_blend": 0.0}
    # At the rate of the other tests, 0.1, matched channels take more than sixty steps.
    recipe = ONE["finish"].replace(finish_iterations=60, finish_weight_rate=0.03, **absolute, **fixed)
    found = [quantize(net, [x], 2, 2, recipe=r)(x) for r in (ranges, recipe)]
    errors = [sum(((a - b).norm() / b.norm()).item() for a, b in zip(_tensors(y), _tensors(net(x)), strict=True)) for y in found]
    assert errors[1] < errors[0]


def _tensors(out: dict[str, Any]) -> list[Tensor]:
    return [out["logits"], *out["features"]]


@pytest.mark.parametrize(("w", "a"), [(None, 3), (3, None)])
@pytest.mark.parametrize("name", some_slow(LEARNED, ("brecq", "pdquant", "genie", "packptq", "output_kl", "standard")))
def test_weights_or_activations_alone(net, images, name, w, a):
    quantized = quantize(net, images, w, a, recipe=brief(name))
    check_grids(quantized)
    assert any(isinstance(part, QuantizedLayer) for part in quantized.modules()) == (w is not None)
    assert any(node.target for node, part in called(quantized) if isinstance(part, UniformQuantizer)) == (a is not None)


@pytest.mark.parametrize("edges", ["8bit", "brecq", "same", "float", "integer"])
def test_edges(net, images, edges):
    quantized = quantize(net, images, edges=edges)
    check_grids(quantized)
    if edges == "float":
        assert any("fc: relative error" in note and "nothing to learn" in note for log in record_of(quantized).passes for note in log.notes)
        assert not isinstance(quantized.get_submodule("fc"), QuantizedLayer)


def test_overrides(net, images):
    overrides = {"blocks.*": {"w": 4, "a": 5}, "blocks.0.2.*": {"w": None}, "fc": {"w": 3}}
    quantized = quantize(net, images, overrides=overrides)
    check_grids(quantized)
    assert {row.name: (row.w, row.a) for row in record_of(quantized).layers} == {
        "conv1": (8, None), "blocks.0.0.0": (4, 5), "blocks.0.2.0": (None, 5), "fc": (3, 8)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "field"),
    [("units", "unit_iterations"), ("scales", "scales_iterations"), ("output_kl", "output_kl_iterations"), ("finish", "finish_iterations")],
)
def test_no_iterations_are_no_stage(net, images, stage, field):
    plain = quantize(net, images, recipe=Recipe(stages=("ranges",)))
    quantized = quantize(net, images, recipe=ONE[stage].replace(**{field: 0}))
    assert same_state(quantized, plain)
    assert notes_of(quantized, stage) == ["0 iterations: nothing was learned"]
    among = quantize(net, images, recipe=ALL.replace(name="all", **{field: 0}))
    assert same_state(among, quantize(net, images, recipe=ALL.replace(stages=tuple(s for s in STAGES if s != stage))))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0.0) for name in ("adaround", "qdrop", "pdquant", "genie", "packptq", "output_kl", "standard")),
        ("pdquant", 0.7),
        ("brecq", 0.7),
        ("standard", 0.7),
    ],
)
def test_constant_images(net, name, value):
    quantized = quantize(net, [torch.full((20, 3, 8, 8), value)], recipe=brief(name, **(RATES if name != "fast" else {})), cat=True)
    check_grids(quantized)
    assert quantized(torch.full((2, 3, 8, 8), value)).isfinite().all()


class Dead(nn.Module):
    """A ReLU that nothing passes, so the block and the classifier behind it read a constant."""

    def __init__(self, behind: bool = True):
        super().__init__()
        self.stem, self.block, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)
        nn.init.constant_(self.stem.bias, -1e4)
        if not behind:
            nn.init.zeros_(self.block.bias)
            nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "behind"),
    [
        *((name, True) for name in ("adaround", "qdrop", "pdquant", "genie", "packptq", "output_kl", "standard")),
        ("pdquant", False),
        ("brecq", False),
        ("finish", False),
    ],
)
def test_a_dead_relu_in_front(images, name, behind):
    torch.manual_seed(0)
    net = Dead(behind).eval()
    quantized = quantize(net, images, recipe=brief(name, **(RATES if name != "fast" else {})), cat=True)
    check_grids(quantized)
    assert (quantized(images[0]) - net(images[0])).abs().max() < 0.1


class Plain(nn.Module):
    """Units without layers at the front, in the middle and at the end."""

    def __init__(self):
        super().__init__()
        self.pool, self.conv, self.fc = nn.AvgPool2d(2), nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x * 0.5)
        x = nn.functional.max_pool2d(self.conv(x).relu(), 2)
        return self.fc(x.mean((2, 3))).softmax(1)


@pytest.mark.parametrize("name", some_slow(LEARNED, ("brecq", "pdquant", "packptq", "standard")))
def test_units_without_parameters(images, name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    net, recipe = Plain().eval(), brief(name)
    quantized = quantize(net, images, 3, 3, recipe=recipe)
    check_grids(quantized)
    check_same(kill_and_resume(monkeypatch, tmp_path / "run", 1, net, images, 3, 3, recipe=recipe), quantized, images[0])


ABSURD = {name: 10.0 for name in RATES if name.endswith("_rate")}


@pytest.mark.parametrize("stage", NAMES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_absurd_rates_give_no_nan(net, images, stage, symmetric):
    recipe = ONE[stage].replace(
        **ABSURD, unit_iterations=30, finish_iterations=30, activation_symmetric=symmetric, weight_symmetric=symmetric
    )
    quantized = quantize(net, images, recipe=recipe)
    check_grids(quantized)
    assert quantized(images[0]).isfinite().all()


@pytest.mark.parametrize("stage", NAMES)
def test_absurd_rates_do_little_harm(net, images, stage):
    """What is kept is never much worse than where it started: by the held-out images, and by the error of the unit."""
    x = torch.cat(images)
    ranges, absurd = (quantize(net, images, 2, 4, recipe=r) for r in (Recipe(stages=("ranges",)), ONE[stage].replace(**ABSURD)))
    before, behind = (kl_divergence(quantized(x), net(x)).mean().item() for quantized in (ranges, absurd))
    assert behind < 5 * before


@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("stage", ["output_kl", "finish"])
def test_two_devices(stage, which):
    sys.path.insert(0, str(Path(__file__).parent / "reconstruction"))
    from test_learners import pair

    teacher, student = pair("residual", 3, 3)
    teacher, student = (teacher.to("meta"), student) if which == "teacher" else (teacher, student.to("meta"))
    step = FinishNetwork(teacher, [nets.images(8)], [], ONE[stage], 0, CPU, stage)
    with pytest.raises(ConfigError) as caught:
        step(student)
    assert "'meta'" in str(caught.value) and "'cpu'" in str(caught.value)


# ---- loaders ----


class Noisy(Dataset):
    """Images that get noise, from one of the global generators, whenever they are read."""

    def __init__(self, images: Tensor, kind: str = "torch"):
        self.images, self.kind = images, kind

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        shape = self.images.shape[1:]
        noise = {
            "torch": lambda: torch.randn(shape),
            "numpy": lambda: torch.from_numpy(np.random.randn(*shape)).float(),
            "python": lambda: torch.full(shape, random.gauss(0, 1)),
        }[self.kind]()
        return self.images[index] + 0.05 * noise


CHANGING = "the loader gives other images on each pass; those of the first are the calibration images"


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_other_images_on_each_pass_are_named(net, images, kind, shuffle):
    loader = DataLoader(Noisy(torch.cat(images), kind), 16, shuffle=shuffle)
    first = quantize(net, loader, recipe=ONE["finish"])
    assert notes_of(first, "insert_observers") == [CHANGING]
    torch.rand(3), np.random.rand(3), random.random()
    list(loader)
    check_same(quantize(net, loader, recipe=ONE["finish"]), first, images[0])


def test_passes_of_the_loader_are_trained_on(net, images, monkeypatch, tmp_path):
    loader = DataLoader(Noisy(torch.cat(images)), 16)
    recipe = ONE["finish"].replace(finish_iterations=20)
    quantized = quantize(net, loader, recipe=recipe)
    assert "passes of the loader" in notes_of(quantized, "finish")[0]
    again = kill_and_resume(monkeypatch, tmp_path / "run", 3, net, loader, recipe=recipe)
    check_same(again, quantized, images[0])


class Changing:
    """No DataLoader, and other images on each pass."""

    def __init__(self, images: list[Tensor]):
        self.images, self.generator = images, torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[Tensor]:
        return (batch + 0.1 * torch.randn(batch.shape, generator=self.generator) for batch in self.images)


def test_other_images_on_each_pass_of_any_iterable_are_named(net, images):
    quantized = quantize(net, Changing(images), recipe=ONE["finish"])
    assert any("other images on each pass" in note for log in record_of(quantized).passes for note in log.notes)
    assert "shifted and mirrored" in notes_of(quantized, "finish")[0]
    assert "on each pass of the loader are not used" in notes_of(quantized, "finish")[0]


class RandomBatches:
    """A batch sampler: all images in another order on each pass, in batches of two sizes."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.count).tolist()
        return iter([order[:5], order[5:]])


def test_a_batch_sampler_is_frozen_like_a_sampler(net, images, tmp_path, monkeypatch):
    recipe = ONE["finish"].replace(finish_iterations=20)
    fixed = quantize(net, DataLoader(TensorDataset(torch.cat(images)), batch_sampler=RandomBatches(sum(map(len, images)))), recipe=recipe)
    assert notes_of(fixed, "insert_observers") == [] and "shifted and mirrored" in notes_of(fixed, "finish")[0]
    assert "not used" not in notes_of(fixed, "finish")[0]
    loader = DataLoader(Noisy(torch.cat(images)), batch_sampler=RandomBatches(sum(map(len, images))))
    quantized = quantize(net, loader, recipe=recipe)
    assert "passes of the loader" in notes_of(quantized, "finish")[0]
    check_same(kill_and_resume(monkeypatch, tmp_path / "run", 3, net, loader, recipe=recipe), quantized, images[0])


@pytest.mark.parametrize(
    "make",
    [
        list,
        lambda x: DataLoader(TensorDataset(torch.cat(x)), 16),
        lambda x: DataLoader(TensorDataset(torch.cat(x)), 16, shuffle=True),
        iter,
    ],
)
def test_the_same_images_on_each_pass_are_no_note(net, images, make):
    assert notes_of(quantize(net, make(images), recipe=ONE["finish"]), "insert_observers") == []


def test_how_images_are_batched_does_not_matter(net, images, plain):
    for size in (64, 7):
        check_same(quantize(net, list(torch.cat(images).split(size))), plain, images[0])


# ---- what is printed ----


def test_the_need_is_printed_before_work_starts(net, images, capfd):
    quantize(net, images, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.strip()]
    (place,) = [index for index, line in enumerate(lines) if line.startswith("cache")]
    assert re.fullmatch(r"cache\s+\d+\.\d\d GiB for 64 images in front of 3 units, 2.00 GiB may be in host memory", lines[place])
    assert place < next(
        index for index, line in enumerate(lines) if line.startswith(("insert_fake_quant", "correct_bias", "reconstruct_units"))
    )
    assert sum(line.startswith("reconstruct_units") for line in lines) == sum(line.startswith("finish_network") for line in lines) == 2
    assert "\x1b" not in err and "\r" not in err


def test_the_need_beyond_the_budget_says_where_it_goes(make_net, capfd):
    x = [torch.randn(64, 3, 8, 8) for _ in range(4)]
    quantize(make_net(width=16), x, recipe=ONE["units"].replace(memory_gib=0.001), progress=True)
    assert "the rest goes to disk (memory_gib sets the budget)" in capfd.readouterr().err


@pytest.mark.parametrize("stage", ["output_kl", "finish"])
def test_no_cache_no_line(net, images, stage, capfd):
    quantize(net, images, recipe=ONE[stage], progress=True)
    assert not any(line.startswith("cache") for line in capfd.readouterr().err.splitlines())


def test_silence(net, images, capfd, tmp_path, recwarn):
    quantize(net, images, checkpoint=tmp_path / "run", cat=True)
    assert tuple(capfd.readouterr()) == ("", "")
    assert not [str(warning.message) for warning in recwarn if "fxquant" in str(warning.filename)]


def test_the_meter_rises_to_the_total(net, images, monkeypatch):
    seen: dict[str, list[tuple[float, float, str]]] = {}
    from contextlib import contextmanager

    from fxquant.console import Narrator

    @contextmanager
    def counter(self, stage):
        yield lambda done, total, text="": seen.setdefault(stage, []).append((done, total, text))

    monkeypatch.setattr(Narrator, "counter", counter)
    quantize(net, images, recipe=ALL.replace(finish_iterations=20, output_kl_iterations=20))
    assert set(seen) == set(NAMES)
    for stage, steps in seen.items():
        done = [step for step, _, _ in steps]
        assert done == sorted(done)
        assert {total for _, total, _ in steps} == {3 if stage in ("units", "scales") else 20}
        assert all(text.startswith("loss ") for _, _, text in steps)
        assert done[-1] == (20 if stage in ("output_kl", "finish") else 3 if stage == "units" else 2)


# ---- on a GPU ----


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile_", [False, True])
def test_every_stage_on_a_gpu(net, images, tmp_path, monkeypatch, compile_):
    recipe = ALL.replace(name="all", compile=compile_)
    quantized = quantize(net, images, recipe=recipe, device="cuda")
    assert all(value.is_cuda for value in quantized.state_dict().values())
    check_grids(quantized)
    assert kl_divergence(quantized(images[0].cuda()).cpu(), net(images[0])).mean() < 1
    killed_behind(monkeypatch, 4)
    with pytest.raises(Killed):
        quantize(net, images, recipe=recipe, device="cuda", checkpoint=tmp_path / "run")
    monkeypatch.undo()
    check_grids(quantize(net, images, recipe=recipe, device="cuda", resume=tmp_path / "run"))
