from itertools import pairwise

import pytest
import torch

from fxquant.cat import CAT, fit_cat
from fxquant.cat.fit import FITS, fit_divergence, fit_moments, fit_squares
from fxquant.errors import CATError
from fxquant.metrics import kl_divergence

DOUBLE = torch.float64


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def blobs(n=60, classes=6, count=4):
    """Student logits in `count` far-apart blobs, their labels, and a teacher that is affine in the student per blob and class."""
    labels = torch.arange(count).repeat(n // count)
    q = randn(n, classes) + 30 * randn(count, classes, seed=1)[labels]
    gamma, beta = 1 + randn(count, classes, seed=2) / 4, randn(count, classes, seed=3)
    return q, gamma[labels] * q + beta[labels], labels, gamma, beta


def noisy(n=200, classes=8, noise=0.7):
    """A teacher that is sure of itself, and a student that is too loud and off in some classes."""
    f = 3 * randn(n, classes)
    return f * torch.linspace(1, 2.5, classes) + torch.linspace(-1, 1, classes) + noise * randn(n, classes, seed=1), f


def mean_kl(cat, q, f):
    return kl_divergence(cat(q), f).mean().item()


def test_moments_by_hand():
    q = torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 0.0]], dtype=DOUBLE)
    f = torch.tensor([[1.0, 4.0], [5.0, 6.0], [7.0, 7.0]], dtype=DOUBLE)
    gamma, beta = fit_moments(q, f, torch.tensor([0, 0, 2]), 3)
    # Cluster 0, class 0: cov = 2, var = 1. Class 1 does not vary: 0 / 1e-8. Cluster 1 is empty; cluster 2 has one image.
    assert gamma.tolist() == [[2, 0], [1, 1], [0, 0]]
    assert beta.tolist() == [[1, 5], [0, 0], [7, 7]]


def test_moments_clamp_the_biased_variance():
    q = torch.tensor([[0.0], [2e-5]], dtype=DOUBLE)  # var = 1e-10, cov with f = 1e-5 / 2 * 1
    gamma, _ = fit_moments(q, torch.tensor([[0.0], [1.0]], dtype=DOUBLE), torch.zeros(2, dtype=torch.long), 1)
    assert gamma.item() == pytest.approx(5e-6 / 1e-8)


@pytest.mark.parametrize("fit", ["moments", "ridge"])
def test_recovers_a_teacher_that_is_affine_by_cluster(fit):
    q, f, labels, gamma, beta = blobs()
    cat = fit_cat(q, f, fit=fit, clusters=4, pca=3, alpha=1.0, shrinkage=0)
    torch.testing.assert_close(cat(q), f, rtol=0, atol=1e-4)
    found = cat.assign(q)[:4]
    assert torch.equal(found[labels], cat.assign(q))
    torch.testing.assert_close(cat.gamma[found], gamma, rtol=0, atol=1e-4)
    torch.testing.assert_close(cat.beta[found], beta, rtol=0, atol=1e-3)


def test_kl_recovers_a_softmax_that_is_affine_by_cluster():
    q = randn(400, 3)
    f = q * torch.tensor([0.5, 1.0, 2.0]) + torch.tensor([1.0, 0.0, -1.0])
    cat = fit_cat(q, f, fit="kl", clusters=1, alpha=1.0, shrinkage=0)
    torch.testing.assert_close(cat(q).softmax(1), f.softmax(1), rtol=0, atol=1e-4)


def test_alpha_is_the_share_of_the_way():
    q, f, *_ = blobs()
    torch.testing.assert_close(fit_cat(q, f, clusters=4, pca=3)(q), q + 0.4 * (f - q), rtol=0, atol=1e-5)
    assert torch.equal(fit_cat(q, f, clusters=4, alpha=0.0)(q), q)


def test_ridge_by_hand():
    x, f = torch.tensor([[1.0], [3.0]], dtype=DOUBLE), torch.tensor([[2.0], [5.0]], dtype=DOUBLE)
    prior = torch.tensor([[1.0]], dtype=DOUBLE), torch.tensor([[0.0]], dtype=DOUBLE)
    a, b = fit_squares(x, f, torch.zeros(2, dtype=torch.long), 2.0, *prior)
    # r = (1, 2): [[12, 4], [4, 4]] (da, db) = (7, 3)
    assert (a.item(), b.item()) == (pytest.approx(1.5), pytest.approx(0.25))


def test_no_shrinkage_is_least_squares():
    q, f = noisy()
    cat = fit_cat(q, f, fit="ridge", clusters=1, alpha=1.0, shrinkage=0)
    for c in range(q.shape[1]):
        design = torch.stack([q[:, c], torch.ones_like(q[:, c])], 1)
        solution = torch.linalg.lstsq(design, f[:, c, None]).solution[:, 0]
        torch.testing.assert_close(torch.stack([cat.gamma[0, c], cat.beta[0, c]]), solution, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clusters", [1, 4])
@pytest.mark.parametrize("fit", ["ridge", "kl"])
def test_infinite_shrinkage_is_the_identity(fit, clusters):
    q, f = noisy()
    cat = fit_cat(q, f, fit=fit, clusters=clusters, pca=3, alpha=1.0, shrinkage=1e12)
    torch.testing.assert_close(cat(q), q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("solve", [fit_squares, fit_divergence])
def test_more_shrinkage_stays_nearer_to_the_prior_and_small_clusters_most(solve):
    q, f = noisy()
    labels = (torch.arange(len(q)) < 20).long()  # 180 images in cluster 0, 20 in cluster 1
    prior = torch.full((2, 8), 0.5, dtype=DOUBLE), torch.full((2, 8), 0.25, dtype=DOUBLE)
    way = []
    for tau in (1e-3, 1.0, 16.0, 256.0):
        a, b = solve(q, f, labels, tau, *prior)
        way.append(((a - prior[0]).square() + (b - prior[1]).square()).sum(1))
    assert all((near < far).all() for far, near in pairwise(way))
    large, small = way[2] / way[0]
    assert small < large


@pytest.mark.parametrize("solve", [fit_squares, fit_divergence])
def test_empty_cluster_gets_the_global_fit(solve):
    q, f = noisy()
    a0, b0 = torch.full((3, 8), 0.5, dtype=DOUBLE), torch.full((3, 8), 0.25, dtype=DOUBLE)
    a, b = solve(q, f, torch.arange(len(q)) % 2 * 2, 4.0, a0, b0)
    torch.testing.assert_close(torch.stack([a[1], b[1]]), torch.stack([a0[1], b0[1]]))
    assert (a[0] - a0[0]).abs().max() > 0.01


@pytest.mark.parametrize("tau", [0.1, 16.0])
def test_kl_fit_is_a_stationary_point(tau):
    q, f = noisy()
    labels = torch.arange(len(q)) % 3
    a0, b0 = torch.ones(3, 8, dtype=DOUBLE), torch.zeros(3, 8, dtype=DOUBLE)
    a, b = (t.requires_grad_() for t in fit_divergence(q, f, labels, tau, a0, b0))
    loss = kl_divergence(a[labels] * q + b[labels], f).sum() + tau / 8 * ((a - a0).square() + (b - b0).square()).sum()
    loss.backward()
    assert max(a.grad.abs().max(), b.grad.abs().max()) < 1e-5


@pytest.mark.parametrize("clusters", [1, 4])
def test_kl_fit_has_less_kl_than_the_others(clusters):
    q, f = noisy()
    kl = {fit: mean_kl(fit_cat(q, f, fit=fit, clusters=clusters, pca=3, alpha=1.0, shrinkage=0.01), q, f) for fit in FITS}
    assert kl["kl"] < min(kl["moments"], kl["ridge"], kl_divergence(q, f).mean().item())


def test_temperature_alone_mends_loud_logits_of_many_classes():
    f = 2 * randn(100, 300)
    cat = fit_cat(3 * f, f, fit="kl", clusters=1, alpha=1.0)
    assert mean_kl(cat, 3 * f, f) < 0.02 * kl_divergence(3 * f, f).mean()


@pytest.mark.parametrize("fit", FITS)
def test_classes_have_no_order(fit):
    q, f = noisy()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    plain, permuted = (fit_cat(*logits, fit=fit, clusters=4, pca=3) for logits in ((q, f), (q[:, order], f[:, order])))
    torch.testing.assert_close(permuted(q[:, order]), plain(q)[:, order], rtol=0, atol=1e-4)


@pytest.mark.parametrize("fit", FITS)
def test_same_seed_same_bits(fit):
    q, f = (t.float() for t in noisy())
    one, two = (fit_cat(q, f, fit=fit, clusters=8, pca=4, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("pca", [None, 0, 8, 50])
def test_clusters_logits_themselves_without_pca(pca):
    q, f = noisy()
    cat = fit_cat(q, f, clusters=4, pca=pca)
    assert torch.equal(cat.assign(q), torch.cdist(q, cat.project.T).argmin(1))


@pytest.mark.parametrize("clusters", [1, 3])
@pytest.mark.parametrize("fit", FITS)
def test_degenerate_logits_stay_finite(fit, clusters):
    for q, f in (
        (torch.ones(20, 5), torch.randn(20, 5)),  # constant student
        (torch.randn(20, 1), torch.randn(20, 1)),  # one class
        (torch.cat([torch.randn(20, 4), torch.full((20, 1), 3.0)], 1), torch.randn(20, 5)),  # one constant class
    ):
        cat = fit_cat(q, f, fit=fit, clusters=clusters, pca=2, alpha=1.0)
        assert torch.isfinite(cat(q)).all()
        assert cat.clusters == (1 if (q == 1).all() else clusters)


def test_half_precision_logits_give_a_float_correction():
    q, f = (t.half() for t in noisy())
    cat = fit_cat(q, f, clusters=2, pca=3)
    assert isinstance(cat, CAT)
    assert cat.gamma.dtype == torch.float32


@pytest.mark.parametrize(
    ("q", "f", "arguments", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(5, 3), {}, r"student logits \[4, 3\] and teacher logits \[5, 3\] differ in shape"),
        (torch.zeros(4, 3, 2), torch.zeros(4, 3, 2), {}, r"CAT needs \[N, C\] logits, .* got \[4, 3, 2\]"),
        (torch.zeros(0, 3), torch.zeros(0, 3), {}, r"CAT needs \[N, C\] logits"),
        (torch.tensor([[0.0], [torch.nan]]), torch.zeros(2, 1), {}, "student logits are NaN .* 1 of 2 .* image 1"),
        (torch.zeros(2, 1), torch.tensor([[torch.inf], [0.0]]), {}, "teacher logits are NaN or infinite"),
        (torch.zeros(4, 3), torch.zeros(4, 3), {"clusters": 5}, "4 images are fewer than 5 clusters"),
        (torch.zeros(4, 3), torch.zeros(4, 3), {"clusters": 0}, "clusters=0 is not positive"),
        (torch.zeros(4, 3), torch.zeros(4, 3), {"fit": "mean"}, r"fit='mean' is unknown\. Write one of 'moments', 'ridge', 'kl'"),
        (torch.zeros(4, 3), torch.zeros(4, 3), {"shrinkage": -1.0}, r"shrinkage=-1\.0 is negative"),
    ],
)
def test_refuses_with_advice(q, f, arguments, message):
    with pytest.raises(CATError, match=message):
        fit_cat(q, f, **{"clusters": 2} | arguments)


def test_logits_on_the_tape_leave_it():
    student = torch.randn(40, 5, requires_grad=True)
    for fit, clusters in (("moments", 1), ("ridge", 2), ("kl", 2)):
        cat = fit_cat(student, 2 * student + 1, fit=fit, clusters=clusters, pca=2)
        assert not any(value.requires_grad for value in cat.buffers())
