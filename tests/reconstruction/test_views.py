"""Views: made from the number of the step alone; each image once an epoch; what is held out is never seen."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fxquant
from fxquant.data import collect, seeded
from fxquant.recipe import Recipe
from fxquant.reconstruction.network import NetworkTraining
from fxquant.reconstruction.views import Views, blended, recolored


def numbered(count: int, size: int = 8) -> Tensor:
    """Return images that each hold their number everywhere, so that any shift leaves it."""
    return torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, size, size).clone()


def views(count: int = 12, rows: Tensor | None = None, augment: str = "none", blend: float = 0.0, size: int = 4, seed: int = 0) -> Views:
    x = numbered(count)
    return Views(list(x.split(5)), torch.arange(count) if rows is None else rows, [x], augment, blend, size, seed)


def ids(batch: Tensor) -> list[int]:
    return batch[:, 0, 0, 0].int().tolist()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 13), st.integers(1, 15), st.sampled_from(["none", "crop", "crop+flip"]), st.integers(0, 2**40))
def test_every_image_once_an_epoch_and_another_order_in_the_next(count, size, augment, seed):
    rows = torch.arange(0, 2 * count, 2)
    made = views(2 * count, rows, augment, size=size, seed=seed)
    steps = [ids(made.batch(step)) for step in range(count)]
    assert {len(step) for step in steps} == {min(size, count)}
    drawn = [number for step in steps for number in step]
    epochs = [drawn[start : start + count] for start in range(0, len(drawn) - count + 1, count)]
    assert len(epochs) == min(size, count)
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs)
    assert count < 8 or len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("augment", ["none", "crop+flip"])
def test_a_batch_depends_on_the_step_and_the_seed_alone(augment):
    x = torch.randn(11, 3, 8, 8)
    make = lambda seed: Views([x], torch.arange(9), [x], augment, 0.5, 4, seed)  # noqa: E731
    straight, other = make(3), make(3)
    wanted = [straight.batch(step) for step in range(9)]
    for step in (8, 2, 2, 5, 0, 7):
        assert torch.equal(other.batch(step), wanted[step])
    assert not torch.equal(make(4).batch(0), wanted[0])
    assert len({batch.sum().item() for batch in wanted}) == 9


def test_making_views_leaves_global_generators_alone(random_states):
    before = random_states()
    made = views(augment="crop+flip", blend=1.0)
    made.batch(3)
    assert random_states() == before


def test_shifted_and_mirrored_views_are_windows_of_the_padded_image():
    x = torch.randn(6, 3, 8, 8)
    made = Views([x], torch.arange(6), [x], "crop+flip", 0.0, 6, 0)
    mirrored = 0
    for step in range(8):
        for view in made.batch(step):
            found = []
            for flipped in (False, True):
                for image in F.pad(x, (1, 1, 1, 1), mode="reflect"):
                    windows = image.unfold(1, 8, 1).unfold(2, 8, 1).movedim(0, 2).flatten(0, 1)
                    found.append((windows == (view.flip(2) if flipped else view)).flatten(1).all(1).any().item())
            assert sum(found) == 1
            mirrored += any(found[6:])
    assert 12 < mirrored < 36


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_recolored_images_are_affine_in_each_pixel_and_their_own(channels):
    """Contrast and saturation keep the mean of an image, the tint moves it; one channel has no saturation."""
    x = torch.randn(40, channels, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    strength = 0.4
    out = recolored(x, strength, torch.Generator().manual_seed(1))
    gray, was = out.mean(1), x.mean(1)  # saturation leaves the mean over channels, so contrast and shift remain
    toned, before = gray - gray.mean((1, 2), True), was - was.mean((1, 2), True)
    slope = (toned * before).sum((1, 2)) / before.square().sum((1, 2))
    torch.testing.assert_close(toned, slope[:, None, None] * before)
    assert 1 - strength <= slope.min() < 0.75 and 1.25 < slope.max() <= 1 + strength
    shift = gray.mean((1, 2)) - was.mean((1, 2))
    assert shift.abs().max() <= strength / 2 and len(set(shift.tolist())) == 40
    if channels > 1:
        tone, before = out - out.mean(1, True), x - x.mean(1, True)
        tone, before = tone - tone.mean((2, 3), True), before - before.mean((2, 3), True)
        ratio = (tone * before).sum((1, 2, 3)) / before.square().sum((1, 2, 3)) / slope
        torch.testing.assert_close(tone, (ratio * slope).view(-1, 1, 1, 1) * before)
        assert 1 - strength <= ratio.min() < 0.75 and 1.25 < ratio.max() <= 1 + strength
    assert torch.equal(out, recolored(x, strength, torch.Generator().manual_seed(1)))
    torch.testing.assert_close(recolored(x, 0.0, torch.Generator().manual_seed(1)), x)


def test_views_are_recolored_where_asked():
    x = torch.randn(12, 3, 8, 8)
    make = lambda color: Views([x], torch.arange(12), [x], "none", 0.0, 4, 0, color)  # noqa: E731
    plain, other = make(0.0), make(0.3)
    assert "recolored" in other.made and "recolored" not in plain.made
    assert not torch.equal(plain.batch(2), other.batch(2))
    assert torch.equal(other.batch(2), make(0.3).batch(2))


def test_blended_images_are_convex_combinations_or_boxes():
    x = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    kinds, shares, cut = set(), [], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        out = blended(x, generator)
        others = x[torch.randperm(16, generator=torch.Generator().manual_seed(seed))]
        from_own, from_other = (out == x).all(1), (out == others).all(1)  # [N, H, W]
        if (from_own | from_other).all():
            kinds.add("box")
            for mine, theirs in zip(from_own, from_other, strict=True):
                if mine.all() and theirs.all():
                    continue  # an image with itself
                inside = theirs & ~mine
                rows, columns = inside.any(1), inside.any(0)
                assert torch.equal(inside, rows[:, None] & columns[None, :])
                for line in (rows, columns):  # without gaps
                    assert int(line.int().diff().abs().sum() + line[0].int() + line[-1].int()) in (0, 2)
                cut.append(inside.double().mean().item())
            continue
        kinds.add("mix")
        for image, a, b in zip(out, x, others, strict=True):
            if torch.equal(a, b):
                assert torch.allclose(image, a)
                continue
            share = ((image - b) * (a - b)).sum() / (a - b).square().sum()
            assert 0 <= share <= 1
            torch.testing.assert_close(image, share * a + (1 - share) * b, rtol=1e-6, atol=1e-6)
            shares.append(share.item())
    assert kinds == {"box", "mix"}
    assert abs(sum(shares) / len(shares) - 0.5) < 0.06
    assert 0.2 < sum(cut) / len(cut) < 0.5  # one half, less what is beyond the border


@pytest.mark.parametrize(("blend", "low", "high"), [(0.0, 0, 0), (0.5, 30, 70), (1.0, 100, 100)])
def test_the_share_of_blended_batches(blend, low, high):
    made, plain = views(blend=blend, size=12), views(size=12)
    changed = sum(not torch.equal(made.batch(step), plain.batch(step)) for step in range(100))
    assert low <= changed <= high
    assert ("blended" in made.made) == (blend > 0)


class Jittered(Dataset):
    """Image i holds i, plus noise of the global generator that stays below one half."""

    def __init__(self, count: int = 12, noise: float = 0.4, channels: int = 3):
        self.count, self.noise, self.channels = count, noise, channels

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((self.channels, 8, 8), index + 0.1 * random.random()) + self.noise * torch.rand(1)


def test_the_randomness_of_the_loader_is_used_and_can_be_taken_up_anywhere():
    loader = DataLoader(Jittered(13), batch_size=5)
    calibration = collect(loader)
    rows = torch.arange(1, 13)
    make = lambda seed=0: Views(calibration, rows, loader, "crop", 0.0, 4, seed)  # noqa: E731
    made = make()
    assert made.made == "passes of the loader"
    wanted = [made.batch(step) for step in range(9)]
    other = make()
    for step in (7, 1, 4, 4, 0, 8):
        torch.rand(3)
        assert torch.equal(other.batch(step), wanted[step])
    assert not torch.equal(make(1).batch(0), wanted[0])
    drawn = torch.cat(wanted)[:, 0, 0, 0]
    assert all(sorted(drawn[start : start + 12].int().tolist()) == rows.tolist() for start in (0, 12, 24))
    noise = [value.item() for value in drawn - drawn.floor()]
    assert len(set(noise)) == len(noise) and not set(noise) & set((torch.cat(calibration)[:, 0, 0, 0] % 1).tolist())


class SeldomMirrored(Jittered):
    """So seldom that two passes may well be the same."""

    def __getitem__(self, index: int) -> Tensor:
        image = torch.arange(8.0).expand(3, 8, 8) + index
        return image.flip(2) if torch.rand(()) < 0.03 else image


def test_whether_a_loader_is_random_does_not_depend_on_what_was_drawn_before():
    """A run that goes on has drawn less."""
    loader = DataLoader(SeldomMirrored(12), batch_size=4)
    calibration, found = collect(loader), []
    for seed in range(20):
        torch.manual_seed(seed)
        found.append({Views(calibration, torch.arange(12), loader, "crop", 0.0, 4, 0).made for _ in range(5)})
        assert found[-1] == found[0] and len(found[0]) == 1
    others = {Views(calibration, torch.arange(12), loader, "crop", 0.0, 4, seed).made for seed in range(20)}
    assert others == {"shifted", "passes of the loader"}


def test_a_loader_without_randomness_is_not_passed_over_again():
    loader = DataLoader(numbered(6), batch_size=4)
    made = Views(collect(loader), torch.arange(6), loader, "crop", 0.0, 4, 0)
    assert made.loader is None and made.made == "shifted"


@pytest.mark.parametrize("shuffle", [False, True])
def test_held_out_images_of_an_augmenting_loader_are_never_trained_on(shuffle, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    seen: set[int] = set()
    held: set[int] = set()
    backward = NetworkTraining.backward

    def watched(self: NetworkTraining, x: Tensor) -> Tensor:
        seen.update(x[:, 0, 0, 0].int().tolist())
        held.update(self.held_out[:, 0, 0, 0].int().tolist())
        return backward(self, x)

    monkeypatch.setattr(NetworkTraining, "backward", watched)
    recipe = Recipe(stages=("ranges", "finish"), finish_iterations=12, finish_batch=8, finish_blend=0.0, finish_holdout=0.25)
    fxquant.quantize(net, DataLoader(Jittered(24), batch_size=6, shuffle=shuffle), w=4, a=4, recipe=recipe, progress=False)
    assert len(held) == 6 and len(seen) >= 18
    assert not held & seen


def test_size_is_at_most_the_number_of_rows():
    made = views(12, torch.tensor([3, 5]), size=64)
    assert made.size == 2 and sorted(ids(made.batch(0))) == [3, 5]


def test_seeded_passes_leave_global_generators_alone(random_states):
    loader = DataLoader(Jittered(), batch_size=5)
    with seeded(0, loader):
        made = Views(collect(loader), torch.arange(12), loader, "crop", 0.0, 4, 0)
    before = random_states()
    made.batch(5)
    assert random_states() == before
