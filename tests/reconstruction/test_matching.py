"""Matched channels: nothing changes for a student that is its teacher, moments are the teacher's, and folding gives the same network."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from nets import Net, images
from test_learners import pair, spread
from test_network import PLAIN, quiet, training_of, values
from torch import nn
from torch.fx import GraphModule

from fxquant.graph import called, fork
from fxquant.quantizers.learned import LatentWeight, LearnedQuantizer
from fxquant.reconstruction.learners import Learners
from fxquant.reconstruction.matching import EPSILON, Match, Matching, moments
from fxquant.reconstruction.network import NetworkTraining
from fxquant.reconstruction.norms import NORMS

MATCHED = replace(PLAIN, match=True)


@pytest.fixture(scope="module")
def nets() -> tuple[GraphModule, GraphModule]:
    return pair(spread("residual"), 2, 3)


def disturbed(training: NetworkTraining) -> NetworkTraining:
    """Let the student's channels be elsewhere, and its gains and shifts have learned something."""
    g = torch.Generator().manual_seed(0)
    for parameter in training.parameters:
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return training


def test_moments_are_those_of_channels():
    y = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.0, 7.0]).view(3, 1, 1) + 2
    mean, deviation = moments(y)
    torch.testing.assert_close(mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(deviation, (y.var((0, 2, 3), correction=0) + EPSILON).sqrt(), rtol=1e-3, atol=1e-5)


def test_layers_with_a_norm_are_matched(nets):
    training = training_of(nets, MATCHED)
    assert training.matching is not None
    convolutions = {str(node.target) for node, module in called(nets[1]) if isinstance(module, nn.Conv2d)}
    assert set(training.matching.matches) == set(nets[0].meta[NORMS]) & convolutions
    student, teacher = training.matched_student, training.matched_teacher
    assert sum(isinstance(module, Match) for module in student.modules()) == len(training.matching.matches) >= 3
    assert len(student.graph.find_nodes(op="placeholder")) == 1 + 2 * len(training.matching.matches)
    assert len(teacher(images(2))[1]) == 2 * len(training.matching.matches)


def test_what_cannot_take_it_over_is_left_alone(nets):
    teacher, student = nets
    for options in ({"weight": None}, {"biases": False}):
        given = {"weight": LatentWeight, "biases": True, **options}
        learners = Learners(student, given["weight"], lambda q: LearnedQuantizer(q, relative=True), biases=given["biases"])
        assert not Matching(learners, teacher).matches
    for fixed in ("weight scales", "biases"):
        training = training_of(nets, MATCHED, **{fixed: 0.0})
        assert training.matching is None


def test_a_student_that_is_its_teacher_stays_as_it_is(nets):
    teacher, student = nets
    twin, x = fork(student), images(9)
    twin.meta[NORMS] = teacher.meta[NORMS]
    learners = Learners(student, LatentWeight, lambda q: LearnedQuantizer(q, relative=True), biases=True)
    matching = Matching(learners, twin)
    assert matching.matches
    with torch.no_grad():
        output, theirs = matching.on_teacher(twin)(x)
        assert torch.equal(output, student(x))
        matched = matching.on_student(learners.graph)(x, *theirs)
    close = torch.isclose(matched, output, rtol=1e-3, atol=1e-3).all(1)  # a value on the border of two codes may fall to the other side
    assert close.float().mean() > 0.7


def test_the_moments_behind_a_layer_are_the_teachers(nets):
    training, x = training_of(nets, MATCHED), images(9)
    with torch.no_grad():
        _, theirs = training.matched_teacher(x)
        seen = {}
        for path, match in training.matching.matches.items():
            match.register_forward_hook(lambda module, given, output, path=path: seen.update({path: moments(output)}))
        training.matched_student(x, *theirs)
    for (mean, deviation), wanted in zip(seen.values(), zip(theirs[::2], theirs[1::2], strict=True), strict=True):
        torch.testing.assert_close(mean, wanted[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(deviation, wanted[1], rtol=1e-3, atol=1e-3)


def test_folded_it_computes_the_same(nets):
    """On the batch that was seen, to which the moments belong, and with what the channels have learned."""
    training = disturbed(training_of(nets, MATCHED))
    x = training.views.unchanged(256)
    with torch.no_grad():
        matched = training.matched_student(x, *training.matched_teacher(x)[1])[0]
        assert not torch.allclose(training.student(x)[0], matched, atol=0.1)
        training.matching.fold(lambda: training._run_for_moments(256))
        torch.testing.assert_close(training.student(x)[0], matched, rtol=1e-3, atol=1e-3)


def test_moments_are_of_as_many_images_as_the_recipe_says(nets, monkeypatch):
    training = training_of(nets, replace(MATCHED, match_images=5, iterations=2, checks=1))
    asked, ask = [], training._run_for_moments
    monkeypatch.setattr(training, "_run_for_moments", lambda images: (asked.append(images), ask(images)))
    training.run(quiet)
    assert set(asked) == {5}


def test_parts_are_folded_as_one(nets):
    """Of a first layer, whose inputs do not depend on what else is matched."""
    folded = []
    for at_once in (16, 4):
        training = training_of(nets, MATCHED)
        training.at_once = at_once
        training.matching.fold(partial(training._run_for_moments, 256))
        match = training.matching.matches["stem.0"]
        folded.append((match.scale.value.detach(), match.bias.detach()))
    for one, other in zip(*folded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_measured_does_not_depend_on_the_share_that_was_float(nets):
    training = disturbed(training_of(nets, replace(MATCHED, mix=0.5)))
    before = values(training)
    errors = []
    for share in (0.0, 0.4):
        training._mix(share)
        errors.append(training._checked(None, 256)[0])
    assert torch.equal(errors[0], errors[1])
    assert all(map(torch.equal, values(training), before)), "it was but looked at"


@pytest.mark.parametrize("at_once", [1, 3])
def test_channels_of_a_single_value(at_once):
    """Behind a global pool a part of one image has one value a channel, whose spread says nothing: the mean is what is left."""

    def body(s, x):
        return s.fc(s.b(s.a(x).relu().mean((2, 3), keepdim=True)).relu().flatten(1))

    net = Net(
        body,
        a=nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
        b=nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)),
        fc=nn.Linear(8, 5),
    )
    training = training_of(pair(net.eval(), 3, 3), MATCHED)
    assert len(training.matching.matches) == 2
    training.at_once = at_once
    assert training.run(quiet).behind < float("inf")
    assert all(value.isfinite().all() for value in values(training))


def test_gradients_of_what_a_channel_learns(nets):
    """Of gain and shift ``y' = n (d' g) + m' + b``: the sums of the gradient times n d', and of the gradient."""
    training = training_of(nets, MATCHED)
    match = next(iter(training.matching.matches.values()))
    g = torch.Generator().manual_seed(0)
    channels = len(match.bias)
    y, out = (torch.randn(4, channels, 5, 5, generator=g) for _ in range(2))
    mean, deviation = torch.randn(channels, generator=g), torch.rand(channels, generator=g)
    match(y, mean, deviation).backward(out)
    own_mean, own = moments(y)
    normal = (y - own_mean.view(-1, 1, 1)) / own.view(-1, 1, 1) * deviation.view(-1, 1, 1)
    torch.testing.assert_close(match.scale.value.grad, (out * normal).sum((0, 2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(match.bias.grad, out.sum((0, 2, 3)), rtol=1e-3, atol=1e-3)


def test_what_is_kept_is_folded(nets):
    training = training_of(nets, MATCHED)
    outcome = training.run(quiet)
    assert outcome.step > 0 and outcome.behind < outcome.before
    assert training.held_out_errors().mean().item() == pytest.approx(outcome.behind, rel=1e-6)
    stays = Learners(nets[1], None, None).graph
    for path, module in training.learners.fixed().items():
        stays.set_submodule(path, module)
    with torch.no_grad():
        torch.testing.assert_close(stays(images(6)), training.student(images(6))[0], rtol=1e-3, atol=1e-3)


def test_images_for_the_moments_are_not_held_out(nets):
    training = training_of(nets, MATCHED)
    held = {tuple(image.flatten()[:5].tolist()) for image in training.held_out}
    seen = {tuple(image.flatten()[:5].tolist()) for image in training.views.unchanged(256)}
    assert len(seen) == 16 and not held & seen
    assert len(training.views.unchanged(3)) == 3
