"""What folding hides: the statistics of a batch norm, kept while a run lasts for whoever needs the moments of channels without images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NORMS = "folded_norms"
"""The key of ``GraphModule.meta`` under which the folded norms are found by the path of their layer."""


@dataclass(frozen=True)
class FoldedNorm:
    """The batch norm folded into a layer: ``y' = factor * y + shift`` of its input y, and the statistics of y; all ``[C]``."""

    mean: Tensor
    deviation: Tensor
    factor: Tensor
    shift: Tensor

    @property
    def has_statistics(self) -> bool:
        """Whether those statistics are of data: a norm that was folded before, or never trained, has mean 0 and one deviation for all."""
        return bool((self.mean != 0).any()) or bool((self.deviation != self.deviation[0]).any())

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of y', float64."""
        return self.factor.double() * self.mean + self.shift, (self.factor.double() * self.deviation).abs()


def norm_distance(output: Tensor, norm: FoldedNorm) -> Tensor:
    """Return how far the mean and the deviation of each image's input of a folded norm are from the stored ones, squared, mean over images.

    Args:
        output: what the layer with the norm folded in gives, ``[N, C, ...]``.
        norm: the norm; channels that it makes all but constant do not count.
    """
    flat = output.flatten(2) if output.ndim > 2 else output.unsqueeze(2)
    # Of a channel that is all but a constant the statistics drown in rounding noise, so it does not count.
    scaled = norm.factor.abs() * norm.deviation > 1e-4 * norm.shift.abs().clamp_min(1e-8)
    factor = torch.where(scaled, norm.factor, 1.0)
    mean = (flat.mean(2) - norm.shift) / factor
    deviation = flat.std(2) / factor.abs() + 1e-6 if flat.shape[2] > 1 else norm.deviation.expand_as(mean)
    error = (mean - norm.mean).square() + (deviation - norm.deviation).square()
    return (error * scaled).sum(1).mean()
