"""Calibration images: from whatever the loader yields to checked float batches, and to fresh views of the same images."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fxquant.errors import CalibrationError, ConfigError, listed
from fxquant.execution import BATCH

IMAGE_KEYS = ("pixel_values", "image", "images", "img", "input", "inputs", "x", "data")
"""Keys under which the images of a dict batch are looked for, in this order."""


def collect(loader: Iterable[Any], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return copies of the image batches of `loader`, on the CPU, checked.

    Args:
        loader: an iterable of batches. A batch is a tensor ``[N, C, H, W]``, a tuple or list that begins with one, or a dict that holds one
            under a key of `IMAGE_KEYS`.
        dtype: the floating point type of the network; float32 and float64 images are converted to it.

    Raises:
        CalibrationError: no batch at all, a batch that holds no images, images of another shape or type than expected, NaN or Inf; the
            message names the batch and the image.
    """
    if isinstance(loader, Tensor):
        raise CalibrationError("is one tensor, not an iterable of batches", where="calib_loader", fix="Write [images] for a single batch")
    if not isinstance(loader, Iterable):
        raise CalibrationError(
            f"is a {type(loader).__name__}, not an iterable of batches", where="calib_loader", fix="Pass a DataLoader or a list of tensors"
        )
    batches: list[Tensor] = []
    for index, batch in enumerate(loader):
        images = _images(batch, index)
        _check(images, index, batches[0] if batches else None)
        # Copied: the loader may write the next batch into the same memory, the network into its images, and inference tensors cannot learn.
        batches.append(images.detach().to("cpu", dtype, copy=True))
    if not batches:
        raise CalibrationError(
            "yields no batch",
            where="calib_loader",
            fix="Check its data set; an iterator that was read before is empty, so pass the DataLoader",
        )
    return batches


def _images(batch: Any, index: int) -> Tensor:
    where = f"batch {index}"
    if isinstance(batch, tuple | list):
        if not batch:
            raise CalibrationError("is empty", where=where, fix="Yield (images, ...) or images")
        batch = batch[0]
    if isinstance(batch, Mapping):
        key = next((key for key in IMAGE_KEYS if key in batch), None)
        if key is None:
            raise CalibrationError(
                f"is a dict with the keys {listed(batch)}", where=where, fix=f"Put the images under one of {listed(IMAGE_KEYS)}"
            )
        batch = batch[key]
    if not isinstance(batch, Tensor):
        raise CalibrationError(f"holds a {type(batch).__name__}, not a tensor of images", where=where, fix="Yield tensors [N, C, H, W]")
    return batch


def _check(images: Tensor, index: int, first: Tensor | None) -> None:
    where = f"batch {index}"
    if images.ndim != 4 or 0 in images.shape:
        hints = {1: "Begin a batch with the images, not with the labels", 3: "Add the batch axis with images[None]"}
        hint = hints.get(images.ndim, "Yield at least one image a batch")
        raise CalibrationError(f"has shape {list(images.shape)}, expected [N, C, H, W]", where=where, fix=hint)
    if images.dtype not in (torch.float32, torch.float64):
        hint = "Convert with images.float()" if images.is_floating_point() else "Scale to floats and normalize as in training"
        raise CalibrationError(f"has type {str(images.dtype).removeprefix('torch.')}, expected float32", where=where, fix=hint)
    if first is not None and images.shape[1:] != first.shape[1:]:
        raise CalibrationError(
            f"has images of shape {list(images.shape[1:])}, batch 0 has {list(first.shape[1:])}", where=where, fix="Resize all images alike"
        )
    bad = ~torch.isfinite(images).flatten(1).all(1)
    if bad.any():
        which = int(bad.nonzero()[0])
        what = "NaN" if images[which].isnan().any() else "Inf"
        raise CalibrationError(f"image {which} holds {what}", where=where, fix="Drop or repair it; a std of 0 in Normalize does this")


def rebatch(batches: Iterable[Tensor], size: int = BATCH) -> list[Tensor]:
    """Return the same images in the same order in batches of about `size`: large ones are split (not copied), small ones joined."""
    parts: list[Tensor] = []
    small: list[Tensor] = []
    for batch in batches:
        for part in batch.split(size):
            if small and len(part) > size // 2:
                parts.append(torch.cat(small))
                small = []
            small.append(part)
            if sum(map(len, small)) > size // 2:
                parts.append(small[0] if len(small) == 1 else torch.cat(small))
                small = []
    return [*parts, torch.cat(small)] if small else parts


def first_images(batches: Iterable[Tensor], count: int, device: torch.device) -> list[Tensor]:
    """Return the first `count` images of `batches`, on `device`."""
    taken: list[Tensor] = []
    for batch in batches:
        if count > 0:
            taken.append(batch[:count].to(device))
        count -= len(batch)
    return taken


def fresh_views(
    loader: Iterable[Any], batches: list[Tensor], views: int, augment: str, seed: int, reach: float = 0.125
) -> tuple[Iterable[Tensor], Tensor, str]:
    """Return views of the calibration images that no range was chosen on, to be read once.

    They are made as they are read, a batch at a time, or a pass of the loader at a time, in batches of the size of `batches`.

    The data set of a DataLoader that augments at random (two passes in one order differ) is passed over `views` times, in
    one order. Otherwise images are shifted (reflected at the border, by up to the share `reach` of the size) and, with ``"crop+flip"``,
    mirrored.

    Returns:
        batches; the source image of each view, ``[N * views]`` int64 (views of one image must not be split over folds); and how the views
        were made, for the report.
    """
    sources = torch.arange(sum(map(len, batches)))
    repeating = in_one_order(loader)
    if repeating is not None and is_random(repeating):
        passes = (batch for _ in range(views) for batch in rebatch(collect(repeating, batches[0].dtype), max(map(len, batches))))
        return passes, sources.repeat(views), f"{views} passes of the loader"
    if augment == "none":
        return batches, sources, "the calibration images themselves"
    generator = torch.Generator().manual_seed(seed)
    moved = (shift_images(batch, augment == "crop+flip", generator, reach) for _ in range(views) for batch in batches)
    return moved, sources.repeat(views), f"{views} {'shifted and mirrored' if 'flip' in augment else 'shifted'} views"


def shift_images(images: Tensor, flip: bool, generator: torch.Generator, reach: float) -> Tensor:
    height, width = images.shape[2:]
    down, aside = max(int(reach * height), 1), max(int(reach * width), 1)
    mode = "reflect" if down < height and aside < width else "replicate"
    padded = F.pad(images, (aside, aside, down, down), mode=mode)
    tops = torch.randint(0, 2 * down + 1, (len(images),), generator=generator).tolist()
    lefts = torch.randint(0, 2 * aside + 1, (len(images),), generator=generator).tolist()
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).tolist()
    views = [image[:, top : top + height, left : left + width] for image, top, left in zip(padded, tops, lefts, strict=True)]
    return torch.stack([view.flip(2) if flip and mirror else view for view, mirror in zip(views, mirrored, strict=True)])


def in_one_order(loader: Iterable[Any]) -> DataLoader | None:
    """Return a DataLoader over the same images as `loader` whose every pass has the same order; None for anything else.

    Which image is which cannot be told from a loader that shuffles and augments.
    """
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        return None
    if type(loader).__iter__ is not DataLoader.__iter__ or type(loader)._get_iterator is not DataLoader._get_iterator:
        return None  # it makes something of the batches
    return DataLoader(
        loader.dataset,
        batch_sampler=list(loader.batch_sampler),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
    )


def is_changing(loader: Iterable[Any]) -> bool:
    """Say whether a second pass of a loader begins with other images; that of a DataLoader in the order of the first."""
    repeating = in_one_order(loader)
    if repeating is None and (isinstance(loader, Iterator) or iter(loader) is loader):
        return False  # it can be passed over only once
    return is_random(loader if repeating is None else repeating)


def is_random(loader: Iterable[Any]) -> bool:
    """Say whether two passes of `loader`, which has one order, begin with different images.

    The first 64 are compared: of augmentations that leave every second image as it is, one batch of one image may show nothing.
    """
    first, second = (_beginning(loader) for _ in range(2))
    if not first or not second:
        return False  # it can be passed over only once
    return len(first) != len(second) or not all(map(torch.equal, first, second))


def _beginning(loader: Iterable[Any], count: int = 64) -> list[Tensor]:
    """Return the batches with the first `count` images of a pass."""
    batches: list[Tensor] = []
    for batch in loader:
        batches.append(_images(batch, len(batches)).clone())
        if sum(map(len, batches)) >= count:
            break
    return batches


def check_seed(seed: object) -> int:
    """Return `seed` as an int, or raise ConfigError unless it is a whole number from 0 to 2^63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        raise ConfigError(f"{seed!r} is no seed", where="seed", fix="Use a whole number from 0 to 2**63 - 1")
    return int(seed)


@contextlib.contextmanager
def repeatable(seed: int, loader: object = None) -> Iterator[None]:
    """Let what is inside the block come out the same every time, as `seeded`, with gradients and in full precision wherever the caller
    stands.

    On a GPU, convolutions are told to take algorithms that give the same bits every time; a few other operations there have none (the
    gradient of `adaptive_avg_pool2d` to more than one position is one).
    """
    cudnn = torch.backends.cudnn
    chosen = cudnn.deterministic, cudnn.benchmark
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):  # without its cache, which lives as long as the outermost block: weights change inside
                stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        for context in (torch.inference_mode(False), torch.enable_grad(), seeded(seed, loader)):
            stack.enter_context(context)
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = chosen


@contextlib.contextmanager
def seeded(seed: int, loader: object = None) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python and those of `loader` inside the block; put their states back behind it.

    Everything inside fxquant draws from generators of its own; this is for the loader, whose shuffling and augmentation do not.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    batches = getattr(loader, "batch_sampler", None)
    parts = loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)
    own = {id(found): found for part in parts if isinstance(found := getattr(part, "generator", None), torch.Generator)}
    generators = [torch.default_generator, *own.values()]
    states = [generator.get_state() for generator in generators]
    gpu_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    first = torch.initial_seed()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        if gpu_states:
            torch.cuda.set_rng_state_all(gpu_states)
        else:  # GPUs that were not used yet have no state, and get the seed that they would have had
            torch.cuda.manual_seed_all(first)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
