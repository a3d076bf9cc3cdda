"""The stages of a recipe that learn, as passes; and the checkpoint that a run of them leaves behind."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.console import Narrator
from fxquant.errors import ConfigError, FxquantWarning
from fxquant.files import gib
from fxquant.passes import FinishNetwork, ReconstructUnits
from fxquant.pipeline import Pass
from fxquant.recipe import Recipe
from fxquant.reconstruction.checkpoint import Checkpoints, Identity
from fxquant.reconstruction.keeper import Keeper
from fxquant.reconstruction.walk import peak_need, peak_need_of_packs
from fxquant.tracing.sizes import quiet_failures
from fxquant.tree import floats_of
from fxquant.units import cut

UNIT_WISE, NETWORK_WISE = ("units", "scales"), ("output_kl", "finish")


def learning_passes(
    teacher: GraphModule,
    images: Sequence[Tensor],
    loader: Iterable[Any],
    recipe: Recipe,
    seed: int,
    device: torch.device,
    keeper: Keeper,
    narrator: Narrator,
) -> list[Pass]:
    """Return the passes of the stages of `recipe` that learn, in order; say before work starts what the cache will need."""
    stages = [stage for stage in recipe.stages if stage in UNIT_WISE + NETWORK_WISE]
    if any(stage in UNIT_WISE for stage in stages):
        blocks = recipe.unit_granularity == "pack"  # which of them become packs is not known yet
        units, count = cut(teacher, "block" if blocks else recipe.unit_granularity, recipe.unit_longest), sum(map(len, images))
        share = 0.5 if recipe.cache_dtype == "bfloat16" else 1.0
        stored = share, recipe.unit_fisher != "none", recipe.unit_correction_iterations > 0
        packs = blocks and "units" in stages
        if packs:
            need = peak_need_of_packs(teacher, units, count, recipe.pack_length, *stored)
        else:
            need = peak_need(teacher, units, count, *stored)
        over = "" if need <= recipe.memory_gib * 2**30 else "; the rest goes to disk (memory_gib sets the budget)"
        first = "what fits on the GPU first, then " if device.type == "cuda" else ""
        learned = sum(1 for unit in units if unit.layers)
        most, budget = "at most " if packs else "", gib(recipe.memory_gib * 2**30)
        text = f"{most}{gib(need)} for {count} images in front of {learned} units, {first}{budget} may be in host memory"
        narrator.line("cache", text + over)
    passes: list[Pass] = []
    for stage in stages:
        if stage in UNIT_WISE:
            passes.append(ReconstructUnits(teacher, images, recipe, seed, device, stage, keeper))
        else:
            passes.append(FinishNetwork(teacher, images, loader, recipe, seed, device, stage, keeper))
    return passes


def learnable(recipe: Recipe, teacher: GraphModule, image: Tensor) -> Recipe:
    """Return `recipe` as `teacher` can learn by it: in float32 where operations have no bfloat16 (deformable convolutions).

    Raises:
        ConfigError: it learns, and the network returns nothing that has an error (classes or masks alone).
    """
    if not set(recipe.stages) & {*UNIT_WISE, *NETWORK_WISE}:
        return recipe
    with torch.no_grad():
        if not floats_of(teacher(image.clone())):
            fix = 'Use recipe="fast", or let the network return its scores, too'
            raise ConfigError("learns, and the network returns no floats to learn from", where=f"recipe {recipe.name!r}", fix=fix)
        if recipe.precision == "float32":
            return recipe
        try:
            with quiet_failures(), contextlib.redirect_stderr(io.StringIO()), torch.autocast(image.device.type, torch.bfloat16):
                teacher(image.clone())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = str(error).strip().splitlines()[0]
            text = f"the network does not run in bfloat16, so it learns in float32, which is slower: {why}"
            warnings.warn(FxquantWarning(text), stacklevel=3)
            return recipe.replace(name=recipe.name, precision="float32")
    return recipe


def keeper_of(
    checkpoint: str | Path | None, resume: str | Path | None, teacher: GraphModule, run: Mapping[str, Any], images: Sequence[Tensor]
) -> Keeper:
    """Return what writes checkpoints into the folder `checkpoint`, or goes on from the one in the folder `resume`.

    Raises:
        ConfigError: two different folders. CheckpointError: nothing to resume from, the checkpoint of another run, a folder that cannot
        be written.
    """
    if checkpoint is None and resume is None:
        return Keeper(None)
    if checkpoint is not None and resume is not None and Path(checkpoint) != Path(resume):
        raise ConfigError(
            f"{str(checkpoint)!r} and {str(resume)!r} are two folders",
            where="checkpoint, resume",
            fix="Give the one to go on from as resume",
        )
    folder = resume if resume is not None else checkpoint
    if not isinstance(folder, str | Path):
        raise ConfigError(f"{folder!r} is no folder", where="checkpoint" if resume is None else "resume", fix="Give a path")
    return Keeper(Checkpoints(folder, Identity.of(teacher, run, images), resume is not None))
