"""Fit the affine maps of CAT: per cluster k and class c, gamma and beta that turn a student logit q into a teacher logit f.

    moments   gamma = cov(q, f) / max(var(q), 1e-8),  beta = mean(f) - gamma mean(q)        (CAT, arXiv 2509.26277, eq. 8)
    ridge     min  sum_n (gamma q + beta - f)^2                           + tau * prior
    kl        min  sum_n KL(softmax(f) || softmax(gamma q + beta))        + tau / 8 * prior

Squared error spends its effort on the logits of hopeless classes and tends to raise the KL divergence between the two softmaxes,
which is what a user of the network feels. The third fit minimizes that divergence itself; it is convex.

The prior is a number of pseudo-images. With x = (q - m) / s, m and s the mean and deviation of the class over all images, every
map is written as a x + b. Then tau pseudo-images, x of mean 0 and variance 1, that agree with a map (a0, b0) add

    prior = sum_c (a - a0)^2 + (b - b0)^2             to the squared error, and
    prior * p (1 - p) / 2 = prior / 8                 to the KL, to second order, if each is a toss-up on the class: p = 1/2

The one-cluster fit is pulled towards the identity (a0 = s, b0 = m), every cluster's fit towards the one-cluster fit: a cluster of
many images goes its own way, a cluster of few follows the rest. With many classes an image says little about most of them in
terms of KL, but its squared errors speak of all of them; and the overall size of low-bit logits is one number, which takes few
images to mend. So the kl fit approaches the identity in steps, each one the prior of the next:

    identity  <-  ridge, one cluster  <-  the same times one temperature t  <-  kl, one cluster  <-  kl, K clusters
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.cat.kmeans import KMeans, kmeans
from fxquant.cat.module import CAT
from fxquant.cat.pca import fit_pca
from fxquant.errors import CATError

FITS = ("moments", "ridge", "kl")
SHRINKAGE = 16.0
VARIANCE_FLOOR = 1e-8  # of eq. 8
# Without shrinkage the map of a cluster of one image is not unique; this much decides it and is seen nowhere else.
SHRINKAGE_FLOOR = 1e-8


def fit_cat(
    student: Tensor,
    teacher: Tensor,
    *,
    fit: str = "moments",
    clusters: int = 64,
    pca: int | None = 50,
    alpha: float = 0.4,
    seed: int = 0,
    shrinkage: float = SHRINKAGE,
) -> CAT:
    """Fit a correction of ``student`` logits towards ``teacher`` logits (CAT, arXiv 2509.26277).

    The defaults are the published constants. `fxquant.cat.select_cat` chooses them from the data instead.

    Args:
        student: logits ``[N, C]`` of the quantized network.
        teacher: logits ``[N, C]`` of the float network on the same images.
        fit: ``"moments"`` (the published one), ``"ridge"`` or ``"kl"``; see the top of this module.
        clusters: K; fewer come out if fewer than K images are distinct.
        pca: dimensions of the space in which images are clustered; None, 0, or C and more: the logits themselves.
        alpha: share of the correction that is applied; 0 is the identity.
        seed: of k-means.
        shrinkage: tau, in images; 0 is plain least squares or plain KL. Ignored by ``"moments"``.

    Returns:
        A `CAT` on the device of ``student``: float64 if ``student`` is, else float32.

    Raises:
        CATError: the logits are not two equally shaped finite ``[N, C]`` matrices, there are fewer images than clusters, or
            an argument cannot be meant.
    """
    return Fitter(student, teacher, seed).cat(fit, clusters, pca, alpha, shrinkage)


class Fitter:
    """Two sets of logits ``[N, C]``, and every fit of one to the other; what fits share is computed once.

    Args and errors: as `fit_cat`.
    """

    def __init__(self, student: Tensor, teacher: Tensor, seed: int = 0):
        check_logits(student, teacher)
        student, teacher = student.detach(), teacher.detach()
        self.dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        self.student, self.teacher, self.seed = student.to(self.dtype), teacher, seed
        self._found: dict[tuple[int, int], KMeans] = {}
        self._common: dict[tuple[str, float], tuple[Tensor, Tensor]] = {}

    def cat(self, fit: str, clusters: int, pca: int | None, alpha: float, shrinkage: float) -> CAT:
        """Return the correction `fit_cat` describes."""
        if fit not in FITS:
            raise CATError(f"fit={fit!r} is unknown", where="fit_cat", fix=f"Write one of {', '.join(map(repr, FITS))}")
        if clusters < 1:
            raise CATError(f"clusters={clusters} is not positive", where="fit_cat", fix="Write clusters=1 for one affine map")
        if shrinkage < 0:
            raise CATError(f"shrinkage={shrinkage} is negative", where="fit_cat", fix="Write 0 for none")
        if clusters == 1:
            return CAT.from_clusters(*self.affine(None, fit, shrinkage), alpha, dtype=self.dtype)
        features, mean, components = self.student.double(), None, None
        dim = pca if pca and 0 < pca < features.shape[1] else 0
        if dim:
            mean, components = self.principal[0], self.principal[1][:, :dim]
            features = (features - mean) @ components
        if (clusters, dim) not in self._found:
            self._found[clusters, dim] = kmeans(features, clusters, self.seed)
        found = self._found[clusters, dim]
        gamma, beta = self.affine(found, fit, shrinkage)
        return CAT.from_clusters(gamma, beta, alpha, found.centers, mean, components, self.dtype)

    @cached_property
    def principal(self) -> tuple[Tensor, Tensor]:
        """Mean and all principal components of the student logits."""
        return fit_pca(self.student, self.student.shape[1])

    @cached_property
    def standard(self) -> tuple[Tensor, Tensor, Tensor]:
        """Standardized student logits ``x [N, C]``, and the deviation and mean ``[1, C]`` they were standardized with."""
        q = self.student.double()
        variance, mean = torch.var_mean(q, 0, correction=0, keepdim=True)
        scale = variance.clamp_min(VARIANCE_FLOOR).sqrt()
        return (q - mean) / scale, scale, mean

    def affine(self, found: KMeans | None, fit: str, shrinkage: float) -> tuple[Tensor, Tensor]:
        """Return ``gamma, beta [K, C]`` in float64 for the clusters ``found``, None: for all images in one."""
        if found is None or len(found.centers) == 1:
            labels, count = torch.zeros(len(self.student), dtype=torch.long, device=self.student.device), 1
        else:
            labels, count = found.labels, len(found.centers)
        if fit == "moments":
            return fit_moments(self.student, self.teacher, labels, count)
        solve = fit_squares if fit == "ridge" else fit_divergence
        x, scale, mean = self.standard
        tau = max(shrinkage, SHRINKAGE_FLOOR)
        if (fit, tau) not in self._common:
            one = torch.zeros_like(labels)
            a, b = fit_squares(x, self.teacher, one, tau, scale, mean)
            if fit == "kl":
                t = fit_temperature(a * x + b, self.teacher, tau)
                a, b = fit_divergence(x.to(self.dtype), self.teacher, one, tau, t * a, t * b)
            self._common[fit, tau] = a, b
        a, b = self._common[fit, tau]
        if count > 1:
            a, b = solve(x.to(self.dtype), self.teacher, labels, tau, a.expand(count, -1), b.expand(count, -1))
        return a / scale, b - a * mean / scale


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """Raise a `CATError` unless both are finite ``[N, C]`` matrices of one shape with ``N, C >= 1``."""
    if student.shape != teacher.shape:
        raise CATError(
            f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} differ in shape",
            where="cat",
            fix="Run both networks on the same images",
        )
    if student.dim() != 2 or student.numel() == 0:
        raise CATError(
            f"CAT needs [N, C] logits, one row per image, and got {list(student.shape)}",
            where="cat",
            fix="Use cat=False for a network that is not a classifier",
        )
    for name, logits in (("student", student), ("teacher", teacher)):
        bad = (~torch.isfinite(logits)).any(1).nonzero()[:, 0].tolist()
        if bad:
            raise CATError(
                f"{name} logits are NaN or infinite for {len(bad)} of {len(logits)} images, the first is image {bad[0]}",
                where="cat",
                fix="Look for a range that was calibrated to zero or to infinity",
            )


def fit_moments(student: Tensor, teacher: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Match moments per cluster and class (CAT, eq. 8): biased variance, floor 1e-8, identity for an empty cluster.

    Args:
        student, teacher: logits ``[N, C]``.
        labels: clusters ``[N]``, in ``0 .. count - 1``.
        count: K.

    Returns:
        ``gamma, beta [K, C]``, float64.
    """
    q, f = student.double(), teacher.double()
    n, total = cluster_sums(labels, count, q.dtype)
    n = n.clamp_min(1)
    mean_q, mean_f = total(q) / n, total(f) / n
    dq, df = q - mean_q[labels], f - mean_f[labels]
    gamma = total(dq * df) / n / (total(dq.square()) / n).clamp_min(VARIANCE_FLOOR)
    gamma[labels.bincount(minlength=count) == 0] = 1
    return gamma, mean_f - gamma * mean_q


def fit_squares(x: Tensor, f: Tensor, labels: Tensor, tau: float, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the normal equations of the ridge fit, per cluster and class, for the step (da, db) away from the prior.

        [Sxx + tau   Sx     ] [da]   [Sxr]
        [Sx          n + tau] [db] = [Sr ]        r = f - (a0 x + b0),  sums over the images of the cluster

    An empty cluster stays at the prior.

    Args:
        x: standardized student logits ``[N, C]``.
        f: teacher logits ``[N, C]``.
        labels: clusters ``[N]``.
        tau: pseudo-images, above 0.
        a0, b0: the maps to stay near, ``[K, C]``.

    Returns:
        ``a, b [K, C]`` of the maps ``a x + b``, float64.
    """
    x, f = x.double(), f.double()
    n, total = cluster_sums(labels, len(a0), x.dtype)
    residual = f - (a0[labels] * x + b0[labels])
    sx, sr, sxr = total(x), total(residual), total(x * residual)
    sxx, n = total(x.square()) + tau, n + tau
    determinant = sxx * n - sx.square()
    return a0 + (sxr * n - sr * sx) / determinant, b0 + (sr * sxx - sxr * sx) / determinant


def fit_divergence(x: Tensor, f: Tensor, labels: Tensor, tau: float, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """Minimize the kl objective over all clusters and classes at once, from the prior, in the dtype of ``x``.

    With z = a x + b and g = softmax(z) - softmax(f), the gradient is

        da: sum_n g x + tau / 4 (a - a0)        db: sum_n g + tau / 4 (b - b0)

    and every unknown is measured in units of its own curvature at the start (p (1 - p), p = softmax(z)), because the classes
    that images are hardly ever mistaken for have almost none.

    Args and returns: as `fit_squares`.
    """
    target = f.to(x.dtype).softmax(1)
    _, total = cluster_sums(labels, len(a0), x.dtype)
    prior = torch.stack([a0, b0]).to(x.dtype)

    def logits(map: Tensor) -> Tensor:
        return map[0][labels] * x + map[1][labels]

    p = logits(prior).softmax(1)
    doubt = p * (1 - p)
    unit = (torch.stack([total(doubt * x.square()), total(doubt)]) + tau / 4).rsqrt()

    def objective(step: Tensor) -> tuple[Tensor, Tensor]:
        delta = step * unit
        log_p = logits(prior + delta).log_softmax(1)
        g = log_p.exp() - target
        loss = delta.square().sum(dtype=torch.float64) * tau / 8 - (target * log_p).sum(dtype=torch.float64)
        return loss, (torch.stack([total(g * x), total(g)]) + delta * tau / 4) * unit

    a, b = (prior + minimize(objective, torch.zeros_like(prior)) * unit).double()
    return a, b


def fit_temperature(student: Tensor, teacher: Tensor, tau: float) -> float:
    """Return the factor t that minimizes ``sum_n KL(softmax(f) || softmax(t q)) + tau / 8 (t - 1)^2`` over logits ``[N, C]``.

    The pseudo-images are toss-ups between two classes one logit apart. The gradient of an image's KL is the difference of its
    mean logit under both softmaxes.
    """
    q, target = student.double(), teacher.double().softmax(1)

    def objective(t: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (t * q).log_softmax(1)
        slope = ((log_p.exp() - target) * q).sum() + tau / 4 * (t - 1)
        return tau / 8 * (t - 1).square().sum() - (target * log_p).sum(), slope

    return minimize(objective, torch.ones(1, dtype=q.dtype, device=q.device)).item()


def minimize(objective: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor) -> Tensor:
    """Minimize a smooth convex function by L-BFGS; ``objective`` maps a point to its value and its gradient."""
    point = start.clone()

    def closure() -> Tensor:
        loss, point.grad = objective(point)
        return loss

    torch.optim.LBFGS(
        [point],
        max_iter=200,
        tolerance_grad=torch.finfo(point.dtype).eps ** 0.5,
        tolerance_change=torch.finfo(point.dtype).eps,
        line_search_fn="strong_wolfe",
    ).step(closure)
    return point


def cluster_sums(labels: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the images per cluster ``[K, 1]``, and the function that sums the rows of ``[N, C]`` by cluster into ``[K, C]``.

    Sums are products with the membership matrix, not atomic additions, so they come out the same every time.
    """
    member = F.one_hot(labels, count).to(dtype).T
    return member.sum(1, keepdim=True), lambda values: member @ values
