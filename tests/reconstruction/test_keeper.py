"""What a checkpoint holds is all that learning changes, and it is put back to the bit where it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nets import NETS, images
from test_learners import latent, nudge, pair
from torch import Tensor
from torch.fx import GraphModule

from fxquant.errors import CheckpointError
from fxquant.graph import called, fork
from fxquant.pipeline import PassLog
from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.reconstruction.checkpoint import Checkpoints, Identity
from fxquant.reconstruction.keeper import OVER, Keeper, restore, state_of
from fxquant.reconstruction.learners import put_modules

IDENTITY = Identity("n", "r", "i", "v")


def keeper(folder: Path, resume: bool = False) -> Keeper:
    return Keeper(Checkpoints(folder, IDENTITY, resume))


def log(count: int = 0, notes: list[str] | None = None, skipped: list[tuple[str, str]] | None = None) -> PassLog:
    return PassLog("reconstruct_units", "learned", count, skipped or [], notes or [])


def learned(student: GraphModule, seed: int = 0) -> GraphModule:
    """Return the student with everything that is learned somewhere else."""
    new = fork(student)
    learners = latent(new)
    nudge(learners, seed)
    put_modules(new, learners.fixed())
    return new


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) and value.dtype == b[name].dtype for name, value in a.items())


# ---- the values ----


def test_the_sign_of_a_grid_that_was_chosen_again_is_restored():
    _, student = pair("residual")
    path, quantizer = next((str(node.target), module) for node, module in called(student) if isinstance(module, UniformQuantizer))
    spec = replace(quantizer.spec, signed=not quantizer.spec.signed, symmetric=True)
    zero = torch.zeros_like(quantizer.zero_point)
    start, other = fork(student), fork(student)
    put_modules(start, {path: UniformQuantizer(replace(spec, signed=quantizer.spec.signed), quantizer.scale, zero)})
    put_modules(other, {path: UniformQuantizer(spec, quantizer.scale, zero)})
    restore(start, state_of(other))
    assert start.get_submodule(path).spec == spec
    assert torch.equal(start(images(3)), other(images(3)))


@pytest.mark.parametrize("name", NETS)
def test_restored_is_what_was_learned(name):
    _, student = pair(name)
    other, x = learned(student), images(3)
    state, before = {key: value.clone() for key, value in state_of(other).items()}, student(x)
    target = fork(student)
    restore(target, state)
    assert same(state_of(target), state)
    for mine, theirs in zip(_tensors(target(x)), _tensors(other(x)), strict=True):
        assert torch.equal(mine, theirs)
    assert any(not torch.equal(a, b) for a, b in zip(_tensors(target(x)), _tensors(before), strict=True))
    for mine, theirs in zip(_tensors(student(x)), _tensors(before), strict=True):
        assert torch.equal(mine, theirs), "the fork shares modules with the student"


def _tensors(out: object) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [tensor for value in (out.values() if isinstance(out, dict) else out) for tensor in _tensors(value)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["residual", "transposed", "attention", "shared"])
def test_the_state_is_all_that_learning_changes(name):
    _, student = pair(name)
    before, after = student.state_dict(), learned(student).state_dict()
    changed = {key for key, value in after.items() if key not in before or not torch.equal(value, before[key])}
    assert changed <= state_of(learned(student)).keys()


def test_what_is_restored_is_apart_from_the_state():
    _, student = pair("residual")
    state = {key: value.clone() for key, value in state_of(learned(student)).items()}
    target = fork(student)
    restore(target, state)
    wanted = {key: value.clone() for key, value in state.items()}
    for node, part in called(target):
        if isinstance(part, UniformQuantizer):
            part.scale.mul_(2)
        assert node.target is not None
    assert any(not torch.equal(state_of(target)[key], wanted[key]) for key in wanted)
    for key, value in state.items():
        if key.startswith("activations."):
            assert torch.equal(value, wanted[key])


def test_nothing_restored_learns():
    _, student = pair("residual")
    target = fork(student)
    restore(target, state_of(learned(student)))
    layers = [part for _, part in called(target) if isinstance(part, QuantizedLayer)]
    assert not any(value.requires_grad for part in layers for value in part.parameters())


def test_a_bias_that_was_learned_is_made():
    _, student = pair("residual")
    (path, layer), *_ = [(str(node.target), part) for node, part in called(student) if isinstance(part, QuantizedLayer)]
    state = state_of(student)
    assert layer.bias is not None
    bare = fork(student)
    without = replace_bias(layer)
    put_modules(bare, {path: without})
    assert f"{path}.bias" not in state_of(bare)
    restore(bare, state)
    assert torch.equal(bare.get_submodule(path).bias, layer.bias)


def replace_bias(layer: QuantizedLayer) -> QuantizedLayer:
    from fxquant.graph import sharing_copy

    new = sharing_copy(layer)
    new._parameters["bias"] = None
    return new


@pytest.mark.parametrize(("w", "a"), [(None, 3), (3, None)])
def test_weights_or_activations_alone(w, a):
    _, student = pair("residual", w, a)
    state = state_of(student)
    assert any(key.endswith(".weight") for key in state) == (w is not None)
    assert any(key.startswith("activations.") for key in state) == (a is not None)
    target = fork(student)
    restore(target, state_of(learned(student)))
    assert same(state_of(target), state_of(learned(student)))


def test_float64_stays_float64():
    _, student = pair("residual")
    student = student.double()
    target = fork(student)
    restore(target, {key: value.clone() for key, value in state_of(student).items()})
    assert {value.dtype for value in state_of(target).values()} == {torch.float64, torch.bool}  # bool: the sign of a grid


# ---- where a run is ----


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, student = pair("residual")
    quiet = Keeper(None)
    assert quiet.begin("units", student, log()) == 0
    quiet.save("units", 1, student, log())
    assert quiet.training("finish") is None
    quiet.finished()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["units", "scales", "output_kl", "finish"])
def test_a_stage_goes_on_where_it_was(tmp_path, stage):
    _, student = pair("residual")
    done = learned(student)
    keeper(tmp_path / "run").save(stage, 2, done, log(2, ["a note"], [("here", "why")]))
    resumed, fresh, found = keeper(tmp_path / "run", True), fork(student), log()
    assert resumed.begin(stage, fresh, found) == 2
    assert same(state_of(fresh), state_of(done))
    assert (found.count, found.notes, found.skipped) == (2, ["a note"], [("here", "why")])


def test_a_later_stage_has_not_begun(tmp_path):
    _, student = pair("residual")
    keeper(tmp_path / "run").save("units", 2, learned(student), log(2, ["a note"]))
    resumed, fresh, found = keeper(tmp_path / "run", True), fork(student), log()
    for stage in ("scales", "output_kl", "finish"):
        assert resumed.begin(stage, fresh, found) == 0
    assert same(state_of(fresh), state_of(student)) and found == log()


def test_an_earlier_stage_is_over_with_its_own_log(tmp_path):
    _, student = pair("residual")
    first = keeper(tmp_path / "run")
    first.save("units", 3, learned(student, 1), log(3, ["units"]))
    first.save("finish", 5, learned(student, 2), log(7, ["finish"]), {"now.0": torch.ones(2)})
    resumed, found = keeper(tmp_path / "run", True), log()
    assert resumed.is_over("units") and not resumed.is_over("finish")
    assert resumed.begin("units", fork(student), found) == OVER
    assert (found.count, found.notes) == (3, ["units"])
    assert resumed.training("units") is None
    training = resumed.training("finish")
    assert training is not None and training.keys() == {"now.0"} and torch.equal(training["now.0"], torch.ones(2))


@pytest.mark.parametrize("skipped", ["units", "scales", "output_kl"])
def test_an_earlier_stage_that_never_wrote_a_checkpoint(tmp_path, skipped):
    """It had no iterations, or nothing to train: there is nothing to put back, and nothing to fail over."""
    _, student = pair("residual")
    keeper(tmp_path / "run").save("finish", 5, learned(student), log(7))
    fresh, found = fork(student), log()
    assert keeper(tmp_path / "run", True).begin(skipped, fresh, found) >= 10**9, "nothing of it is left to do"
    assert same(state_of(fresh), state_of(student)) and found == log()


def test_logs_of_a_resumed_run_go_on(tmp_path):
    _, student = pair("residual")
    keeper(tmp_path / "run").save("units", 3, student, log(3, ["units"]))
    second = keeper(tmp_path / "run", True)
    second.save("finish", 1, student, log(1, ["finish"]))
    third, found = keeper(tmp_path / "run", True), log()
    third.begin("units", fork(student), found)
    assert found.notes == ["units"]


def test_a_log_that_is_written_on_later_does_not_change_the_checkpoint(tmp_path):
    _, student = pair("residual")
    first, notes = keeper(tmp_path / "run"), ["one"]
    written = log(1, notes)
    first.save("units", 1, student, written)
    notes.append("two")
    assert first.logs["units"]["notes"] == ["one"]


def test_finished_leaves_nothing(tmp_path):
    _, student = pair("residual")
    first = keeper(tmp_path / "run")
    first.save("units", 1, student, log())
    first.finished()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        keeper(tmp_path / "run", True)


def test_another_run_is_refused_before_anything_is_put_back(tmp_path):
    _, student = pair("residual")
    keeper(tmp_path / "run").save("units", 1, student, log())
    with pytest.raises(CheckpointError, match="the network differs"):
        Keeper(Checkpoints(tmp_path / "run", replace(IDENTITY, network="other"), True))
