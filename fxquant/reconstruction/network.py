"""Train a whole quantized network against the float one, on fresh views of the calibration images.

    view -+-> teacher -----------------------> logits, features at unit outputs
          |                                      |        |
          '-> student (learned quantizers) ----> KL   +   normalized error        ->  weights, scales, biases

Two stages are this loop: the finish, in which everything moves that costs nothing at inference, and the refinement by output KL, in which
scales and zero-points move a little. Views are made from the number of the step. What is kept is the last state, where the rates have
fallen to 0, unless another is clearly better on held-out calibration images; or the best one, where the last is no better than the start
(the refinement by output KL always keeps the best).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.execution import bytes_per_image, images_at_once
from fxquant.graph import fork
from fxquant.metrics import exceeds, kl_divergence
from fxquant.quantizers.learned import LatentWeight
from fxquant.reconstruction.learners import Learners, without_gradients
from fxquant.reconstruction.losses import annealed, cosine, feature_loss, feature_losses, powers_of, prediction_loss
from fxquant.reconstruction.matching import Matching
from fxquant.reconstruction.unit import WORSE, Show, can_fuse
from fxquant.reconstruction.views import Views
from fxquant.tree import floats_of, has_classes, tensors_of

State = dict[str, Tensor]

LEAST, LEAST_BYTES = 8, 2**31
"""Images that run at once at least where channels are matched, so that their moments say something; fewer if their values take more."""

HARMLESS = 0.1
"""A training whose error on the held-out images grows by no more has not diverged: ``T^2 KL``, or the normalized error of outputs."""


@dataclass(frozen=True)
class NetworkSettings:
    """The constants of one network-wise stage; `fxquant.Recipe` says what each means."""

    iterations: int
    temperature: float
    kl_weight: float = 1.0
    warmup: float = 0.0
    feature_weight: float = 0.0
    penalty: float = 0.0
    mix: float = 0.0
    mix_until: float = 0.0
    checks: int = 20
    margin: float = 2.0
    holdout_temperature: float = 4.0
    averaging: float = 0.0
    match: bool = False
    match_images: int = 256
    precision: str = "float32"
    compile: bool = False


@dataclass
class Outcome:
    """What a training came to: the error on the held-out images before and behind, and the step of what was kept.

    `retried`: it diverged at the rates given (a loss that is not finite, or nothing better than the start and far worse at the end).
    """

    before: float
    behind: float
    step: int
    retried: bool = False


class Taught(NamedTuple):
    """What the teacher says of a batch: its output, its features, and the moments of channels that are matched."""

    output: Any
    features: list[Tensor]
    moments: Sequence[Tensor] = ()


class NetworkTraining:
    """One network-wise stage.

    Args:
        learners: the student.
        teacher: the float graph.
        places: nodes whose values are compared, the student's before they are quantized.
        views: what is trained on.
        held_out: images ``[N, C, H, W]``, on the CPU, for choosing what is kept.
        rates: for each group of parameters its peak rate.
        settings: everything else.
        device: where to work.
    """

    def __init__(
        self,
        learners: Learners,
        teacher: GraphModule,
        places: Sequence[str],
        views: Views,
        held_out: Tensor,
        rates: Sequence[tuple[Iterable[nn.Parameter], float]],
        settings: NetworkSettings,
        device: torch.device,
    ):
        self.learners, self.views, self.settings, self.device = learners, views, settings, device
        self.student = with_features(learners.graph, places)
        self.teacher = with_features(without_gradients(teacher), places)
        self.groups = [(list(parameters), rate) for parameters, rate in rates if rate]
        self.parameters = [parameter for parameters, _ in self.groups for parameter in parameters]
        moving = set(map(id, self.parameters))
        for parameter in learners.graph.parameters():  # what has no rate needs no gradient
            parameter.requires_grad_(id(parameter) in moving)
        matching = Matching(learners, teacher) if settings.match else None
        self.matching = matching if matching and matching.matches else None
        self.steps: tuple[Callable[..., Any], Callable[..., Any]] = (self.student, self.teacher)
        if self.matching:
            self.matched_student, self.matched_teacher = self.matching.on_student(self.student), self.matching.on_teacher(self.teacher)
            self.steps = self.matched_student, self.matched_teacher
        if settings.compile:
            mode = "reduce-overhead" if device.type == "cuda" else "default"
            self.steps = torch.compile(self.steps[0], mode=mode), torch.compile(self.steps[1], mode=mode)
        self.start = self._copies()
        self.held_out = held_out.to(device)
        weights = sum(value.numel() * value.element_size() for value in teacher.parameters())
        self.at_once = images_at_once(teacher.graph.nodes, device, max(128, views.size), weights)
        if self.matching:
            image = sum(map(bytes_per_image, teacher.graph.nodes))
            self.at_once = max(self.at_once, min(LEAST, int(LEAST_BYTES / max(1, image))))
        with torch.no_grad():
            self.wanted = self._outputs(self.teacher, self.held_out)
        self.latents = [learner for learner in learners.weights.values() if isinstance(learner, LatentWeight)]

    def run(self, show: Show, state: State | None = None, keep: Callable[[State], None] | None = None) -> Outcome:
        """Train, and leave what is kept in the learners.

        Args:
            show: called with (done, total, text).
            state: where to go on, as `keep` was given it.
            keep: called with all that is needed to go on, at every check.
        """
        first = 1.0 if state is None else state["figures"][4].item()
        for factor in (1.0, 0.1) if first == 1 else (0.1,):
            outcome = self._train(factor, show, state, keep)
            if outcome is not None:
                outcome.retried = factor < 1
                return outcome
            self._reset(self.start)
            state = None
        before = self.held_out_errors().mean().item()
        return Outcome(before, before, 0, retried=True)

    def _train(self, factor: float, show: Show, state: State | None, keep: Callable[[State], None] | None) -> Outcome | None:
        settings = self.settings
        groups = [{"params": parameters, "peak": factor * rate} for parameters, rate in self.groups]
        optimizer = torch.optim.Adam(groups, fused=can_fuse(self.parameters))
        average = [value.clone() for value in self.start] if settings.averaging else None
        kept, kept_errors = [value.clone() for value in self.start], self.held_out_errors()
        start_error = kept_errors.mean().item()
        outcome, first = Outcome(start_error, start_error, 0), 0
        if state is not None:
            first = self._restore(state, optimizer, [*kept, kept_errors], average, outcome)
        every = max(1, settings.iterations // settings.checks)
        for step in range(first, settings.iterations):
            done = step / settings.iterations
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * cosine(done, settings.warmup)
            self._mix(annealed(done, settings.mix, settings.mix_until))
            optimizer.zero_grad(set_to_none=True)
            loss = self.backward(self.views.batch(step).to(self.device))
            optimizer.step()
            for learner in self.latents:
                learner.project()
            if average is not None:
                decay = min(settings.averaging, (step + 1) / (step + 10))
                for mean, value in zip(average, self.parameters, strict=True):
                    mean.lerp_(value.detach(), 1 - decay)
            if step % 10 == 0 and not torch.isfinite(loss):
                return None
            last = step + 1 == settings.iterations
            if (step + 1) % every == 0 or last:
                few = min(settings.match_images, max(32, every * self.views.size // 8))  # a check costs less than the steps up to it
                errors, reached = self._checked(average, settings.match_images if last else few)
                error = errors.mean().item()
                if not error < float("inf"):
                    return None
                if error < outcome.behind or (last and error < outcome.before and not exceeds(errors - kept_errors, settings.margin)):
                    outcome.behind, outcome.step, kept, kept_errors = error, step + 1, reached, errors
                if keep:
                    keep(self._state(step + 1, factor, optimizer, [*kept, kept_errors], average, outcome))
            if step % 10 == 9:
                show(step + 1, settings.iterations, f"loss {loss.item():.4f}, held out {outcome.behind:.4f}")
        if not outcome.step and not self._checked(average, settings.match_images)[0].mean() <= max(
            WORSE * outcome.before, outcome.before + HARMLESS
        ):
            return None
        self._reset(kept)
        self._mix(0.0)
        return outcome

    def backward(self, images: Tensor) -> Tensor:
        """Add the gradients of a batch to those of the parameters, and return its loss; where values are large, in parts, and then channels
        are matched part by part."""
        parts = images.tensor_split(math.ceil(len(images) / self.at_once))
        taught = [self._taught(part) for part in parts]
        powers = [torch.stack(of_parts).sum(0) for of_parts in zip(*(powers_of(of_part.features) for of_part in taught), strict=True)]
        losses = []
        for part, of_part in zip(parts, taught, strict=True):
            loss = self._loss(part, of_part, powers, len(part) / len(images))
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Taught:
        """Return what the teacher says of images; of a network without logits, its outputs are features too."""
        if self.settings.compile and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # what the teacher gives lives until the next step, not until the student runs
        with self._precision():
            found = self.steps[1](images)
        (theirs, wanted), moments = found if self.matching else (found, ())
        return Taught(theirs, [*wanted, *([] if has_classes(theirs) else floats_of(theirs))], moments)

    def _loss(self, images: Tensor, taught: Taught, powers: Sequence[Tensor], share: float) -> Tensor:
        """Return the part that `images`, a share of a batch, have in what is minimized, in float32; `powers` are those of the batch."""
        settings = self.settings
        with self._precision():
            mine, features = self.steps[0](images, *taught.moments)
        loss = images.new_zeros(())
        logits = has_classes(mine)
        if logits:
            loss = loss + share * settings.kl_weight * prediction_loss(mine, taught.output, settings.temperature)
        features = [*features, *([] if logits else floats_of(mine))]
        if features and (settings.feature_weight or not logits):
            loss = loss + (settings.feature_weight if logits else 1.0) * feature_loss(features, taught.features, powers)
        if settings.penalty:
            moved = [(parameter - start).square().sum() for parameter, start in zip(self.parameters, self.start, strict=True)]
            loss = loss + share * settings.penalty * torch.stack(moved).sum()
        return loss

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    @torch.no_grad()
    def held_out_errors(self) -> Tensor:
        """Return the errors ``[N]`` of the held-out images, all quantizers hard: ``T^2 KL`` to the float network at T =
        ``holdout_temperature``; where there are no logits, the normalized error of the outputs."""
        self._mix(0.0)
        mine = self._outputs(self.student, self.held_out)
        if has_classes(mine):
            temperature = self.settings.holdout_temperature
            mine, wanted = (logits.cpu().double() / temperature for logits in (mine, self.wanted))
            return temperature**2 * kl_divergence(mine, wanted)
        return feature_losses(floats_of(mine), floats_of(self.wanted), len(self.held_out))

    def _outputs(self, graph: GraphModule, images: Tensor) -> Any:
        parts = [graph(part)[0] for part in images.split(self.at_once)]
        if has_classes(parts[0]):
            return torch.cat(parts)
        return [_joined(values) for values in zip(*map(tensors_of, parts), strict=True)]

    def _checked(self, average: list[Tensor] | None, count: int) -> tuple[Tensor, list[Tensor]]:
        """Return the errors ``[N]`` of the held-out images with what would stay if training ended here, with moments of `count` images, and
        what that is."""
        now = self._copies()
        if average is not None:
            self._reset(average)
        if self.matching:
            self._mix(0.0)
            self.matching.fold(lambda: self._run_for_moments(count))
        found = self.held_out_errors(), self._copies()
        self._reset(now)
        return found

    @torch.no_grad()
    def _run_for_moments(self, count: int) -> None:
        """Call the matched student on up to `count` training images as they are."""
        images = self.views.unchanged(count)
        for part in images.tensor_split(math.ceil(len(images) / self.at_once)):
            part = part.to(self.device)
            self.matched_student(part, *self.matched_teacher(part)[1])

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def _mix(self, share: float) -> None:
        for quantizer in self.learners.activations.values():
            quantizer.mix = share

    @torch.no_grad()
    def _reset(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def _state(
        self, step: int, factor: float, optimizer: torch.optim.Optimizer, kept: list[Tensor], average: list[Tensor] | None, outcome: Outcome
    ) -> State:
        figures = torch.tensor([step, outcome.before, outcome.behind, outcome.step, factor], dtype=torch.float64)
        state = {"figures": figures} | {f"kept.{index}": value for index, value in enumerate(kept)}
        for index, parameter in enumerate(self.parameters):
            state[f"now.{index}"] = parameter.detach()
            state |= {f"adam.{index}.{key}": value for key, value in optimizer.state[parameter].items()}
            if average is not None:
                state[f"average.{index}"] = average[index]
        return state

    def _restore(
        self,
        state: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        kept: list[Tensor],
        average: list[Tensor] | None,
        outcome: Outcome,
    ) -> int:
        step, outcome.before, outcome.behind, kept_step, _ = state["figures"].tolist()
        outcome.step = int(kept_step)
        for index, value in enumerate(kept):
            value.copy_(state[f"kept.{index}"])
        self._reset([state[f"now.{index}"].to(self.device) for index in range(len(self.parameters))])
        for index, parameter in enumerate(self.parameters):
            if average is not None:
                average[index].copy_(state[f"average.{index}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = state[f"adam.{index}.{key}"]
                optimizer.state[parameter][key] = value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)
        return int(step)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all parts, or the mean of numbers (a statistic of the batch, a parameter)."""
    if parts[0].ndim:
        return torch.cat(list(parts))
    return torch.stack(list(parts)).to(torch.promote_types(parts[0].dtype, torch.float64)).mean(0)


def with_features(gm: GraphModule, nodes: Sequence[str]) -> GraphModule:
    """Return a graph that returns ``(output, (values of the nodes...))``."""
    new = fork(gm)
    named = {node.name: node for node in new.graph.nodes}
    output = next(node for node in new.graph.nodes if node.op == "output")
    output.args = ((output.args[0], tuple(named[name] for name in nodes)),)
    new.recompile()
    return new
