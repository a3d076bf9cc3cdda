import pytest
import torch
from sklearn.decomposition import PCA

from fxquant.cat import fit_pca


@pytest.mark.parametrize(("n", "c"), [(200, 12), (30, 40), (20, 20)])
def test_features_agree_with_scikit_learn(n, c):
    x = torch.randn(n, c, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1, c + 1) + 7
    mean, components = fit_pca(x, 5)
    oracle = PCA(5, svd_solver="full").fit(x.numpy())
    torch.testing.assert_close(mean, torch.from_numpy(oracle.mean_))
    signs = (components * torch.from_numpy(oracle.components_.T)).sum(0).sign()
    torch.testing.assert_close(components * signs, torch.from_numpy(oracle.components_.T), rtol=0, atol=1e-8)


def test_gram_matrix_and_covariance_give_the_same_components():
    x = torch.randn(11, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wide = torch.cat([x, torch.zeros(11, 5)], 1)  # five constant classes turn the same cloud into the N < C case
    torch.testing.assert_close(fit_pca(wide, 4)[1][:10], fit_pca(x, 4)[1], rtol=0, atol=1e-9)


def test_largest_entry_of_every_component_is_positive():
    _, components = fit_pca(torch.randn(50, 8, generator=torch.Generator().manual_seed(2)), 8)
    assert (components.gather(0, components.abs().argmax(0, keepdim=True)) > 0).all()


LINE = torch.arange(8.0)[:, None] * torch.ones(5)


@pytest.mark.parametrize(("x", "rank"), [(torch.eye(4, 30), 3), (torch.ones(9, 3), 0), (LINE, 1)])
def test_dim_is_clipped_to_the_rank(x, rank):
    mean, components = fit_pca(x, 10)
    assert mean.shape == x.shape[1:]
    assert components.shape == (x.shape[1], rank)
    torch.testing.assert_close(components.T @ components, torch.eye(rank, dtype=torch.float64))
