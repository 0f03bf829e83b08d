"""Lloyd's k-means for CPU tensors: the reference's arithmetic with less memory traffic (docs/svg2.md, section 5).

Here host reads are free, so the driver stops at a fixed point, which changes no bit of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.kmeans.reference import (
    countable,
    means_of_sums,
    scoring_operands,
    stratified_sample,
)
from sparse_compile.kernels.precision import copied

__all__ = ["STOPS_AT_FIXED_POINT", "assign", "countable", "stratified_sample", "update"]

SCORES_AT_ONCE = 2**18
"""One megabyte of float32 scores: they stay in the second-level cache between the product and the argmin."""
TOKENS_AT_ONCE = 4096
STOPS_AT_FIXED_POINT = True


def assign(x: Tensor, centroids: Tensor, included: Tensor) -> Tensor:
    """As `reference.assign`, in blocks that fit the cache."""
    rounded, norms = scoring_operands(centroids, x.dtype)
    transposed = rounded.t().contiguous()
    tokens, clusters = x.shape[0], centroids.shape[0]
    rows = min(max(64, SCORES_AT_ONCE // max(1, clusters)), max(1, tokens))
    scores = rounded.new_empty((rows, clusters))
    labels = torch.empty((tokens,), dtype=torch.int64)
    for start in range(0, tokens, rows):
        part = copied(x[start : start + rows], rounded.dtype)
        block = scores[: part.shape[0]]
        torch.addmm(norms, part, transposed, alpha=-2, out=block)
        torch.argmin(block, dim=-1, out=labels[start : start + rows])
    return torch.where(included, labels, 0).to(torch.int32)


def update(x: Tensor, labels: Tensor, included: Tensor, centroids: Tensor) -> Tensor:
    """As `reference.update`, without a sort: one pass over the tokens in their own order."""
    clusters = centroids.shape[0]
    binned = torch.where(included, labels, clusters).to(torch.int64)
    sums = torch.zeros((clusters + 1, x.shape[1]), dtype=torch.float64)
    for part, bins in zip(torch.split(x, TOKENS_AT_ONCE), torch.split(binned, TOKENS_AT_ONCE), strict=True):
        sums.index_add_(0, bins, part.double())
    counts = torch.bincount(binned, minlength=clusters + 1)
    return means_of_sums(sums[:clusters], counts[:clusters], centroids)
