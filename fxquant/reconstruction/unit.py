"""Learn one unit: the rounding of its weights, and scales and biases where the recipe says so, against the outputs of its float twin.

x = where(random < drop, float input, quantized input)
minimize   |unit(x) - target|^2  +  w_r sum(1 - |2h - 1|^beta)  [+ w_k KL(teacher || float rest(unit(quantized input)))]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.learned import LearnedQuantizer, Masks, SoftRounding, mixed
from fxquant.reconstruction.learners import Learners, put_modules
from fxquant.reconstruction.losses import beta_at, channel_loss, cosine, full_fisher_loss, prediction_loss, rounding_loss
from fxquant.reconstruction.walk import Visit

Show = Callable[[float, float, str], None]
"""What progress is told: done, total, a few words."""

CHECKED = 256
"""Images on which the error of a unit is measured before and behind."""

WORSE = 1.5
"""A unit, or a network, whose error grows beyond this factor has diverged,"""

TOLERATED = 1e-3
"""unless that of a unit grows by no more than this share of the target's power."""


@dataclass(frozen=True)
class UnitSettings:
    """The constants of one unit-wise stage; `fxquant.Recipe` says what each means."""

    iterations: int
    batch: int
    sampling: str = "random"
    rounding_rate: float = 0.0
    rounding_weight: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    beta_shape: str = "linear"
    warmup: float = 0.2
    activations: bool = True
    activation_rate: float = 0.0
    scale_rate: float = 0.0
    bias_rate: float = 0.0
    drop: float = 0.0
    input_drop: float = 0.0
    p: float = 2.0
    fisher: str = "none"
    kl_weight: float = 0.0
    kl_temperature: float = 4.0
    precision: str = "float32"


@dataclass
class UnitData:
    """What a unit learns from: its visit, and what some recipes add to it.

    Attributes:
        visit: inputs and targets.
        count: calibration images.
        gradients: rows of the size of the gradient at each output, for the Fisher losses.
        suffix: from the unit's outputs, and the rows they stand for, to logits through the float rest of the network.
        logits: teacher logits ``[N, C]``.
        corrected: rows of inputs and targets that stand for the float ones (distribution correction).
    """

    visit: Visit
    count: int
    gradients: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    suffix: Callable[[tuple[Tensor, ...], Tensor], Tensor] | None = None
    logits: Tensor | None = None
    corrected: Callable[[Tensor], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] | None = None

    def float_side(self, rows: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return rows of the float inputs and of the targets."""
        return self.corrected(rows) if self.corrected else (self.visit.floats(rows), self.visit.targets(rows))


@dataclass
class UnitOutcome:
    """What learning one unit came to: its error over the power of its target, before and behind."""

    name: str
    before: float
    behind: float
    note: str = ""
    modules: dict[str, nn.Module] = field(default_factory=dict, repr=False)


def learn_unit(data: UnitData, settings: UnitSettings, seed: int, show: Show) -> UnitOutcome:
    """Return the modules of a unit as learned; a unit that diverges is tried again at a tenth of the rates, and then left as it was."""
    notes: list[str] = []
    outcome = UnitOutcome(data.visit.unit.name, 0.0, 0.0)
    for factor in (1.0, 0.1):
        learning = UnitLearning(data, settings, seed, factor)
        outcome.before = outcome.behind = learning.error()
        if not settings.iterations or not learning.parameters:
            outcome.note = "nothing to learn"
            return outcome
        finite = learning.run(show)
        behind = learning.error(hard=True) if finite else float("nan")
        if finite and behind <= max(WORSE * outcome.before, outcome.before + TOLERATED):
            outcome.behind, outcome.modules = behind, learning.learners.fixed()
            break
        what = f"its error grew from {outcome.before:.3g} to {behind:.3g}" if finite else "its loss was not finite"
        notes.append(f"{what} at {'the rates given' if factor == 1 else 'a tenth of the rates, so it is left as it was'}")
    outcome.note = "; ".join(notes)
    return outcome


class UnitLearning:
    """The loop over one unit.

    Args:
        data, settings: what to learn from, and how.
        seed: of the batches and of what is dropped.
        factor: of all rates.
    """

    def __init__(self, data: UnitData, settings: UnitSettings, seed: int, factor: float = 1.0):
        self.data, self.settings = data, settings
        self.generator = torch.Generator().manual_seed(seed)
        self.masks = Masks(self.generator)
        learn_scale = settings.scale_rate > 0
        self.learners = Learners(
            data.visit.student,
            (lambda weight, quantizer: SoftRounding(weight, quantizer, learn_scale)) if settings.rounding_rate else None,
            self._activation if settings.activations else None,
            biases=settings.bias_rate > 0,
            float_activations=not settings.activations,
        )
        for quantizer in self.learners.activations.values():
            quantizer.masks = self.masks
        self.soft = [learner for learner in self.learners.weights.values() if isinstance(learner, SoftRounding)]
        groups: list[tuple[Sequence[nn.Parameter], float, bool]] = [
            ([learner.alpha for learner in self.soft], settings.rounding_rate, False),
            (_learned(learner.scale.value for learner in self.soft), settings.scale_rate, True),
            (list(self.learners.biases.values()), settings.bias_rate, True),
            (_learned(learner.scale.value for learner in self.learners.activations.values()), settings.activation_rate, True),
        ]
        self.groups = [{"params": list(values), "peak": factor * rate, "falls": falls} for values, rate, falls in groups if values and rate]
        self.parameters = [parameter for group in self.groups for parameter in group["params"]]  # type: ignore[attr-defined]
        self._order = torch.empty(0, dtype=torch.int64)
        sides = 2 if data.suffix else 1  # run in one pass
        self.at_once = max(1, data.visit.images_at_once(sides * settings.batch) // sides)

    def _activation(self, quantizer: UniformQuantizer) -> LearnedQuantizer:
        learned = self.settings.activation_rate > 0 and not self.data.visit.is_settled(quantizer)
        return LearnedQuantizer(quantizer, learned_scale=learned)

    def run(self, show: Show) -> bool:
        """Learn; say whether all losses that were looked at are finite."""
        settings = self.settings
        optimizer = torch.optim.Adam(self.groups, fused=can_fuse(self.parameters))
        self._dropping(settings.drop)
        for step in range(settings.iterations):
            done = step / settings.iterations
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * (cosine(done) if group["falls"] else 1.0)
            optimizer.zero_grad(set_to_none=True)
            loss = self.backward(self.draw(), done)
            optimizer.step()
            if step % 50 == 49 or step + 1 == settings.iterations:
                if not torch.isfinite(loss):
                    return False
                show(step + 1, settings.iterations, f"loss {loss.item():.4f}")
        self._dropping(0.0)
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters)

    def draw(self) -> Tensor:
        """Return the rows of the next batch."""
        size = min(self.settings.batch, self.data.count)
        if self.settings.sampling == "random":
            return torch.randint(self.data.count, (size,), generator=self.generator)
        if len(self._order) < size:
            self._order = torch.randperm(self.data.count, generator=self.generator)
        rows, self._order = self._order[:size], self._order[size:]
        return rows

    def backward(self, rows: Tensor, done: float) -> Tensor:
        """Add the gradients of a batch to those of the parameters, and return its loss; where values are large, in parts."""
        losses = []
        for part in rows.tensor_split(math.ceil(len(rows) / self.at_once)):
            loss = self.loss(part, done) * (len(part) / len(rows))
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def loss(self, rows: Tensor, done: float) -> Tensor:
        """Return what is minimized for the images `rows` when a share `done` of the iterations is over."""
        settings, data = self.settings, self.data
        floats, targets = data.float_side(rows)
        quantized = data.visit.quantized(rows)
        inputs = quantized
        if settings.input_drop:
            pairs = zip(floats, quantized, strict=True)
            inputs = tuple(mixed(x, q, settings.input_drop, self.masks) if q.is_floating_point() else q for x, q in pairs)
        with torch.autocast(targets[0].device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            plain: tuple[Tensor, ...] = ()
            if data.suffix is None:
                outputs = self.outputs(inputs)
            else:  # one pass over both: the mixed input for the reconstruction, the quantized one for the prediction
                both = self.outputs(tuple(torch.cat(pair) for pair in zip(inputs, quantized, strict=True)))
                outputs = tuple(value[: len(rows)] for value in both)
                plain = tuple(value[len(rows) :].to(target.dtype) for value, target in zip(both, targets, strict=True))
        loss = self._reconstruction([value.to(target) for value, target in zip(outputs, targets, strict=True)], targets, rows)
        if data.suffix is not None:
            assert data.logits is not None
            loss = loss + settings.kl_weight * prediction_loss(
                data.suffix(plain, rows), data.logits[rows.to(data.logits.device)], settings.kl_temperature
            )
        beta = beta_at(done, settings.beta, settings.warmup, settings.beta_shape)
        if self.soft and beta is not None:
            loss = loss + settings.rounding_weight * rounding_loss([learner.last for learner in self.soft], beta)
        return loss

    def outputs(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the outputs of the unit that learns."""
        out = self.learners.graph(*inputs)
        return out if isinstance(out, tuple) else (out,)

    def _reconstruction(self, outputs: Sequence[Tensor], targets: Sequence[Tensor], rows: Tensor) -> Tensor:
        settings = self.settings
        if self.data.gradients is None:
            measured = zip(outputs, targets, self.data.visit.axes, strict=True)
            losses = [channel_loss(out, target, settings.p, axis=axis) for out, target, axis in measured]
        else:
            weighted = zip(outputs, targets, self.data.gradients(rows), self.data.visit.axes, strict=True)
            if settings.fisher == "full":
                losses = [full_fisher_loss(out, target, gradient) for out, target, gradient, _ in weighted]
            else:
                losses = [channel_loss(out, target, 2, gradient.square(), axis) for out, target, gradient, axis in weighted]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def error(self, hard: bool = False) -> float:
        """Return ``|output - target|^2 / |target|^2`` over the first images, as the unit is now, or with all that is learned made hard."""
        graph = Learners(self.data.visit.student, None, None, float_activations=not self.settings.activations).graph
        if hard:
            put_modules(graph, self.learners.fixed())
        noise = power = 0.0
        for rows in torch.arange(min(CHECKED, self.data.count)).split(self.data.visit.images_at_once()):
            out = graph(*self.data.visit.quantized(rows))
            for mine, target in zip(out if isinstance(out, tuple) else (out,), self.data.visit.targets(rows), strict=True):
                noise += (mine.double() - target.double()).square().sum().item()
                power += target.double().square().sum().item()
        return noise / power if power else noise

    def _dropping(self, drop: float) -> None:
        for quantizer in self.learners.activations.values():
            quantizer.drop = drop


def can_fuse(parameters: Sequence[Tensor]) -> bool:
    """Say whether Adam has a fused step where these are."""
    return all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)


def _learned(values: Iterable[Tensor]) -> list[nn.Parameter]:
    return [value for value in values if isinstance(value, nn.Parameter)]
