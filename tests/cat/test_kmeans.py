import sys

import pytest
import torch
from sklearn.cluster import KMeans as Oracle

from fxquant.cat.kmeans import _lloyd, kmeans
from fxquant.errors import CATError


def cloud(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "d", "k"), [(400, 2, 5), (600, 10, 16), (500, 50, 64)])
def test_inertia_is_as_good_as_scikit_learn(n, d, k):
    x = cloud(n, d) * torch.linspace(3, 1, d) + 100
    oracle = Oracle(k, n_init=4, random_state=0).fit(x.numpy())
    assert kmeans(x, k, seed=0).inertia <= oracle.inertia_ * 1.01


def test_separated_blobs_are_found():
    truth = torch.arange(5).repeat_interleave(20)
    x = cloud(100, 3) * 0.1 + cloud(5, 3, seed=1)[truth] * 20
    found = kmeans(x, 5, seed=3)
    assert len(found.labels[::20].unique()) == 5
    assert torch.equal(found.labels, found.labels[::20].repeat_interleave(20))


def test_result_is_consistent():
    x = cloud(300, 4)
    found = kmeans(x, 7, seed=0)
    distance = (x[:, None] - found.centers).square().sum(2)
    assert torch.equal(distance.argmin(1), found.labels)
    assert found.inertia == pytest.approx(distance.min(1).values.sum().item())
    for k in range(7):
        torch.testing.assert_close(found.centers[k], x[found.labels == k].mean(0))


def test_same_seed_same_bits():
    x = cloud(200, 6)
    one, two = kmeans(x, 9, seed=4), kmeans(x, 9, seed=4)
    assert torch.equal(one.centers, two.centers)
    assert torch.equal(one.labels, two.labels)


def test_chunks_do_not_matter(monkeypatch):
    x = cloud(200, 6)
    whole = kmeans(x, 5, seed=0)
    monkeypatch.setattr(sys.modules[kmeans.__module__], "CHUNK", 35)
    assert torch.equal(kmeans(x, 5, seed=0).labels, whole.labels)


def test_no_more_clusters_than_distinct_points():
    x = cloud(3, 4).repeat(10, 1) + 50
    found = kmeans(x, 8, seed=0)
    assert len(found.centers) == 3
    assert torch.equal(found.labels, found.labels[:3].repeat(10))
    assert found.inertia == pytest.approx(0, abs=1e-9)


def test_empty_cluster_is_moved_to_the_farthest_point():
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0], [100.0]], dtype=torch.float64)
    found = _lloyd(x, torch.tensor([[0.5], [10.5], [-1000.0]], dtype=torch.float64), 100)
    assert found.centers.flatten().sort().values.tolist() == [0.5, 10.5, 100]


def test_too_few_points_say_what_to_do():
    with pytest.raises(CATError, match=r"3 images are fewer than 4 clusters\. Ask for fewer clusters, or give more images"):
        kmeans(cloud(3, 2), 4, seed=0)
