"""Fresh views of the calibration images for every step of a training, each made from the number of the step alone.

So a run that is resumed at step t sees what it would have seen, with no state of a generator to keep.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fxquant.data import collect, in_one_order, is_changing, is_random, seeded, shift_images


class Views:
    """Batches of views.

    Args:
        images: the calibration images in order ``[N, C, H, W]``, on the CPU.
        rows: which of them are trained on.
        loader: where they came from. A DataLoader that augments at random is passed over again and again; otherwise images are shifted (and
            mirrored) as `augment` says, for which image is which cannot be told from any other loader.
        augment: ``"none"``, ``"crop"`` or ``"crop+flip"``.
        blend: share of batches in which images are blended or cut together.
        color: how far contrast, saturation and tint of each image are changed.
        size: images a batch; at most as many as there are rows.
        seed: same seed and step, same views.

    Attributes:
        made: how views are made, for the report.
    """

    def __init__(
        self,
        images: list[Tensor],
        rows: Tensor,
        loader: Iterable[Any],
        augment: str,
        blend: float,
        size: int,
        seed: int,
        color: float = 0.0,
        reach: float = 0.125,
    ):
        self.images, self.rows, self.augment, self.blend, self.seed = _rows(images), rows, augment, blend, seed
        self.color, self.reach = color, reach
        self.size = min(size, len(rows))
        repeating = in_one_order(loader)
        with seeded(seed, loader):  # the same answer in a run that goes on, which has drawn less before
            self.loader = repeating if repeating is not None and is_random(repeating) else None
            unused = repeating is None and is_changing(loader)
        self._epoch = (-1, rows)
        self._pass = (-1, self.images)
        changes = (", recolored" if color else "") + (f", {blend:.0%} of the batches blended" if blend else "")
        words = {"none": "the calibration images themselves", "crop": "shifted", "crop+flip": "shifted and mirrored"}
        self.made = ("passes of the loader" if self.loader is not None else words[augment]) + changes
        if unused:
            self.made += "; other images or another order on each pass of the loader are not used, as it does not say which image is which"

    def batch(self, step: int) -> Tensor:
        """Return the views ``[size, C, H, W]`` of `step`: every image once an epoch, in another order each time."""
        generator = self.generator(step)
        places = [divmod(place, len(self.rows)) for place in range(step * self.size, (step + 1) * self.size)]
        views = torch.stack([self._source(epoch)[int(self._order(epoch)[row])] for epoch, row in places])
        if self.loader is None and self.augment != "none":
            views = shift_images(views, self.augment == "crop+flip", generator, self.reach)
        if self.color:
            views = recolored(views, self.color, generator)
        if self.blend and torch.rand((), generator=generator) < self.blend:
            views = blended(views, generator)
        return views

    def unchanged(self, count: int) -> Tensor:
        """Return up to `count` of the images ``[n, C, H, W]`` that are trained on as they are, evenly spread."""
        places = torch.arange(min(count, len(self.rows))) * len(self.rows) // min(count, len(self.rows))
        return torch.stack([self.images[int(row)] for row in self.rows[places]])

    def generator(self, step: int, stream: int = 0) -> torch.Generator:
        """Return a generator that depends on the seed, `step` and `stream` alone."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step * 4 + stream) % 2**63)

    def _order(self, epoch: int) -> Tensor:
        if self._epoch[0] != epoch:
            self._epoch = epoch, self.rows[torch.randperm(len(self.rows), generator=self.generator(epoch, 1))]
        return self._epoch[1]

    def _source(self, epoch: int) -> list[Tensor]:
        if self.loader is None:
            return self.images
        if self._pass[0] != epoch:
            with seeded((self.seed + epoch) % 2**63, self.loader):
                self._pass = epoch, _rows(collect(self.loader, self.images[0].dtype))
        return self._pass[1]


def _rows(batches: Iterable[Tensor]) -> list[Tensor]:
    return [row for batch in batches for row in batch]


def recolored(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Return images ``[N, C, H, W]`` in other colors, each with its own factors, with u drawn uniformly from -1..1.

    contrast     x' = m + (1 + strength u) (x - m),     m the mean of the image
    saturation   x' = g + (1 + strength u) (x - g),     g the mean of a pixel over the channels
    tint         x' = x + strength u_c / 2,             of each channel, in the units of the normalized image
    """
    count, channels = images.shape[:2]
    drawn = strength * (2 * torch.rand(count, 2 + channels, 1, 1, generator=generator) - 1).to(images)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = torch.lerp(mean, images, 1 + drawn[:, :1])
    gray = images.mean(1, keepdim=True)
    return torch.lerp(gray, images, 1 + drawn[:, 1:2]) + drawn[:, 2:] / 2


def blended(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image blended with another (mixup, Zhang et al. 2018) or with a box cut from it (CutMix, Yun et al. 2019), one half each.

    Shares are uniform in 0..1; only images are made: what they show, the teacher says.
    """
    others = images[torch.randperm(len(images), generator=generator)]
    share = torch.rand(len(images), generator=generator)
    if torch.rand((), generator=generator) < 0.5:
        return torch.lerp(others, images, share.to(images).view(-1, 1, 1, 1))
    height, width = images.shape[2:]
    side = (1 - share).sqrt()
    inside = []
    for length in (height, width):
        center = torch.rand(len(images), generator=generator) * length
        pixels = torch.arange(length) + 0.5
        inside.append((pixels - center.view(-1, 1)).abs() <= (side * length / 2).view(-1, 1))
    box = inside[0].view(-1, 1, height, 1) & inside[1].view(-1, 1, 1, width)
    return torch.where(box, others, images)
