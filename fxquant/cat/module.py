"""The inference side of CAT: one matrix product, one arg-max, one multiply-add.

    q  --->  k = nearest centroid of the PCA features of q  --->  q' = q + alpha (gamma_k * q + beta_k - q)

The features are u = (q - mean) P and the nearest centroid is the arg-min over k of

    |u - c_k|^2 = |u|^2 - 2 (u . c_k - |c_k|^2 / 2)

in which |u|^2 does not depend on k. So PCA, distances and arg-min fold into

    k = argmax_k (q M + b)_k        M = P c^T  [C, K]        b_k = -mean P c_k^T - |c_k|^2 / 2  [K]

and neither the components nor the centroids are kept. With K = 1 there is nothing to choose and the correction is an affine map
of every logit, which the classifier in front can absorb (see `CAT.affine`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CAT(nn.Module):
    """Correct logits ``[N, C]`` by the affine map of the cluster that they fall into (CAT, arXiv 2509.26277, inference step).

    ``CAT(classes, clusters)`` is the identity with buffers of the given sizes, ready for ``load_state_dict``; fitted ones come
    from `CAT.from_clusters` or `fxquant.cat.fit_cat`.

    Buffers: ``gamma``, ``beta`` ``[K, C]``; ``alpha`` scalar; ``project`` ``[C, K]`` and ``offset`` ``[K]`` (M and b above).
    """

    gamma: Tensor
    beta: Tensor
    alpha: Tensor
    project: Tensor
    offset: Tensor

    def __init__(self, classes: int, clusters: int = 1, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.register_buffer("gamma", torch.ones(clusters, classes, dtype=dtype))
        self.register_buffer("beta", torch.zeros(clusters, classes, dtype=dtype))
        self.register_buffer("alpha", torch.ones((), dtype=dtype))
        self.register_buffer("project", torch.zeros(classes, clusters, dtype=dtype))
        self.register_buffer("offset", torch.zeros(clusters, dtype=dtype))

    @classmethod
    def identity(cls, classes: int) -> CAT:
        """Return the correction that changes nothing, for ``classes`` logits."""
        return cls(classes)

    @classmethod
    def from_clusters(
        cls,
        gamma: Tensor,
        beta: Tensor,
        alpha: float = 1.0,
        centers: Tensor | None = None,
        mean: Tensor | None = None,
        components: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> CAT:
        """Fold PCA and centroids into a module; all products are taken in float64 before they are stored as ``dtype``.

        Args:
            gamma: factors ``[K, C]``.
            beta: shifts ``[K, C]``, in logits.
            alpha: share of the correction that is applied; 0 is the identity.
            centers: centroids ``[K, d]`` in feature space; not needed for ``K = 1``.
            mean: PCA mean ``[C]``; None with ``components`` None: the features are the logits and ``d = C``.
            components: PCA components ``[C, d]``.
            dtype: of the buffers, and so of the logits the module takes.
        """
        clusters, classes = gamma.shape
        module = cls(classes, clusters, dtype).to(gamma.device)
        module.gamma.copy_(gamma)
        module.beta.copy_(beta)
        module.alpha.fill_(alpha)
        if clusters > 1:
            assert centers is not None, "more than one cluster needs centers"
            centers = centers.double()
            project, origin = centers.T, torch.zeros_like(centers[:, 0])
            if components is not None and mean is not None:
                project = components.double() @ centers.T
                origin = mean.double() @ project
            module.project.copy_(project)
            module.offset.copy_(-origin - centers.square().sum(1) / 2)
        return module

    @property
    def clusters(self) -> int:
        """K, the number of affine maps."""
        return self.gamma.shape[0]

    @property
    def classes(self) -> int:
        """C, the number of logits."""
        return self.gamma.shape[1]

    def assign(self, logits: Tensor) -> Tensor:
        """Return the cluster ``[N]`` of every row of ``logits [N, C]``."""
        return torch.addmm(self.offset, logits, self.project).argmax(1)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return the effective ``(gamma, beta) [K, C]`` with alpha blended in: ``q' = gamma_k * q + beta_k``.

        For ``K = 1`` this folds into the classifier that makes the logits: ``W <- gamma[0][:, None] * W``,
        ``b <- gamma[0] * b + beta[0]``.
        """
        return 1 + self.alpha * (self.gamma - 1), self.alpha * self.beta

    def forward(self, logits: Tensor) -> Tensor:
        """Return the corrected logits ``[N, C]``."""
        gamma, beta = self.gamma, self.beta
        if self.clusters > 1:
            cluster = self.assign(logits)
            gamma, beta = gamma.index_select(0, cluster), beta.index_select(0, cluster)
        return logits + self.alpha * (gamma * logits + beta - logits)

    def extra_repr(self) -> str:
        alpha = "?" if self.alpha.is_meta else f"{self.alpha.item():g}"
        return f"classes={self.classes}, clusters={self.clusters}, alpha={alpha}"
