"""append_cat: fit a correction to logits and append it, also to a network that another tool quantized."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.cat import CAT, fit_cat, select_cat
from fxquant.console import Narrator
from fxquant.data import check_seed, collect, fresh_views, rebatch, repeatable, seeded
from fxquant.errors import CATError, ConfigError, FxquantWarning
from fxquant.execution import BATCH, images_at_once
from fxquant.graph import called, is_traced, precision_of
from fxquant.inspection import working_device
from fxquant.metrics import kl_divergence
from fxquant.passes.append_cat import AppendCAT, logits_node, why_not_chosen
from fxquant.recipe import Recipe
from fxquant.record import META_KEY, Record

CatSetting = bool | Literal["paper"]


def check_cat_setting(cat: object) -> None:
    """Raise ConfigError unless `cat` is True, False or ``"paper"``."""
    if not isinstance(cat, bool) and not (isinstance(cat, str) and cat == "paper"):
        raise ConfigError(f"{cat!r} is no setting", where="cat", fix="Use True, False or 'paper'")


class Corrected(nn.Module):
    """A callable that gives logits, and the CAT behind it; what `append_cat` makes of anything that is no GraphModule."""

    def __init__(self, model: Callable[[Tensor], Tensor], cat: CAT):
        super().__init__()
        self.model, self.cat = model, cat.eval()
        self.training = False  # self.eval() would reach into the caller's model

    def forward(self, images: Tensor) -> Tensor:
        """Return the corrected logits ``[N, C]``."""
        return self.cat(self.model(images))


def append_cat(
    quantized: Callable[[Tensor], Tensor],
    teacher: Callable[[Tensor], Tensor],
    loader: Iterable[Any],
    *,
    fit: Literal["auto", "moments", "ridge", "kl"] = "auto",
    clusters: int = 64,
    pca: int = 50,
    alpha: float = 0.4,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Return `quantized` with its logits moved towards those of `teacher` by a cluster-based affine transformation.

    Neither argument is changed. A GraphModule that fxquant can read gets the CAT at the end of its graph (or, with one cluster, inside its
    classifier); any other callable is wrapped as `Corrected`.

    Args:
        quantized: gives logits ``[N, C]`` for images ``[N, 3, H, W]``; also a network that another tool quantized.
        teacher: the float network.
        loader: images that `quantized` was not fitted to; batches as for `fxquant.quantize`.
        fit: ``"auto"`` chooses everything by cross-validated KL and appends nothing when nothing helps; the others use the constants below.
        clusters, pca, alpha: the published constants of arXiv 2509.26277.
        seed: of k-means and of the folds.
        device: where to work; None: where the weights of `quantized` are.
        progress: show bars.

    Raises:
        CATError: no logits ``[N, C]``, logits of different sizes, a network in train mode, a `quantized` that ends in a CAT already, too
            few images. ConfigError: an argument that cannot be meant. CalibrationError: the loader's fault.
    """
    seed = check_seed(seed)
    if fit not in ("auto", "moments", "ridge", "kl"):
        raise ConfigError(f"{fit!r} is no fit", where="fit", fix="Use 'auto', 'moments', 'ridge' or 'kl'")
    for network in (quantized, teacher):
        _check_ready(network)
    if _ends_in_cat(quantized):
        raise CATError(
            "has a CAT already", where=type(quantized).__name__, fix="Pass it as it was before, for example quantized with cat=False"
        )
    narrator = Narrator(progress)
    device = working_device(quantized, device)
    with repeatable(seed, loader):
        size = min(_images_at_once(network, device) for network in (quantized, teacher))
        batches = rebatch(collect(loader, precision_of(quantized)), size)
        mine, theirs = logits_of_each([quantized, teacher], batches, narrator, device)
        if fit == "auto":
            if reason := _too_few(len(mine)):
                raise CATError(reason, where="loader", fix="Pass more images, or choose a fit")
            cat, choice = _selected(mine, theirs, None, Recipe.STANDARD.cat_folds, seed, narrator)
        else:
            _check_enough(len(mine), clusters)
            cat, choice = _fitted(mine, theirs, fit, clusters, pca, alpha, seed)
    choice |= {"views": "the images given", "images": len(mine)}
    narrator.line("cat", describe(choice))
    if cat is None:
        return quantized if isinstance(quantized, nn.Module) else Corrected(quantized, CAT.identity(mine.shape[1]).to(mine))
    if not isinstance(quantized, GraphModule) or isinstance(logits_node(quantized), str):
        return Corrected(quantized, cat)
    step = AppendCAT(cat)
    corrected = copy.deepcopy(step(quantized).graph_module).eval()
    if isinstance(record := corrected.meta.get(META_KEY), Record):
        choice["folded"] = not _ends_in_cat(corrected)
        replace(record, cat=choice, passes=[*record.passes, step.log]).attach(corrected)
    return corrected


def check_paper_cat(setting: CatSetting, teacher: GraphModule, images: list[Tensor], recipe: Recipe) -> None:
    """Raise CATError where a CAT by the published constants is asked for and cannot be fitted: before anything is learned."""
    if setting != "paper" or "cat" not in recipe.stages:
        return
    if reason := why_not_chosen(teacher):
        raise CATError(reason, where=type(teacher).__name__, fix="Use cat=False, or wrap the network so that it returns logits")
    _check_enough(sum(map(len, images)), recipe.cat_clusters)


def append_selected(
    student: GraphModule,
    teacher: GraphModule,
    loader: Iterable[Any],
    images: list[Tensor],
    setting: CatSetting,
    recipe: Recipe,
    seed: int,
    record: Record,
    narrator: Narrator,
) -> GraphModule:
    """Choose and append the CAT of `fxquant.quantize`; what was chosen, and what it gains, goes into `record.cat`."""
    if reason := why_not_chosen(student):
        warnings.warn(FxquantWarning(f"CAT skipped: the network {reason}. Pass cat=False to silence this."), stacklevel=3)
        record.cat = {"fit": "none", "why": f"the network {reason}"}
        return student
    device = working_device(teacher, None)
    if setting is True and (reason := _too_few(sum(map(len, images)), recipe.cat_folds)):
        warnings.warn(FxquantWarning(f"CAT skipped: {reason}. Pass more images, or cat=False to silence this."), stacklevel=3)
        record.cat = {"fit": "none", "why": reason}
        return student
    with seeded(seed, loader):  # whatever was drawn before: a run that goes on behind its learning stages reads the loader less often
        views, groups, made = fresh_views(loader, images, recipe.cat_views, recipe.augment, seed, recipe.augment_reach)
        mine, theirs = logits_of_each([student, teacher], views, narrator, device)
    if setting == "paper":
        cat, choice = _fitted(mine, theirs, "moments", recipe.cat_clusters, recipe.cat_pca, recipe.cat_alpha, seed)
    else:
        cat, choice = _selected(mine, theirs, groups, recipe.cat_folds, seed, narrator)
    record.cat = {**choice, "views": made, "images": len(mine)}
    narrator.line("cat", describe(record.cat))
    if cat is None:
        return student
    step = AppendCAT(cat)
    corrected = step(student).graph_module
    record.passes.append(step.log)
    record.cat["folded"] = not _ends_in_cat(corrected)
    narrator.passed(step.log)
    return corrected


def describe(cat: dict[str, Any]) -> str:
    """Return the choice of CAT as one line."""
    if cat.get("fit", "none") == "none":
        return f"none: {cat.get('why', 'not asked for')}"
    size = f"K={cat['clusters']}" + (f", PCA {cat['pca']}" if cat["clusters"] > 1 else "")
    return (
        f"{cat['fit']}, {size}, alpha={cat['alpha']:g}: KL {cat['kl_before']:.4f} -> {cat['kl_after']:.4f} on {cat['measured_on']}"
        f" ({cat['views']})"
    )


def _fitted(mine: Tensor, theirs: Tensor, fit: str, clusters: int, pca: int, alpha: float, seed: int) -> tuple[CAT | None, dict[str, Any]]:
    cat = fit_cat(mine, theirs, fit=fit, clusters=clusters, pca=pca, alpha=alpha, seed=seed)
    before, after = (kl_divergence(logits, theirs).mean().item() for logits in (mine, cat(mine)))
    choice = {"fit": fit, "clusters": cat.clusters, "pca": pca, "alpha": alpha, "kl_before": before, "kl_after": after}
    return cat, {**choice, "measured_on": "the images it was fitted on"}


def _selected(
    mine: Tensor, theirs: Tensor, groups: Tensor | None, folds: int, seed: int, narrator: Narrator
) -> tuple[CAT | None, dict[str, Any]]:
    with narrator.counter("choose CAT") as progress:
        choice = select_cat(mine, theirs, groups=groups, seed=seed, folds=folds, progress=progress)
    summary = {"kl_before": choice.kl_before, "kl_after": choice.kl_after, "measured_on": "held-out folds", "table": choice.table}
    if choice.cat is None:
        return None, {"fit": "none", "why": "no correction lowers the held-out KL", **summary}
    return choice.cat, {"fit": choice.fit, "clusters": choice.clusters, "pca": choice.pca, "alpha": choice.alpha, **summary}


def _check_enough(images: int, clusters: int) -> None:
    if images < clusters:
        raise CATError(
            f"{images} images are fewer than {clusters} clusters",
            where="cat",
            fix="Pass more images, or ask for fewer clusters (append_cat(clusters=...), Recipe.cat_clusters)",
        )


def _too_few(images: int, folds: int = Recipe.STANDARD.cat_folds) -> str:
    """Return why so many images cannot be cross-validated, or nothing."""
    return f"{images} images are too few to cross-validate, {2 * folds} are enough" if images < 2 * folds else ""


def logits_of(network: Callable[[Tensor], Any], batches: Iterable[Tensor]) -> Tensor:
    """Return the logits of all `batches`, ``[N, C]``; errors as `logits_of_each`."""
    return logits_of_each([network], batches, Narrator(False))[0]


@torch.no_grad()
def logits_of_each(
    networks: Sequence[Callable[[Tensor], Any]], batches: Iterable[Tensor], narrator: Narrator, device: torch.device | None = None
) -> list[Tensor]:
    """Return the logits of each network on all `batches`, ``[N, C]``, in one pass; a batch moves to `device` when its turn comes.

    Raises:
        CATError: a network returns anything else than one ``[N, C]`` tensor a batch.
    """
    parts: list[list[Tensor]] = [[] for _ in networks]
    for batch in narrator.bar(batches, "logits"):
        images = batch if device is None else batch.to(device)
        for network, outputs in zip(networks, parts, strict=True):
            out = network(images)
            if not isinstance(out, Tensor) or out.ndim != 2:
                what = f"shape {list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
                raise CATError(
                    f"gives {what}, not logits [N, C]",
                    where=getattr(network, "__name__", type(network).__name__),
                    fix="CAT corrects classifier logits; wrap the network so that it returns them",
                )
            outputs.append(out)
    return [torch.cat(outputs) for outputs in parts]


def _check_ready(network: object) -> None:
    """Raise CATError for a network whose logits are random, or corrected already."""
    name = type(network).__name__
    if not callable(network):
        raise CATError(f"a {name} cannot be called with images", where="append_cat", fix="Pass networks, or functions that give logits")
    if _trains(network):
        raise CATError("is in train mode, so its logits depend on the batch", where=name, fix="Call .eval() on it first")


def _images_at_once(network: object, device: torch.device) -> int:
    """Return how many images to give to `network` together; what is no graph, or one for a fixed number of images, does not say."""
    if not isinstance(network, GraphModule) or not is_traced(network):
        return BATCH
    nodes = network.graph.nodes
    fixed = any(isinstance(node.meta["val"].shape[0], int) for node in nodes if node.op == "placeholder")
    return BATCH if fixed else images_at_once(nodes, device)


def _trains(network: object) -> bool:
    """Say whether `network` is in train mode; flags that change nothing, which torch.export leaves on for good, do not count."""
    if isinstance(network, GraphModule):
        return any(_trains(module) for _, module in called(network))
    return isinstance(network, nn.Module) and network.training and not type(network).__module__.startswith("torch.export.")


def _ends_in_cat(network: object) -> bool:
    return isinstance(network, nn.Module) and any(isinstance(module, CAT) for module in network.modules())
