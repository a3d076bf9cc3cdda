"""Cluster-based affine transformation of logits: the last, cheapest and most optional correction of a quantized classifier."""

from fxquant.cat.fit import fit_cat
from fxquant.cat.kmeans import KMeans, kmeans
from fxquant.cat.module import CAT
from fxquant.cat.pca import fit_pca
from fxquant.cat.select import Candidate, CATChoice, default_candidates, select_cat

__all__ = ["CAT", "CATChoice", "Candidate", "KMeans", "default_candidates", "fit_cat", "fit_pca", "kmeans", "select_cat"]
