import copy

import pytest
import torch
from torch import nn

from fxquant.cat import CAT


def make(clusters=5, classes=7, alpha=0.4, dtype=torch.float32, pca=3):
    g = torch.Generator().manual_seed(0)
    r = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    gamma, beta = r(clusters, classes), r(clusters, classes)
    if pca == 0:
        return CAT.from_clusters(gamma, beta, alpha, r(clusters, classes), dtype=dtype), None
    centers, mean, components = r(clusters, pca), r(classes), torch.linalg.qr(r(classes, pca))[0]
    return CAT.from_clusters(gamma, beta, alpha, centers, mean, components, dtype), (centers, mean, components)


def images(n=50, classes=7, dtype=torch.float32):
    return torch.randn(n, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def test_folded_search_is_the_nearest_centroid_of_the_pca_features():
    cat, (centers, mean, components) = make(dtype=torch.float64)
    q = images(dtype=torch.float64)
    k = torch.cdist((q - mean) @ components, centers).argmin(1)
    assert len(k.unique()) == 5
    assert torch.equal(cat.assign(q), k)
    torch.testing.assert_close(cat(q), q + 0.4 * (cat.gamma[k] * q + cat.beta[k] - q))


def test_without_pca_centroids_live_among_the_logits():
    cat, _ = make(pca=0, dtype=torch.float64)
    q = images(dtype=torch.float64)
    centers = cat.project.T
    assert torch.equal(cat.assign(q), torch.cdist(q, centers).argmin(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clusters", [1, 5])
def test_compiles_and_exports_with_dynamic_batch(clusters, dtype):
    cat, _ = make(clusters, dtype=dtype)
    compiled = torch.compile(cat, fullgraph=True, backend="aot_eager", dynamic=True)
    exported = torch.export.export(cat, (images(4, dtype=dtype),), dynamic_shapes={"logits": {0: torch.export.Dim("n")}}).module()
    for n in (1, 9):
        q = images(n, dtype=dtype)
        assert cat(q).dtype == dtype
        assert cat(q).shape == (n, 7)
        torch.testing.assert_close(compiled(q), cat(q))
        torch.testing.assert_close(exported(q), cat(q))


def test_one_cluster_needs_no_search_and_folds_into_the_classifier():
    cat, _ = make(1, 7)
    head = nn.Linear(4, 7)
    x = torch.randn(6, 4)
    expected = cat(head(x))
    gamma, beta = cat.affine()
    head.weight.data.mul_(gamma[0][:, None])
    head.bias.data.mul_(gamma[0]).add_(beta[0])
    torch.testing.assert_close(head(x), expected)
    exported = torch.export.export(cat, (images(4),))
    assert not any("argmax" in str(node.target) for node in exported.graph.nodes)


def test_affine_blends_alpha_for_every_cluster():
    cat, _ = make()
    gamma, beta = cat.affine()
    q = images()
    k = cat.assign(q)
    torch.testing.assert_close(gamma[k] * q + beta[k], cat(q))


@pytest.mark.parametrize("cat", [CAT.identity(7), CAT(7, 4), make(alpha=0.0)[0]])
def test_identities_change_nothing(cat):
    assert torch.equal(cat(images()), images())


def test_sizes_rebuild_an_empty_one_for_a_state_dict():
    cat, _ = make(dtype=torch.float64)
    empty = CAT(cat.classes, cat.clusters, dtype=torch.float64)
    empty.load_state_dict(cat.state_dict())
    q = images(dtype=torch.float64)
    assert torch.equal(empty(q), cat(q))
    assert (empty.classes, empty.clusters) == (7, 5)
    assert not list(cat.parameters())


def test_copies_and_prints():
    cat, _ = make()
    copied = copy.deepcopy(cat)
    cat.beta.zero_()
    assert copied.beta.abs().sum() > 0
    assert repr(copied) == "CAT(classes=7, clusters=5, alpha=0.4)"
    assert repr(cat.to("meta")) == "CAT(classes=7, clusters=5, alpha=?)"


def test_double_follows_to():
    cat, _ = make()
    q = images(dtype=torch.float64)
    torch.testing.assert_close(cat.double()(q), make(dtype=torch.float64)[0](q), rtol=1e-5, atol=1e-5)
