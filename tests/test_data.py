"""Calibration images: batches in, checked batches and fresh views out. What is refused stands in test_bad_input.py."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import fxquant
from fxquant.data import check_seed, collect, first_images, fresh_views, in_one_order, is_random, rebatch, repeatable, seeded


@pytest.fixture
def numbered() -> list[Tensor]:
    """12 images [1, 16, 16] in three batches: pixel (i, j) of image n holds n + i / 16 + j / 256."""
    axis = torch.arange(16) / 16
    return list((torch.arange(12.0)[:, None, None, None] + axis[:, None] + axis / 16).expand(12, 1, 16, 16).split(4))


class Noisy(Dataset):
    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index] + 0.1 * torch.rand(())


def test_collect(images):
    batches = collect(iter(images))
    assert all(torch.equal(a, b) for a, b in zip(batches, images, strict=True))
    assert {batch.dtype for batch in collect(images, torch.float64)} == {torch.float64}


def test_collected_images_are_off_the_tape(images):
    assert not collect([images[0].requires_grad_()])[0].requires_grad


def test_rebatch(images):
    for size, lengths in ((8, [8] * 8), (25, [16] * 4), (32, [32, 32]), (64, [48, 16]), (200, [64])):
        batches = rebatch(images, size)
        assert [len(batch) for batch in batches] == lengths
        assert torch.equal(torch.cat(batches), torch.cat(images))
    odd = rebatch([torch.rand(count, 1, 2, 2) for count in (90, 1, 90, 7, 7, 64, 33, 31, 2)])
    assert sum(map(len, odd)) == 325
    assert max(map(len, odd)) == 64
    assert rebatch([]) == []


def test_rebatch_copies_no_large_batch():
    large = torch.rand(150, 1, 2, 2)
    batches = rebatch(iter([large]))
    assert [len(batch) for batch in batches] == [64, 64, 22]
    assert {batch.untyped_storage().data_ptr() for batch in batches[:2]} == {large.untyped_storage().data_ptr()}
    alone = torch.rand(33, 1, 2, 2)
    assert rebatch([alone])[0].data_ptr() == alone.data_ptr()


@pytest.mark.parametrize(("count", "lengths"), [(0, []), (1, [1]), (16, [16]), (17, [16, 1]), (64, [16] * 4), (99, [16] * 4)])
def test_first_images(images, count, lengths):
    taken = first_images(iter(images), count, torch.device("cpu"))
    assert [len(batch) for batch in taken] == lengths
    assert torch.equal(torch.cat([*taken, images[0][:0]]), torch.cat(images)[:count])
    assert {batch.device.type for batch in first_images(images, count, torch.device("meta"))} <= {"meta"}


def test_shifted_views(numbered):
    views, groups, made = fresh_views(numbered, numbered, 3, "crop", 0)
    flat = torch.cat(list(views))
    assert list(views) == [], "read once"
    assert flat.shape == (36, 1, 16, 16)
    assert groups.tolist() == list(range(12)) * 3
    assert made == "3 shifted views"
    source = torch.cat(numbered)
    shifts = set()
    for view, group in zip(flat, groups.tolist(), strict=True):
        assert view.floor().eq(group).all()  # every pixel comes from the image its group names
        down, right = divmod(round(float(view[0, 8, 8] - source[group, 0, 8, 8]) * 256), 16)
        down, right = (down + 1, right - 16) if right > 8 else (down, right)
        assert abs(down) <= 2
        assert abs(right) <= 2
        inner = view[0, 2:14, 2:14]
        assert torch.equal(inner, source[group, 0, 2 + down : 14 + down, 2 + right : 14 + right])
        shifts.add((down, right))
    assert len(shifts) > 8


def test_mirrored_views(numbered):
    for augment, expected in (("crop", 0), ("crop+flip", 18)):
        views, _, made = fresh_views(numbered, numbered, 3, augment, 0)
        mirrored = sum(bool(view[0, 8, 4] > view[0, 8, 11]) for view in torch.cat(list(views)))
        assert abs(mirrored - expected) <= (9 if expected else 0)
        assert ("mirrored" in made) == bool(expected)


def test_views_depend_on_the_seed_alone(numbered):
    first, again, other = (torch.cat(list(fresh_views(numbered, numbered, 2, "crop+flip", seed)[0])) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:12], first[12:])


def test_no_views(numbered):
    views, groups, made = fresh_views(numbered, numbered, 4, "none", 0)
    assert torch.equal(torch.cat(list(views)), torch.cat(numbered))
    assert groups.tolist() == list(range(12))
    assert made == "the calibration images themselves"


def test_reach_of_shifts(numbered):
    views = torch.cat(list(fresh_views(numbered, numbered, 20, "crop", 0, 0.25)[0]))
    source = torch.cat(numbered).repeat(20, 1, 1, 1)
    rows = ((views - source)[:, 0, 8, 8] * 16).round()  # a row of an image is a sixteenth, a column less than half of one
    assert rows.abs().max() == 4
    with pytest.raises(fxquant.ConfigError, match=r"Recipe\.augment_reach: 1\.5 is no number from 0\.0 to 1\.0"):
        fxquant.Recipe(augment_reach=1.5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_views_of_tiny_images(size):
    image = torch.rand(5, 2, size, size)
    views, _, _ = fresh_views([image], [image], 2, "crop+flip", 0)
    assert [view.shape for view in views] == [(5, 2, size, size)] * 2


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_passes_of_a_loader_that_augments(numbered, shuffle, workers):
    """Views of one image carry one number, whatever the order of the loader: the fractions tell the images apart."""
    loader = DataLoader(Noisy(torch.cat(numbered)), 5, shuffle=shuffle, num_workers=workers)
    with seeded(0, loader):
        views, groups, made = fresh_views(loader, collect(loader), 2, "crop", 0)
        flat = torch.cat(list(views))
    names = flat[:, 0, 0, 0].floor().long()
    assert made == "2 passes of the loader"
    assert sorted(names.tolist()) == sorted(list(range(12)) * 2)
    assert torch.equal(names[:12], names[12:])
    assert not torch.equal(flat[:12], flat[12:])
    assert torch.equal(groups[:12], groups[12:])
    assert groups[:12].unique().numel() == 12


def test_passes_of_a_loader_come_in_batches_like_those_given(numbered):
    loader = DataLoader(Noisy(torch.cat(numbered)), 6)
    whole, _, _ = fresh_views(loader, collect(loader), 2, "crop", 0)
    assert [len(batch) for batch in whole] == [6] * 4
    small, _, _ = fresh_views(loader, rebatch(collect(loader), 2), 2, "crop", 0)
    assert [len(batch) for batch in small] == [2] * 12


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.rand(8, 1, 4, 4))


def test_random_loaders_without_a_known_order(images):
    """Which image is which cannot be told from such a loader, so its images are collected once and shifted."""
    random_again = [lambda: torch.rand(4, 1, 8, 8)]

    class Fresh:
        def __iter__(self):
            return (make() for make in random_again)

    for loader in (Fresh(), DataLoader(Stream(), 4), (batch for batch in images)):
        batches = collect(loader)
        _, groups, made = fresh_views(loader, batches, 2, "crop", 0)
        assert made == "2 shifted views"
        assert len(groups) == 2 * sum(map(len, batches))


def test_a_loader_that_only_shuffles(images):
    loader = DataLoader(TensorDataset(torch.cat(images)), 24, shuffle=True, drop_last=True)
    with seeded(0):
        batches = collect(loader)
        assert fresh_views(loader, batches, 2, "crop", 0)[2] == "2 shifted views"


def test_seeded_puts_everything_back(random_states):
    before = random_states()
    with contextlib.suppress(KeyError), seeded(3):
        torch.rand(3), np.random.rand(3), random.random()
        raise KeyError
    assert random_states() == before


@pytest.mark.parametrize("chosen", [(False, True), (True, False)])
def test_repeatable_lets_convolutions_be_so_and_puts_everything_back(random_states, monkeypatch, chosen):
    for name, value in zip(("deterministic", "benchmark"), chosen, strict=True):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    before = random_states()
    with torch.inference_mode(), contextlib.suppress(KeyError), repeatable(3):
        assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        torch.rand(3)
        raise KeyError
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == chosen
    assert random_states() == before


def test_repeatable_works_in_full_precision():
    with torch.autocast("cpu", torch.bfloat16):
        with repeatable(3):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_seeded_leaves_unused_gpus_alone(monkeypatch):
    """There is no state to put back before a GPU is used, but its seed is known."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(42)
        with seeded(3):
            torch.rand(1)
        assert seeds[-1] == torch.initial_seed() == 42


class Normalizing(DataLoader):
    """Makes something of the batches."""

    def __iter__(self):
        return (2 * batch for batch in super().__iter__())


def test_what_a_loader_makes_of_its_batches_stays(images):
    assert in_one_order(Normalizing(torch.cat(images), 16)) is None
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    scales = []
    for loader in (Normalizing(torch.cat(images), 16), [2 * batch for batch in images], images):
        quantized = fxquant.quantize(network, loader, 8, 8, cat=False, recipe="fast", progress=False)
        scales.append([value for name, value in quantized.state_dict().items() if name.startswith("activations")])
    assert all(map(torch.equal, scales[0], scales[1])) and not all(map(torch.equal, scales[0], scales[2]))


def test_a_loader_may_write_all_batches_into_the_same_memory(images):
    buffer = torch.empty_like(images[0])
    batches = [batch for batch in images if len(batch) == len(buffer)]
    collected = collect(buffer.copy_(batch) for batch in batches)
    assert len(batches) > 1 and all(map(torch.equal, collected, batches))


def test_seeded_decides():
    draws = []
    for seed in (3, 3, 4):
        with seeded(seed):
            draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))


@pytest.mark.parametrize("batches", [False, True])
def test_seeded_takes_the_generators_of_a_loader(batches):
    numbers, generator = TensorDataset(torch.arange(20)), torch.Generator().manual_seed(7)
    loader = DataLoader(numbers, 20, shuffle=True, generator=generator)
    if batches:
        loader = DataLoader(numbers, batch_sampler=BatchSampler(RandomSampler(numbers, generator=generator), 20, False))
    before = generator.get_state()
    orders = []
    for _ in range(2):
        with seeded(0, loader):
            orders.append(next(iter(loader))[0].tolist())
    assert orders[0] == orders[1]
    assert torch.equal(generator.get_state(), before)


def test_check_seed():
    assert check_seed(np.int64(5)) == 5
    assert type(check_seed(np.int64(5))) is int
    for bad in (None, "1", 1.0, True, -1, 2**63):
        with pytest.raises(fxquant.ConfigError, match=r"^seed: .* is no seed"):
            check_seed(bad)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_augmentation_that_leaves_every_second_image_alone_is_noticed(batch_size):
    class Flipped(Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            image = torch.arange(12.0).view(3, 2, 2) + index
            return image.flip(2) if torch.rand(()) < 0.5 else image

    for seed in range(20):
        torch.manual_seed(seed)
        assert is_random(DataLoader(Flipped(), batch_size))
    assert not is_random(DataLoader(torch.arange(24.0).view(8, 3, 1, 1), batch_size))


def test_a_loader_that_keeps_its_place_in_itself_is_not_random():
    """Each pass starts it anew, so two may not run side by side."""

    class Rewinding:
        def __iter__(self):
            self.place = -1
            return self._rows()

        def _rows(self):
            while self.place < 3:
                self.place += 1
                yield torch.full((2, 3, 2, 2), float(self.place))

    assert not is_random(Rewinding())
