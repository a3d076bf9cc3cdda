"""Image folders: one subfolder a class (torchvision's ImageFolder layout), or images side by side; the same choice every time.

photos/cat/1.jpg  photos/dog/2.jpg     labels 0, 1 in the order of the sorted names
photos/1.jpg      photos/2.jpg         no labels
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from fxquant.errors import CalibrationError


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images of a folder with their labels, -1 for those of a flat folder.

    Args:
        root: the folder.
        transform: from an RGB PIL image to a tensor.
        count: how many images; equally many of each class as far as there are, chosen by `seed`. None: all.
        seed: of the choice.

    Raises:
        CalibrationError: no folder, or no images in it; on access, a file that is no readable image.
    """

    def __init__(self, root: str | Path, transform: Callable[[Any], Tensor], count: int | None = None, seed: int = 0):
        self.root, self.transform = Path(root), transform
        if not self.root.is_dir():
            raise CalibrationError("is no folder", where=str(root), fix="Give a folder of images, or of one subfolder a class")
        self.classes = sorted(path.name for path in self.root.iterdir() if path.is_dir())
        files = [_images(self.root / name) for name in self.classes] if self.classes else [_images(self.root)]
        if count is not None and count < 1:
            raise CalibrationError(f"{count} images are none", where="images", fix="Ask for one or more")
        labels = range(len(files)) if self.classes else [-1]
        self.items = _spread([[(path, label) for path in paths] for label, paths in zip(labels, files, strict=True)], count, seed)
        if not self.items:
            kinds = " ".join(sorted(IMG_EXTENSIONS))
            raise CalibrationError("holds no images", where=str(root), fix=f"Images end in {kinds}, directly inside or one folder down")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.items[index]
        try:
            with Image.open(path) as image:
                return self.transform(image.convert("RGB")), label
        except (UnidentifiedImageError, OSError) as error:
            raise CalibrationError(f"is no readable image ({error})", where=str(path), fix="Remove or repair it") from error

    @property
    def labels(self) -> Tensor | None:
        """Labels ``[N]``, or None for a flat folder."""
        return torch.tensor([label for _, label in self.items]) if self.classes else None

    def loader(self, batch_size: int = 64, workers: int = 0) -> DataLoader[tuple[Tensor, int]]:
        """Return a loader that gives the images in a fixed order."""
        return DataLoader(self, batch_size, num_workers=workers)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())


def _spread(classes: list[list[Any]], count: int | None, seed: int) -> list[Any]:
    """Return `count` items, the classes taking turns, each in an order of its own; all items in their order with None."""
    if count is None or count >= sum(map(len, classes)):
        return [item for items in classes for item in items]
    chosen: list[Any] = []
    pick = random.Random(seed)
    queues = [pick.sample(items, len(items)) for items in classes]
    while len(chosen) < count:
        pick.shuffle(queues)
        queues = [queue for queue in queues if queue]
        chosen += [queue.pop() for queue in queues[: count - len(chosen)]]
    return chosen
