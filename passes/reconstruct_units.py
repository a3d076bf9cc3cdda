"""ReconstructUnits: learn the rounding, unit by unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.files import gib
from fxquant.graph import check_same_device, free_unused
from fxquant.passes.insert_fake_quant import InsertFakeQuant
from fxquant.pipeline import Pass
from fxquant.recipe import Recipe
from fxquant.reconstruction.guidance import choose_ranges_again, corrected_inputs, output_gradients, suffix_of
from fxquant.reconstruction.keeper import Keeper
from fxquant.reconstruction.learners import put_modules
from fxquant.reconstruction.norms import NORMS
from fxquant.reconstruction.packs import pack, returns_classes
from fxquant.reconstruction.store import Store
from fxquant.reconstruction.unit import Show, UnitData, UnitSettings, learn_unit
from fxquant.reconstruction.walk import Visit, Walk, cache_of
from fxquant.tree import has_classes
from fxquant.units import Unit, cut


class ReconstructUnits(Pass):
    """Learn each unit so that its outputs come close to those of the float unit, front to back (AdaRound, BRECQ, QDrop, PD-Quant, Genie-M).

        conv(Wq) -> relu -> [quantizer] -> ...      =>      conv(Wq') -> relu -> [quantizer'] -> ...

        min over rounding, scales   E |unit'(x') - unit(x)|^2,      x' behind all units learned so far, x of the float network

    The graph stays as it is; the integers of the weights, the scales and, if asked, the biases are others. Units without weights are run,
    not learned. With ``stage="scales"`` only the scales of activations are learned, weights as they are.

    Args:
        teacher: the float graph.
        images: calibration images in order, on any device.
        recipe: the constants; its ``unit_*``, ``scales_*`` and ``pack_*`` fields, ``memory_gib``, ``cache_dtype`` and ``precision``.
        seed: of batches and dropping; unit i has a generator of its own.
        device: of the graphs, where to work.
        stage: ``"units"`` or ``"scales"``.
        keeper: writes a checkpoint after every unit, and knows which are done.
    """

    after = (InsertFakeQuant,)
    preserves_output = False
    verb = "learned"

    def __init__(
        self,
        teacher: GraphModule,
        images: Sequence[Tensor],
        recipe: Recipe,
        seed: int,
        device: torch.device,
        stage: str = "units",
        keeper: Keeper | None = None,
    ):
        super().__init__()
        self.teacher, self.images, self.recipe, self.seed, self.device = teacher, images, recipe, seed, device
        self.stage, self.keeper = stage, keeper or Keeper(None)
        self.settings = unit_settings(recipe) if stage == "units" else scales_settings(recipe)

    def run(self, gm: GraphModule) -> None:
        check_same_device(self.teacher, gm)
        settings, count = self.settings, sum(map(len, self.images))
        # Packs are scored on the student as it came, so before it is brought to where an earlier run left it; if that is over, not at all.
        units = self.partition(gm) if settings.iterations and not self.keeper.is_over(self.stage) else []
        first, total = self.keeper.begin(self.stage, gm, self.log), sum(1 for unit in units if unit.layers)
        if first >= max(total, 1):
            return
        if not total:
            self.note("0 iterations: nothing was learned" if not settings.iterations else "no unit has a layer: nothing was learned")
            self.keeper.skip(self.stage, self.log)
            return
        store = cache_of(self.recipe, count, self.device)
        walk = Walk(self.teacher, gm, units, self.images, store, settings.activations)
        logits = self._teacher_logits() if (settings.kl_weight or settings.fisher != "none") else None
        with self.meter(self.stage) as show:
            for number, visit in enumerate(walk):
                if number < first:
                    continue
                self._learn(gm, walk, visit, logits, lambda done, of, text, at=number: show(at + done / of, total, text))  # type: ignore[misc]
                free_unused(self.teacher)  # the unit's graphs and learners, which refer to each other
                if number + 1 == total:
                    self._summarize(units, store)
                self.keeper.save(self.stage, number + 1, gm, self.log)

    def partition(self, gm: GraphModule) -> list[Unit]:
        """Return what is learned together."""
        recipe = self.recipe
        granularity = "block" if recipe.unit_granularity == "pack" else recipe.unit_granularity
        blocks = cut(self.teacher, granularity, recipe.unit_longest)
        if recipe.unit_granularity != "pack" or self.stage == "scales":  # rounding gains from packs, scales are few
            return blocks
        store = cache_of(recipe, sum(map(len, self.images)), self.device)
        with self.meter("score packs") as show:
            return pack(self.teacher, gm, blocks, self.images, store, recipe, show)

    def _summarize(self, units: Sequence[Unit], store: Store) -> None:
        self.note(f"{sum(1 for unit in units if unit.layers)} units, {self.recipe.unit_granularity} by {self.recipe.unit_granularity}")
        if self.recipe.unit_granularity == "pack" and self.stage == "units" and not returns_classes(self.teacher):
            self.note("the network returns no logits [N, C] of several classes, so packs are cut by their length alone")
        if self.stage == "units" and self.recipe.unit_correction_iterations:
            unknown = [path for path, norm in self.teacher.meta.get(NORMS, {}).items() if not norm.has_statistics]
            if unknown:
                self.note(f"inputs are not corrected by {len(unknown)} batch norms that have no statistics, as that of {unknown[0]}")
        if self.settings.batch > store.count:
            self.note(f"batches of {store.count}: there are no more images")
        self.note(f"the cache held {gib(store.peak)} at most")

    def _learn(self, gm: GraphModule, walk: Walk, visit: Visit, logits: Tensor | None, show: Show) -> None:
        recipe, settings, extra, store = self.recipe, self.settings, list[str](), visit.store
        if self.stage == "units" and recipe.unit_ranges == "prefix" and settings.activations:
            choose_ranges_again(visit, gm, recipe)
            self.changed()
        data = UnitData(visit, store.count)
        if logits is not None:
            suffix = suffix_of(walk, visit.index)
            if settings.fisher != "none":
                names, data.gradients = output_gradients(visit, suffix, logits, settings.batch)
                extra += names
            if settings.kl_weight:
                data.suffix, data.logits = suffix, logits
        if self.stage == "units" and recipe.unit_correction_iterations:
            norms = {path: norm for path, norm in self.teacher.meta.get(NORMS, {}).items() if norm.has_statistics}
            names, data.corrected = corrected_inputs(visit, walk, norms, store.count, recipe, show)
            extra += names
        outcome = learn_unit(data, settings, (self.seed * 1_000_003 + visit.index) % 2**63, show)
        put_modules(gm, outcome.modules)
        for name in extra:
            store.drop(name)
        self.changed(len(outcome.modules) > 0)
        error = f"{visit.unit.name}: relative error {outcome.before:.3f} -> {outcome.behind:.3f}"
        self.note(error + (f" ({outcome.note})" if outcome.note else ""))

    @torch.no_grad()
    def _teacher_logits(self) -> Tensor | None:
        """Return the float logits of all images, or None (with a note) for a network without any."""
        outputs = [self.teacher(batch.to(self.device)) for batch in self.images]
        if all(has_classes(output) and len(output) == len(batch) for output, batch in zip(outputs, self.images, strict=True)):
            return torch.cat(outputs)
        note = "the network returns no logits [N, C] of several classes, so their KL is not used"
        if note not in self.log.notes:  # a run that goes on has it already
            self.note(note)
        return None


def unit_settings(recipe: Recipe) -> UnitSettings:
    """Return the constants of the stage ``"units"``."""
    return recipe.settings(UnitSettings, "unit", beta=(recipe.unit_beta_start, recipe.unit_beta_end))


def scales_settings(recipe: Recipe) -> UnitSettings:
    """Return the constants of the stage ``"scales"``."""
    return recipe.settings(UnitSettings, "scales", batch=recipe.unit_batch, activation_rate=recipe.scales_rate)
