"""Choose fit, K, PCA dim and alpha of CAT by cross-validated KL on the calibration images, or choose to do nothing.

    for K = 1, 2, 4, ... while it helps:
        for every fit and PCA dim:   fit on 3/4 of the images, measure KL on the other quarter, four times   (alpha is free)

    K      the smallest whose best candidate is within one standard error of the best of all
    rest   the least KL at that K
    CAT    only if the gain over the identity is more than two standard errors, else None

Differences are taken image by image (group by group) before their standard error is: what makes an image hard is common to both
sides and cancels. Views of one image share a group and a fold, or the views would vouch for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.cat.fit import SHRINKAGE, Fitter, check_logits
from fxquant.cat.module import CAT
from fxquant.errors import CATError
from fxquant.metrics import exceeds, kl_divergence, standard_error

ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)
CLUSTERS = (1, 2, 4, 8, 16, 64)
PCA_DIMS = (10, 50)
IMAGES_PER_CLUSTER = 16
PATIENCE = 2  # values of K in a row that may fail to help before larger ones are not tried


@dataclass(frozen=True)
class Candidate:
    """What one cross-validation tries: arguments of `fxquant.cat.fit_cat`; ``pca`` 0 clusters the logits themselves."""

    fit: str
    clusters: int
    pca: int = 0
    shrinkage: float = SHRINKAGE


@dataclass(frozen=True)
class CATChoice:
    """What was chosen, and how good it is on images it was not fitted to.

    Attributes:
        cat: fitted on all images; None: no correction is better by more than two standard errors.
        fit, clusters, pca, alpha: as chosen; ``"identity"``, 1, 0, 0.0 with ``cat`` None.
        kl_before: mean KL(teacher || student) of an image, in nats.
        kl_after: the same behind the chosen correction, cross-validated; equal to ``kl_before`` with ``cat`` None.
        kl_gain_se: standard error of the gain of the best candidate, over groups.
        table: one row per candidate and alpha: ``fit, clusters, pca, shrinkage, alpha, kl, gain, gain_se, chosen``.
    """

    cat: CAT | None
    fit: str
    clusters: int
    pca: int
    alpha: float
    kl_before: float
    kl_after: float
    kl_gain_se: float
    table: list[dict]


def default_candidates(images: int, classes: int) -> list[Candidate]:
    """Return what is worth trying on ``images`` training images: all fits for one cluster, ridge and kl for more."""
    dims = sorted({min(dim, classes // 2) for dim in PCA_DIMS} - {0})
    single = [Candidate(fit, 1) for fit in ("moments", "ridge", "kl")]
    sizes = [k for k in CLUSTERS[1:] if images >= k * IMAGES_PER_CLUSTER]
    return single + [Candidate(fit, k, dim) for k in sizes for dim in dims for fit in ("ridge", "kl")]


def select_cat(
    student: Tensor,
    teacher: Tensor,
    *,
    groups: Tensor | None = None,
    seed: int = 0,
    folds: int = 4,
    candidates: Iterable[Candidate] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CATChoice:
    """Choose a correction of ``student`` towards ``teacher`` logits by cross-validation, and fit it on all images.

    Args:
        student: logits ``[N, C]`` of the quantized network.
        teacher: logits ``[N, C]`` of the float network on the same images.
        groups: integers ``[N]``; equal ones (augmented views of one image) stay in one fold. None: every image its own.
        seed: of the folds and of k-means.
        folds: of the cross-validation; at most the number of groups.
        candidates: what to try, in any order; None: `default_candidates`.
        progress: called as ``progress(done, total)`` after every candidate; ``total`` is reached only if every K helps.

    Returns:
        A `CATChoice`.

    Raises:
        CATError: as `fxquant.cat.fit_cat`; fewer than two groups; no candidates; ``groups`` of another length.
    """
    check_logits(student, teacher)
    group, fold = split_folds(len(student), groups, folds, seed)
    train = [(fold != i).nonzero()[:, 0].to(student.device) for i in range(int(fold.max()) + 1)]
    held = [(fold == i).nonzero()[:, 0].to(student.device) for i in range(len(train))]
    fitters = [Fitter(student[rows], teacher[rows], seed) for rows in train]
    if candidates is None:
        candidates = default_candidates(min(map(len, train)), student.shape[1])
    todo = sorted(candidates, key=lambda c: c.clusters)
    if not todo:
        raise CATError("no candidates to choose from", where="select_cat", fix="Leave out candidates=")

    sizes = group.bincount().double()

    def group_kl(logits: Tensor) -> Tensor:
        return group.bincount(kl_divergence(logits, teacher).double().cpu()) / sizes

    before = group_kl(student)
    trials: list[Trial] = []
    incumbent, failures = None, 0
    for k in sorted({c.clusters for c in todo}):
        level = [c for c in todo if c.clusters == k]
        for candidate in level:
            corrected = torch.empty_like(student)
            for fitter, rows in zip(fitters, held, strict=True):
                cat = fitter.cat(candidate.fit, k, candidate.pca, 1.0, candidate.shrinkage)
                corrected[rows] = cat(student[rows].to(fitter.dtype)).to(student.dtype)
            trials += [Trial(candidate, alpha, group_kl(student.lerp(corrected, alpha))) for alpha in ALPHAS]
            if progress:
                progress(len(trials) // len(ALPHAS), len(todo))
        best = min((t for t in trials if t.candidate.clusters == k), key=lambda t: t.kl.mean())
        if incumbent is None or exceeds(incumbent.kl - best.kl, 1):
            incumbent, failures = best, 0
        else:
            failures += 1
        if failures == PATIENCE:
            break

    best = min(trials, key=lambda t: t.kl.mean())
    enough = min(t.candidate.clusters for t in trials if not exceeds(t.kl - best.kl, 1))
    chosen = min((t for t in trials if t.candidate.clusters == enough), key=lambda t: t.kl.mean())
    helps = exceeds(before - chosen.kl, 2)
    table = [t.row(before) | {"chosen": helps and t is chosen} for t in trials]
    kl_before, error = before.mean().item(), standard_error(before - chosen.kl)
    if not helps:
        return CATChoice(None, "identity", 1, 0, 0.0, kl_before, kl_before, error, table)
    c = chosen.candidate
    cat = Fitter(student, teacher, seed).cat(c.fit, c.clusters, c.pca, chosen.alpha, c.shrinkage)
    return CATChoice(cat, c.fit, c.clusters, c.pca, chosen.alpha, kl_before, chosen.kl.mean().item(), error, table)


@dataclass(frozen=True)
class Trial:
    """A candidate, an alpha, and the cross-validated KL of every group ``[G]``."""

    candidate: Candidate
    alpha: float
    kl: Tensor

    def row(self, before: Tensor) -> dict:
        gain = before - self.kl
        score = {"kl": self.kl.mean().item(), "gain": gain.mean().item(), "gain_se": standard_error(gain)}
        return vars(self.candidate) | {"alpha": self.alpha} | score


def split_folds(images: int, groups: Tensor | None, folds: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the group ``0 .. G - 1`` and the fold ``0 .. folds - 1`` of every image, ``[N]`` each, on the CPU."""
    groups = torch.arange(images) if groups is None else groups.cpu()
    if groups.shape != (images,):
        raise CATError(f"groups has shape {list(groups.shape)} for {images} images", where="select_cat", fix="Give one integer per image")
    names, group = groups.unique(return_inverse=True)
    folds = min(folds, len(names))
    if folds < 2:
        raise CATError(
            f"{len(names)} group of images and {folds} fold cannot be cross-validated",
            where="select_cat",
            fix="Give two groups and two folds or more, or use fit_cat with fixed values",
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(names)) % folds
    return group, fold[group]
