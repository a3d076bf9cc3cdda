"""The whole story on one page: trace, prepare, choose ranges, correct biases, learn, freeze, correct logits.

model ──trace──> graph ──PREPARE──> teacher (float, folded, layer norms reparameterized)
                                       │  place: one quantizer a tensor, bits by `edges` and `overrides`
                                       ├──InsertObservers──images──InsertFakeQuant──> student
                                       ├──CorrectBias──ReduceError──ReconstructUnits──FinishNetwork──Freeze      (what the recipe asks for)
                                       └──logits of fresh views──select CAT──AppendCAT──> GraphModule
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxquant import passes
from fxquant.calibration import activation_quantizers, affordable_images, weight_quantizers
from fxquant.console import Narrator
from fxquant.correction import CatSetting, append_selected, check_cat_setting, check_paper_cat
from fxquant.coverage import describe_work
from fxquant.data import check_seed, collect, in_one_order, is_changing, rebatch, repeatable
from fxquant.errors import ConfigError
from fxquant.execution import images_at_once
from fxquant.graph import precision_of
from fxquant.inspection import check_network, check_writes, traced, working_device
from fxquant.learning import keeper_of, learnable, learning_passes
from fxquant.pipeline import Pipeline
from fxquant.placement import EDGES, check_bits, place
from fxquant.recipe import Recipe
from fxquant.reconstruction.norms import NORMS
from fxquant.record import Record


def quantize(
    model: nn.Module,
    calib_loader: Iterable[Any],
    w: int | None = 2,
    a: int | None = 2,
    cat: CatSetting = True,
    *,
    recipe: str | Recipe = "standard",
    edges: str = "8bit",
    overrides: Mapping[str, Mapping[str, int | None]] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    resume: str | Path | None = None,
) -> GraphModule:
    """Return `model` quantized, as one GraphModule in eval mode; `model` itself is not touched, also when something fails.

    Args:
        model: a float32 or float64 vision network with one input ``[N, C, H, W]``, or what `fxquant.trace` made of one.
        calib_loader: a few hundred normalized, unlabeled images in batches: an iterable of tensors, tuples that begin with one, or dicts.
        w: bits of weights, 2 to 8, one scale and zero-point an output channel; None leaves weights float.
        a: bits of activations, 2 to 8, one scale and zero-point a tensor; None leaves activations float.
        cat: True chooses a cluster-based affine transformation of the logits by cross-validation, and none when none helps; ``"paper"``
            takes the published constants (arXiv 2509.26277); False leaves the logits alone.
        recipe: all else: ``"standard"`` (3,200 steps), ``"fast"`` (learns nothing), ``"best"``, ``"qdrop"``, ..., or a `Recipe`.
        edges: ``"8bit"``: first and last weights and the last layer's input at 8 bits; ``"integer"``: images and what
            convolutions on shortcuts give, too, to run on integers; ``"brecq"``: the first layer's output too; ``"same"``; ``"float"``.
        overrides: bits of single layers by glob over their names, ``{"layer4.*": {"w": 4}}``.
        seed: same seed and loader, bit-identical result (on a GPU where its operations repeat).
        device: where to work and where the result is; None: where the model's weights are.
        progress: print a line a pass and a bar a long stage (in a log file a line a minute).
        checkpoint: a folder, new or without a checkpoint, that always holds where the learning stages are; emptied when the run is
            finished.
        resume: such a folder, to go on from after a kill or Ctrl-C, with the same result bit for bit; all else must be as it was.

    Raises:
        ConfigError: an argument that cannot be meant. CalibrationError: the loader's fault. TraceError, ModelError: the network's.
        CheckpointError: nothing to resume from, or another run's. CATError: ``cat="paper"`` on a network without logits, or with fewer
        images than clusters.
    """
    recipe = Recipe.named(recipe)
    check_cat_setting(cat)
    check_bits("w", w)
    check_bits("a", a)
    if w is None and a is None:
        raise ConfigError("w and a are both None, so there is nothing to quantize", fix="Give bits to one of them")
    narrator = Narrator(progress)
    model, seed = check_network(model), check_seed(seed)
    device = working_device(model, device)
    with repeatable(seed, calib_loader):
        calib_loader = in_one_order(calib_loader) or calib_loader
        images = rebatch(collect(calib_loader, precision_of(model)))
        prepare = Pipeline([step() for step in passes.PREPARE], narrator.passed, narrator.bar)
        teacher = prepare.run(traced(model, images[0].to(device)).to(device))
        images = rebatch(images, images_at_once(teacher.graph.nodes, device))
        plan = place(teacher, w, a, edges, overrides, recipe.matmul_scales)
        narrator.line("place", f"{len(plan.layers)} layers, {len(plan.tensors)} tensors, edges {edges!r}: {EDGES[edges]}")
        some = affordable_images(images, recipe.bias_images, recipe, teacher, device)
        reparameterize = [passes.ReparameterizeNorms(plan, some, recipe)] if "reparameterize" in recipe.stages else []
        teacher = Pipeline(reparameterize, narrator.passed, narrator.bar).run(teacher)
        check_writes(teacher, images[0].to(device))
        recipe = learnable(recipe, teacher, images[0][:1].to(device))
        check_paper_cat(cat, teacher, images, recipe)
        observe = passes.InsertObservers(plan, recipe.matmul_scales)
        observed = observe(teacher).graph_module.to(device)
        if is_changing(calib_loader):
            observe.note("the loader gives other images on each pass; those of the first are the calibration images")
        narrator.passed(observe.log)
        with torch.no_grad():
            for batch in narrator.bar(images, "observe"):
                observed(batch.to(device))
        steps: list[Any] = [passes.InsertFakeQuant(plan, activation_quantizers(recipe), weight_quantizers(recipe))]
        if "bias" in recipe.stages:
            measured = recipe.bias_means == "images"
            steps.append(passes.CorrectBias(teacher, some, recipe.bias_gain) if measured else passes.CorrectBiasFromNorms())
        if "erq" in recipe.stages:
            more = affordable_images(images, recipe.erq_images, recipe, teacher, device)
            steps.append(passes.ReduceError(teacher, more, plan, weight_quantizers(recipe), recipe))
        asked = {"recipe": recipe.to_dict(), "w": w, "a": a, "edges": edges, "overrides": dict(overrides or {}), "seed": seed}
        keeper = keeper_of(checkpoint, resume, teacher, asked, images)
        steps += learning_passes(teacher, images, calib_loader, recipe, seed, device, keeper, narrator)
        student = Pipeline([*steps, passes.Freeze()], narrator.passed, narrator.bar, narrator.counter).run(observed)
        student.meta.pop(NORMS, None)
        record = Record.of(recipe, plan, edges, seed, images, teacher)
        record.passes = [*prepare.logs, *(step.log for step in [*reparameterize, observe, *steps])]
        record.measure(teacher, student, affordable_images(images, 32, recipe, teacher, device))
        narrator.line("work", describe_work(record.work))
        if cat and "cat" in recipe.stages:
            student = append_selected(student, teacher, calib_loader, images, cat, recipe, seed, record, narrator)
    record.attach(student)
    keeper.finished()
    return student.eval()
