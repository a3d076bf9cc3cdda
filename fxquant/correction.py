"""append_cat: fit a correction to logits and append it, also to a network that another tool quantized."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.cat import CAT, CATChoice, fit_cat, select_cat
from fxquant.console import Narrator
from fxquant.data import collect, fresh_views, rebatch, seeded
from fxquant.errors import CATError, ConfigError, FxquantWarning
from fxquant.metrics import kl_divergence
from fxquant.passes.append_cat import AppendCAT, logits_node
from fxquant.recipe import Recipe
from fxquant.record import Record

CatSetting = bool | Literal["paper"]


def check_cat_setting(cat: object) -> None:
    """Raise ConfigError unless `cat` is True, False or ``"paper"``."""
    if cat not in (True, False, "paper"):
        raise ConfigError(f"{cat!r} is no setting", where="cat", fix="Use True, False or 'paper'")


class Corrected(nn.Module):
    """A callable that gives logits, and the CAT behind it; what `append_cat` makes of anything that is no GraphModule."""

    def __init__(self, model: Callable[[Tensor], Tensor], cat: CAT):
        super().__init__()
        self.model, self.cat = model, cat

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
        CATError: no logits ``[N, C]``, logits of different sizes, fewer images than clusters.
    """
    if fit not in ("auto", "moments", "ridge", "kl"):
        raise ConfigError(f"{fit!r} is no fit", where="fit", fix="Use 'auto', 'moments', 'ridge' or 'kl'")
    narrator = Narrator(progress)
    with seeded(seed):
        place = torch.device(device) if device is not None else _device_of(quantized)
        batches = [batch.to(place) for batch in rebatch(collect(loader))]
        mine, theirs = (logits_of(network, batches, narrator) for network in (quantized, teacher))
        if fit == "auto":
            cat = select_cat(mine, theirs, seed=seed).cat
        else:
            cat = fit_cat(mine, theirs, fit=fit, clusters=clusters, pca=pca, alpha=alpha, seed=seed)
    if cat is None:
        narrator.line("cat", "none: no correction lowers the held-out KL")
        return quantized if isinstance(quantized, nn.Module) else Corrected(quantized, CAT.identity(mine.shape[1]))
    if isinstance(quantized, GraphModule) and not isinstance(logits_node(quantized), str):
        return AppendCAT(cat)(quantized).graph_module
    return Corrected(quantized, cat)


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
    reason = logits_node(student)
    if isinstance(reason, str):
        if setting == "paper":
            raise CATError(reason, where=type(student).__name__, fix="Use cat=False, or wrap the network so that it returns logits")
        warnings.warn(FxquantWarning(f"CAT skipped: the network {reason}. Pass cat=False to silence this."), stacklevel=3)
        record.cat = {"fit": "none", "why": f"the network {reason}"}
        return student
    device = next((value.device for value in teacher.state_dict().values()), torch.device("cpu"))
    views, groups, made = fresh_views(loader, images, recipe.cat_views, recipe.augment, seed)
    views = [view.to(device) for view in views]
    mine, theirs = (logits_of(network, views, narrator) for network in (student, teacher))
    if setting == "paper":
        cat: CAT | None = fit_cat(
            mine, theirs, fit="moments", clusters=recipe.cat_clusters, pca=recipe.cat_pca, alpha=recipe.cat_alpha, seed=seed
        )
        choice = {"fit": "moments", "clusters": recipe.cat_clusters, "pca": recipe.cat_pca, "alpha": recipe.cat_alpha}
        assert cat is not None
        before, after = kl_divergence(mine, theirs).mean(), kl_divergence(cat(mine), theirs).mean()
        choice |= {"kl_before": before.item(), "kl_after": after.item(), "measured_on": "the images it was fitted on"}
    else:
        selected = select_cat(mine, theirs, groups=groups, seed=seed, folds=recipe.cat_folds)
        cat, choice = selected.cat, _summary(selected)
    record.cat = {**choice, "views": made, "images": len(mine)}
    narrator.line("cat", describe(record.cat))
    if cat is None:
        return student
    step = AppendCAT(cat)
    corrected = step(student).graph_module
    record.passes.append(step.log)
    record.cat["folded"] = not any(isinstance(module, CAT) for module in corrected.modules())
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


def _summary(choice: CATChoice) -> dict[str, Any]:
    summary = {"kl_before": choice.kl_before, "kl_after": choice.kl_after, "measured_on": "held-out folds", "table": choice.table}
    if choice.cat is None:
        return {"fit": "none", "why": "no correction lowers the held-out KL", **summary}
    return {"fit": choice.fit, "clusters": choice.clusters, "pca": choice.pca, "alpha": choice.alpha, **summary}


@torch.no_grad()
def logits_of(network: Callable[[Tensor], Any], batches: list[Tensor], narrator: Narrator) -> Tensor:
    """Return the logits of all `batches`, ``[N, C]``.

    Raises:
        CATError: `network` returns anything else than one ``[N, C]`` tensor a batch.
    """
    parts = []
    for batch in narrator.bar(batches, "logits"):
        out = network(batch)
        if not isinstance(out, Tensor) or out.ndim != 2:
            what = f"shape {list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise CATError(
                f"gives {what}, not logits [N, C]",
                where=getattr(network, "__name__", type(network).__name__),
                fix="CAT corrects classifier logits; wrap the network so that it returns them",
            )
        parts.append(out)
    return torch.cat(parts)


def _device_of(network: object) -> torch.device:
    if isinstance(network, nn.Module):
        return next((value.device for value in network.state_dict().values()), torch.device("cpu"))
    return torch.device("cpu")
