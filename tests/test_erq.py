"""Closed forms against plain linear algebra on small problems."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fxquant import erq
from fxquant.erq import SHARES, Gram, Ladder, gram_bytes, refine, ridge, round_compensated, search_ridge
from fxquant.quantizers import DualQuantizer, QuantSpec, weight_quantizer


def problem(tokens: int = 300, inputs: int = 10, outputs: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy inputs with correlated columns, the outputs of the clean ones, and the weights, biases last."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator).double() + 2
    x = torch.randn(tokens, inputs, generator=generator).double() @ mix + 1
    weight = torch.randn(outputs, inputs + 1, generator=generator).double()
    y = x @ weight[:, :-1].T + weight[:, -1]
    return x + x.std() * 0.2 * torch.randn(tokens, inputs, generator=generator), y, weight


def gram_of(x: Tensor, y: Tensor) -> Gram:
    gram = Gram.empty(x.shape[1], y.shape[1])
    gram.add(x, y)
    return gram


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def direct_error(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return (y - with_ones(x) @ weight.T).square().sum(0)


@pytest.mark.parametrize("chunk", [1, 100, 2**22])
def test_sums(monkeypatch, chunk):
    monkeypatch.setattr(erq, "_CHUNK", chunk)
    x, y, weight = problem()
    gram = Gram.empty(10, 6)
    for part in (slice(0, 7), slice(7, 8), slice(8, 300)):
        gram.add(x[part], y[part])
    torch.testing.assert_close(gram.a, with_ones(x).T @ with_ones(x))
    torch.testing.assert_close(gram.b, with_ones(x).T @ y)
    torch.testing.assert_close(gram.error(weight), direct_error(x, y, weight))
    assert gram.count == 300
    torch.testing.assert_close((gram + gram).error(weight), 2 * gram.error(weight))


@pytest.mark.parametrize("share", [1e-6, 1e-3, 1.0])
def test_ridge_is_the_least_squares_solution(share):
    """(A + lambda I) D = B - A W^T; and the same as plain least squares on data with sqrt(lambda) I below."""
    x, y, weight = problem()
    gram, one = gram_of(x, y), with_ones(x)
    damping = share * float(one.square().sum(0).mean())
    found = ridge(gram, weight, share)
    solved = torch.linalg.solve(one.T @ one + damping * torch.eye(11), one.T @ (y - one @ weight.T))
    torch.testing.assert_close(found, weight + solved.T, rtol=1e-6, atol=1e-8)
    data = torch.cat([one, math.sqrt(damping) * torch.eye(11).double()])
    wanted = torch.cat([y - one @ weight.T, torch.zeros(11, 6).double()])
    torch.testing.assert_close(found, weight + torch.linalg.lstsq(data, wanted).solution.T, rtol=1e-6, atol=1e-8)


def test_the_error_falls_with_the_ridge_and_never_grows():
    x, y, weight = problem()
    gram = gram_of(x, y)
    errors = [direct_error(x, y, ridge(gram, weight, share)).sum() for share in sorted(SHARES)] + [direct_error(x, y, weight).sum()]
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[-1]


def test_columns_in_another_order():
    x, y, weight = problem()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    both = torch.cat([order, torch.tensor([10])])
    mixed = ridge(gram_of(x[:, order], y), weight[:, both], 0.01)
    torch.testing.assert_close(mixed, ridge(gram_of(x, y), weight, 0.01)[:, both])


SINGULAR = {
    "twice the same column": lambda x: torch.cat([x[:, :9], x[:, :1]], 1),
    "columns of zeros": lambda x: torch.cat([x[:, :7], torch.zeros_like(x[:, :3])], 1),
    "nothing but zeros": torch.zeros_like,
    "fewer tokens than columns": lambda x: x[:4],
    "one token": lambda x: x[:1],
    "a constant column": lambda x: torch.cat([x[:, :9], torch.full_like(x[:, :1], 3)], 1),
}


@pytest.mark.parametrize("share", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("name", SINGULAR)
def test_singular_sums(name, share):
    x, y, weight = problem()
    x = SINGULAR[name](x)
    y = y[: len(x)]
    gram = gram_of(x, y)
    found = ridge(gram, weight, share)
    assert bool(found.isfinite().all())
    assert bool((direct_error(x, y, found) <= direct_error(x, y, weight) * (1 + 1e-9) + 1e-9).all())
    quantizer = weight_quantizer(found[:, :-1], QuantSpec(3, axis=0))
    quantizer, codes, bias = round_compensated(gram, found, quantizer, share)
    assert bool(torch.cat([codes.flatten(), bias, quantizer.scale]).isfinite().all())


def test_search_takes_what_is_best_on_other_images():
    x, y, weight = problem(tokens=60, inputs=30)
    start = weight + 0.3 * torch.randn(6, 31, generator=torch.Generator().manual_seed(1)).double()
    halves = [(x[i::2], y[i::2]) for i in range(2)]
    folds = [gram_of(*half) for half in halves]
    held = {s: sum(direct_error(*halves[i], ridge(folds[1 - i], start, s)).sum() for i in range(2)) for s in SHARES}
    assert search_ridge(folds, start) == min(held, key=held.__getitem__)
    assert len({float(value) for value in held.values()}) == len(SHARES)


def test_search_takes_none_where_nothing_helps():
    x, _, weight = problem()
    exact = with_ones(x) @ weight.T
    assert search_ridge([gram_of(x[::2], exact[::2]), gram_of(x[1::2], exact[1::2])], weight) is None
    noisy = exact + 50 * torch.randn(300, 6, generator=torch.Generator().manual_seed(2)).double()
    folds = [gram_of(x[i : 12 + i : 2], noisy[i : 12 + i : 2]) for i in range(2)]
    assert search_ridge(folds, weight, shares=(1e-6,)) is None


def nearest(weight: Tensor, bits: int):
    quantizer = weight_quantizer(weight[:, :-1], QuantSpec(bits, axis=0))
    return quantizer, torch.cat([quantizer(weight[:, :-1]), weight[:, -1:]], 1)


def rounded(x: Tensor, y: Tensor, weight: Tensor, bits: int, share: float = 1e-4, flips: int = 100):
    quantizer, plain = nearest(weight, bits)
    new, codes, bias = round_compensated(gram_of(x, y), weight, quantizer, share, flips)
    return plain, new, codes, torch.cat([new.dequantize(codes), bias[:, None]], 1)


@pytest.mark.parametrize("flips", [0, 5, 100])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_with_compensation_beats_nearest(bits, flips):
    x, _, weight = problem(inputs=24)
    y = with_ones(x) @ weight.T
    plain, quantizer, codes, new = rounded(x, y, weight, bits, flips=flips)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= quantizer.spec.qmin
    assert codes.max() <= quantizer.spec.qmax
    assert direct_error(x, y, new).sum() < (0.5 if flips == 100 else 0.8) * direct_error(x, y, plain).sum()


def test_two_grids():
    """A few large columns: better than one grid by far, and the scale that is fitted last is optimal."""
    x, _, weight = problem(inputs=24)
    weight[:, [3, 17]] *= 8
    y, outlier = with_ones(x) @ weight.T, torch.zeros(24, dtype=torch.bool)
    outlier[[3, 17]] = True
    parts = [weight_quantizer(weight[:, :-1][:, columns], QuantSpec(3, axis=0)) for columns in (~outlier, outlier)]
    grids = (torch.stack([getattr(part, name) for part in parts], 1) for name in ("scale", "zero_point"))
    quantizer, codes, bias = round_compensated(gram_of(x, y), weight, DualQuantizer(QuantSpec(3, axis=0), *grids, outlier), 1e-4)
    assert isinstance(quantizer, DualQuantizer)
    assert codes.min() >= 0
    assert codes.max() <= 7
    values = quantizer.dequantize(codes)
    best = direct_error(x, y, torch.cat([values, bias[:, None]], 1))
    assert best.sum() < 0.5 * direct_error(x, y, rounded(x, y, weight, 3)[-1]).sum()
    for factor in (0.99, 1.01):
        moved = torch.where(outlier, values * factor, values)
        other = (y - x @ moved.T).mean(0)
        assert bool((direct_error(x, y, torch.cat([moved, other[:, None]], 1)) >= best * (1 - 1e-6)).all())


def test_against_all_codes():
    """Three weights of two bits: all 64 codes of each row, each with its best bias."""
    x, _, weight = problem(inputs=3)
    y = with_ones(x) @ weight.T
    _, quantizer, _, new = rounded(x, y, weight, 2)
    grid = torch.cartesian_prod(*[torch.arange(4.0).double()] * 3)
    centered, wanted, best = x - x.mean(0), y - y.mean(0), 0.0
    for row in range(6):
        values = (grid - quantizer.zero_point[row]) * quantizer.scale[row]
        best += float((wanted[:, row : row + 1] - centered @ values.T).square().sum(0).min())
    assert best <= direct_error(x, y, new).sum() <= 1.3 * best


def test_bias_and_scales_are_optimal_at_the_end():
    x, y, weight = problem()
    new = rounded(x, y, weight, 3)[-1]
    wanted = with_ones(x) @ weight.T  # what the rounding comes close to
    torch.testing.assert_close((wanted - with_ones(x) @ new.T).mean(0), torch.zeros(6).double(), rtol=0, atol=1e-9)
    best = direct_error(x, wanted, new)
    for factor in (0.99, 1.01):
        values = new[:, :-1] * factor
        bias = (wanted - x @ values.T).mean(0)
        assert bool((direct_error(x, wanted, torch.cat([values, bias[:, None]], 1)) >= best * (1 - 1e-6)).all())


def test_refinement_falls_until_no_flip_helps():
    x, _, weight = problem(inputs=12)
    left = x.T @ x
    quantizer, _ = nearest(torch.cat([weight, weight[:, :2]], 1)[:, :13], 3)
    real = torch.cat([weight, weight[:, :2]], 1)[:, :12]
    scale, zero = (part[:, None].expand_as(real) for part in (quantizer.scale, quantizer.zero_point))
    ladder = Ladder(0, 7)

    def loss(codes: Tensor) -> Tensor:
        error = ladder.values(codes, scale, zero) - real
        return (error @ left * error).sum(1)

    start = ladder.nearest(real, scale, zero)
    losses = [loss(refine(start, real, scale, zero, left, ladder, flips)) for flips in (0, 1, 2, 5, 1000)]
    assert torch.equal(losses[0], loss(start))
    assert all(bool((after <= before * (1 + 1e-12)).all()) for before, after in itertools.pairwise(losses))
    codes = refine(start, real, scale, zero, left, ladder, 1000)
    for column in range(12):
        for step in (-1, 1):
            other = codes.clone()
            other[:, column] += step
            allowed = (other[:, column] >= 0) & (other[:, column] <= 7)
            assert bool((loss(other) >= loss(codes) * (1 - 1e-6))[allowed].all())


@pytest.mark.parametrize("share", [1e-4, 0.1])
def test_the_columns_left_make_up_for_those_rounded_in_closed_form(monkeypatch, share):
    """``w2' = w2 - (A22 + lambda I)^-1 A21 (q1 - w1)``, block by block, the bias among the columns left."""
    x, y, weight = problem(inputs=24)
    gram, blocks = gram_of(x, y), []

    def refined(codes, block, scale, zero, *rest):
        found = refine(codes, block, scale, zero, *rest)
        if sum(part.shape[1] for part, _ in blocks) < 24:  # those of the final rounds come behind
            blocks.append((block.clone(), Ladder.values(found, scale, zero)))
        return found

    monkeypatch.setattr(erq, "refine", refined)
    rounded(x, y, weight, 3, share)
    a, damping = gram.a, share * gram.a.diagonal().mean() * torch.eye(25, dtype=torch.float64)
    real, done = weight.clone(), 0
    for block, values in blocks:
        cut = done + block.shape[1]
        assert cut == done + (25 - done) // 2
        torch.testing.assert_close(block, real[:, done:cut], rtol=1e-9, atol=1e-9)
        made_up = torch.linalg.solve(a[cut:, cut:] + damping[cut:, cut:], a[cut:, done:cut])
        real[:, cut:] -= (values - block) @ made_up.T
        done = cut
    assert done == 24


def test_the_error_falls_from_step_to_step(monkeypatch):
    """What is left of the rounding, by rounds of codes, scales and bias at the end."""
    x, y, weight = problem(inputs=24)
    gram = gram_of(x, y)
    real = ridge(gram, weight, 1e-4)
    assert bool((gram.error(real) <= gram.error(weight)).all())
    wanted, errors = with_ones(x) @ real.T, []
    for rounds in range(6):
        monkeypatch.setattr(erq, "_ROUNDS", rounds)
        errors.append(direct_error(x, wanted, rounded(x, y, real, 3, flips=3)[-1]))
    assert all(bool((after <= before * (1 + 1e-9)).all()) for before, after in itertools.pairwise(errors))
    assert errors[-1].sum() < 0.95 * errors[0].sum()


def test_order_of_columns_does_not_matter():
    """For the share of the ridge, and for the flips. (Which columns make up for which does depend on their order.)"""
    x, y, weight = problem(inputs=12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    both = torch.cat([order, torch.tensor([12])])
    halves = [slice(0, None, 2), slice(1, None, 2)]
    shares = [search_ridge([gram_of(a[half], y[half]) for half in halves], b) for a, b in ((x, weight), (x[:, order], weight[:, both]))]
    assert shares[0] == shares[1]
    quantizer, _ = nearest(weight, 3)
    ladder, real, left = Ladder(0, 7), weight[:, :-1], x.T @ x
    scale, zero = (part[:, None].expand_as(real) for part in (quantizer.scale, quantizer.zero_point))
    start = ladder.nearest(real, scale, zero)
    codes = refine(start, real, scale, zero, left, ladder, 50)
    mixed = refine(start[:, order], real[:, order], scale, zero, left[order][:, order], ladder, 50)
    assert torch.equal(mixed, codes[:, order])
    assert not torch.equal(codes, start)


def test_memory_does_not_grow_with_tokens():
    assert gram_bytes(1536, 384) < 2**28
    gram = Gram.empty(3, 2)
    sizes = gram.a.shape, gram.b.shape, gram.c.shape
    gram.add(torch.randn(1000, 3), torch.randn(1000, 2))
    assert (gram.a.shape, gram.b.shape, gram.c.shape) == sizes
