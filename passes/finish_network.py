"""FinishNetwork: train the whole network against the float one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph import check_same_device
from fxquant.passes.insert_fake_quant import InsertFakeQuant
from fxquant.passes.reconstruct_units import ReconstructUnits
from fxquant.pipeline import Pass
from fxquant.quantizers.learned import LatentWeight, LearnedQuantizer
from fxquant.recipe import Recipe
from fxquant.reconstruction.keeper import Keeper
from fxquant.reconstruction.learners import Learners, put_modules
from fxquant.reconstruction.network import NetworkSettings, NetworkTraining
from fxquant.reconstruction.norms import NORMS
from fxquant.reconstruction.views import Views
from fxquant.tree import has_classes
from fxquant.units import cut


class FinishNetwork(Pass):
    """Train integers, scales and biases of the whole network on fresh views of the calibration images.

        conv(Wq) -> relu -> [quantizer] -> ...      =>      conv(Wq') -> relu -> [quantizer'] -> ...

        min   T^2 KL(teacher / T || student / T)  +  w mean over unit outputs of |f' - f|^2 / |f|^2

    The graph stays as it is. Weights are trained in units of their step behind a straight-through round, so they may cross several
    levels; what is kept is the last state; the best one (the start included) where it has clearly less KL on held-out calibration images,
    or where the last has no less than the start. Convolutions with a folded batch norm are held to the teacher's mean and spread
    meanwhile (`fxquant.reconstruction.matching`).

    With ``stage="output_kl"`` only the scales of weights and the scales and zero-points of activations move, held to where they start by
    ``lambda_p (|scale / scale0 - 1|^2 + |z - z0|^2)`` (the first stage of CAT's paper; scales are relative so that one lambda_p fits all
    layers), and the best state is kept.

    Args:
        teacher: the float graph.
        images: the calibration images in order, on the CPU.
        loader: where they came from; its own randomness makes the views when it has some.
        recipe: the constants; its ``finish_*`` or ``output_kl_*`` fields.
        seed: of the views.
        device: where to work.
        stage: ``"finish"`` or ``"output_kl"``.
        keeper: writes checkpoints.
    """

    after = (InsertFakeQuant, ReconstructUnits)
    preserves_output = False
    verb = "trained"

    def __init__(
        self,
        teacher: GraphModule,
        images: Sequence[Tensor],
        loader: Iterable[Any],
        recipe: Recipe,
        seed: int,
        device: torch.device,
        stage: str = "finish",
        keeper: Keeper | None = None,
    ):
        super().__init__()
        self.teacher, self.images, self.loader = teacher, list(images), loader
        self.recipe, self.seed, self.device, self.stage, self.keeper = recipe, seed, device, stage, keeper or Keeper(None)
        self.settings = finish_settings(recipe) if stage == "finish" else output_kl_settings(recipe)

    def run(self, gm: GraphModule) -> None:
        check_same_device(self.teacher, gm)
        iterations = self.settings.iterations
        if self.keeper.begin(self.stage, gm, self.log) >= max(iterations, 1):
            return
        training = self.training(gm)
        if not iterations or not training.parameters:
            self.note("there is nothing to train" if iterations else "0 iterations: nothing was learned")
            self.keeper.skip(self.stage, self.log)
            return
        with self.meter(self.stage) as show:
            outcome = training.run(
                show,
                self.keeper.training(self.stage),
                lambda state: self.keeper.save(self.stage, int(state["figures"][0].item()) - 1, gm, self.log, state),
            )
        modules = training.learners.fixed()
        put_modules(gm, modules)
        self.changed(len(modules))
        views = training.views
        self.note(f"{iterations} steps of {views.size} views: {views.made}; {len(training.held_out)} images held out")
        if self.settings.match and self.teacher.meta.get(NORMS) and not training.matching:
            self.note("channels are not held to the float moments: scales or biases of the layers with batch norms do not move")
        if training.matching:
            self.note(f"channels of {len(training.matching.matches)} layers held to the float moments while training")
        if outcome.retried:
            left = "" if outcome.step else ", and left as it was: it did not help there either"
            self.note(f"it diverged; trained again at a tenth of the rates{left}")
        measured = f"error on the held-out images {outcome.before:.4f} -> {outcome.behind:.4f}"
        of_outputs = "of the outputs, over their power"
        kind = f"T^2 KL at T = {self.settings.holdout_temperature:g}" if has_classes(training.wanted) else of_outputs
        self.note(f"{measured} ({kind}), kept: {f'step {outcome.step}' if outcome.step else 'the start'}")
        self.keeper.save(self.stage, iterations, gm, self.log)

    def training(self, gm: GraphModule) -> NetworkTraining:
        """Return the loop for the student `gm`."""
        recipe, finish = self.recipe, self.stage == "finish"
        count = sum(map(len, self.images))
        held = _held_out(count, recipe.finish_holdout)
        rest = torch.ones(count, dtype=torch.bool)
        rest[held] = count == 1  # a single image is both trained on and looked at
        learners = Learners(
            gm,
            LatentWeight,
            lambda quantizer: LearnedQuantizer(quantizer, relative=True, learned_zero_point=not finish),
            biases=finish and recipe.finish_bias_rate > 0,
        )
        places = [name for unit in cut(self.teacher, longest=recipe.unit_longest) if unit.layers for name in unit.outputs]
        weights, activations = list(learners.weights.values()), list(learners.activations.values())
        scales: list[nn.Parameter] = [learner.scale.value for learner in activations]  # type: ignore[misc]
        weight_scales: list[nn.Parameter] = [learner.scale.value for learner in weights]  # type: ignore[misc]
        by_levels: dict[int, list[nn.Parameter]] = {}
        for learner in weights:
            if isinstance(learner, LatentWeight):
                by_levels.setdefault(learner.spec.levels, []).append(learner.latent)
        coarsest = min((learner.spec.levels for learner in (*weights, *activations)), default=4)
        fine = (4 / coarsest) ** recipe.finish_fine_power
        if finish:
            rates = [
                *(
                    (latents, recipe.finish_weight_rate * (levels / 4) ** recipe.finish_level_power)
                    for levels, latents in by_levels.items()
                ),
                (weight_scales, recipe.finish_scale_rate),
                (scales, recipe.finish_activation_rate),
                (list(learners.biases.values()), recipe.finish_bias_rate),
            ]
            rates = [(values, rate * fine) for values, rate in rates]
        else:
            zero_points = [learner.zero_point for learner in activations if isinstance(learner.zero_point, nn.Parameter)]
            rates = [([*weight_scales, *scales], recipe.output_kl_rate), (zero_points, recipe.output_kl_zero_point_rate)]
        augment, blend, color = "none", 0.0, 0.0
        if finish:
            augment, blend, color = recipe.finish_augment, recipe.finish_blend, recipe.finish_color * fine**2
        size = recipe.finish_batch if finish else recipe.output_kl_batch
        views = Views(self.images, rest.nonzero().flatten(), self.loader, augment, blend, size, self.seed, color, recipe.augment_reach)
        held_out = torch.stack([views.images[row] for row in held.tolist()])
        places = places if self.settings.feature_weight else []
        return NetworkTraining(learners, self.teacher, places, views, held_out, rates, self.settings, self.device)


def _held_out(count: int, share: float) -> Tensor:
    """Return the rows held out, evenly spread: at least one image, and never all."""
    held = min(max(1, round(share * count)), count - 1) if count > 1 else 1
    return torch.arange(held) * count // held


def finish_settings(recipe: Recipe) -> NetworkSettings:
    """Return the constants of the stage ``"finish"``."""
    return recipe.settings(NetworkSettings, "finish", kl_weight=recipe.finish_temperature**2)


def output_kl_settings(recipe: Recipe) -> NetworkSettings:
    """Return the constants of the stage ``"output_kl"``."""
    temperature = recipe.output_kl_temperature
    return recipe.settings(NetworkSettings, "output_kl", checks=recipe.finish_checks, margin=0.0, holdout_temperature=temperature)
