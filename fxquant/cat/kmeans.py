"""Lloyd's k-means with greedy k-means++ seeding and restarts.

    seed:    c_1 a random point; c_j the best of a few points drawn with probability ~ squared distance to the nearest center
    repeat:  label_n = argmin_k |x_n - c_k|^2 = argmax_k (x_n . c_k - |c_k|^2 / 2);   c_k = mean of the points labeled k

Random numbers come from a CPU generator, and sums over clusters are matrix products instead of atomic additions, so one seed
gives one clustering, on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import CATError

# Entries of the largest temporary matrix (points of a chunk x centers): 128 MiB in float64.
CHUNK = 2**24


@dataclass(frozen=True)
class KMeans:
    """A clustering: ``centers [k, d]`` (float64), ``labels [N]`` (int64), ``inertia`` the sum of squared distances to them."""

    centers: Tensor
    labels: Tensor
    inertia: float


def kmeans(x: Tensor, k: int, seed: int, restarts: int = 4, iterations: int = 100) -> KMeans:
    """Cluster the rows of ``x`` into ``k`` groups; the restart with the least inertia wins.

    Every cluster returned holds at least one point. A cluster that runs empty on the way is moved onto the point that is
    farthest from its center; with fewer than ``k`` distinct points there are as many clusters as distinct points.

    Args:
        x: points ``[N, d]``.
        k: clusters, at least 1.
        seed: of the generator that all restarts draw from.
        restarts: independent seedings.
        iterations: most Lloyd steps per restart; it stops earlier when no label changes.

    Returns:
        A `KMeans` with at most ``k`` centers.

    Raises:
        CATError: there are fewer points than clusters.
    """
    if len(x) < k:
        raise CATError(f"{len(x)} images are fewer than {k} clusters", where="kmeans", fix="Ask for fewer clusters, or give more images")
    x = x.double()
    # Distances are expanded into |x|^2 - 2 x.c + |c|^2, which loses digits when the cloud is far from the origin.
    mean = x.mean(0)
    x = x - mean
    generator = torch.Generator().manual_seed(seed)
    runs = [_lloyd(x, _seed_centers(x, k, generator), iterations) for _ in range(restarts)]
    best = min(runs, key=lambda run: run.inertia)
    return KMeans(best.centers + mean, best.labels, best.inertia)


def _seed_centers(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Draw ``k`` centers ``[k, d]`` among the points (fewer if fewer are distinct) by greedy k-means++."""
    square = x.square().sum(1)
    # Two points closer than 1e-6 of the cloud's radius count as one: below that the expansion returns rounding noise.
    same = square.max() * 1e-12
    trials = 2 + int(math.log(k))
    chosen = [int(torch.randint(len(x), (), generator=generator))]

    def distances(points: Tensor) -> Tensor:
        d = square[:, None] + square[points] - 2 * x @ x[points].T
        return torch.where(d > same, d, 0.0)

    nearest = distances(torch.tensor(chosen, device=x.device))
    while len(chosen) < k:
        mass = nearest[:, 0].cumsum(0)
        if mass[-1] == 0:
            break
        draws = torch.rand(trials, generator=generator, dtype=torch.float64).to(x.device) * mass[-1]
        points = torch.searchsorted(mass, draws, right=True).clamp_max(len(x) - 1)
        closer = torch.minimum(nearest, distances(points))
        best = closer.sum(0).argmin()
        nearest = closer[:, best, None]
        chosen.append(int(points[best]))
    return x[torch.tensor(chosen, device=x.device)]


def _lloyd(x: Tensor, centers: Tensor, iterations: int) -> KMeans:
    """Alternate labels and means from ``centers [k, d]`` until no label changes; drop what is empty at the end."""
    labels = torch.full((len(x),), -1, device=x.device)
    for _ in range(iterations):
        previous, (labels, distance, sums, counts) = labels, _assign(x, centers)
        if torch.equal(labels, previous):
            break
        empty = (counts == 0).nonzero()[:, 0]
        centers = sums / counts[:, None].clamp_min(1)
        if len(empty):
            centers[empty] = x[distance.topk(len(empty)).indices]
    labels, distance, _, counts = _assign(x, centers)
    used = counts > 0
    return KMeans(centers[used], (used.cumsum(0) - 1)[labels], distance.sum().item())


def _assign(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return labels ``[N]``, squared distances ``[N]``, sums of points ``[k, d]`` and numbers of points ``[k]``."""
    half = centers.square().sum(1) / 2
    sums, counts = torch.zeros_like(centers), torch.zeros_like(half)
    labels, distances = [], []
    for chunk in x.split(max(1, CHUNK // len(centers))):
        score, label = (chunk @ centers.T - half).max(1)
        member = torch.nn.functional.one_hot(label, len(centers)).to(x.dtype)
        sums += member.T @ chunk
        counts += member.sum(0)
        labels.append(label)
        distances.append((chunk.square().sum(1) - 2 * score).clamp_min(0))
    return torch.cat(labels), torch.cat(distances), sums, counts
