"""Lloyd's k-means in plain torch: the definition of correct (docs/svg2.md, section 5).

Every function treats one (batch item, head) and reads no value on the host. Computation is in float32, or in
float64 for float64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.kmeans.stratified import one_of_each_stratum
from sparse_compile.kernels.permutation.reference import sort_labels
from sparse_compile.kernels.precision import compute_dtype, copied

SCORES_AT_ONCE = 2**24
STOPS_AT_FIXED_POINT = False


def countable(x: Tensor) -> Tensor:
    """Which tokens may enter scores and means: bool [S] for x [S, D].

    A token is left out when a component is not finite, or when its squared norm comes so near the largest
    number that scores could overflow. Hence every score against centroids made of the other tokens is finite.
    """
    compute = compute_dtype(x.dtype)
    squares = x.to(compute).square().sum(-1)
    return squares < torch.finfo(compute).max / 16


def scoring_operands(centroids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Centroids as the matrix product sees them, and their squared norms: [C, D] and [C].

    Rounded to ``dtype`` first; the norms are those of the rounded values (docs/svg2.md, section 5.1). A centroid
    whose norm overflows is never the nearest one: its norm is inf and its products are 0 rather than NaN.
    """
    compute = compute_dtype(dtype)
    rounded = copied(centroids, dtype).to(compute)
    norms = rounded.square().sum(-1)
    reachable = torch.isfinite(norms)
    infinity = norms.new_full((), float("inf"))
    return torch.where(reachable.unsqueeze(-1), rounded, 0), torch.where(reachable, norms, infinity)


def assign(x: Tensor, centroids: Tensor, included: Tensor) -> Tensor:
    """Label each token with its nearest centroid: argmin_j |c_j|^2 - 2 x.c_j, ties to the lowest j.

    Shapes: x [S, D]; centroids [C, D], rounded to x's dtype here; included bool [S].
    Returns: int32 [S]; 0 for a token that is not included.
    """
    rounded, norms = scoring_operands(centroids, x.dtype)
    rows = max(1, SCORES_AT_ONCE // max(1, centroids.shape[0]))
    labels = [
        torch.addmm(norms, copied(part, rounded.dtype), rounded.t(), alpha=-2).argmin(-1)
        for part in torch.split(x, rows)
    ]
    return torch.where(included, torch.cat(labels), 0).to(torch.int32)


def update(x: Tensor, labels: Tensor, included: Tensor, centroids: Tensor) -> Tensor:
    """Mean of the included tokens of each label; a label without any keeps its centroid.

    Sums run in token order in float64, where a million terms still round to the right float32. (In float32
    even 4096 equal terms drift by more than the budget of docs/svg2.md, section 15.)

    Shapes: x [S, D]; labels int32 [S]; included bool [S]; centroids [C, D].
    Returns: [C, D] in float32 (float64 for float64 inputs), always finite if ``centroids`` are.
    """
    clusters = centroids.shape[0]
    binned = torch.where(included, labels, clusters).to(torch.int32)
    order, offsets = sort_labels(binned.view(1, 1, -1), clusters + 1)
    sums = torch.nn.functional.embedding_bag(
        order.view(-1), copied(x, torch.float64), offsets.view(-1), mode="sum", include_last_offset=True
    )
    return means_of_sums(sums[:clusters], offsets.view(-1).diff()[:clusters], centroids)


def means_of_sums(sums: Tensor, counts: Tensor, centroids: Tensor) -> Tensor:
    """Divide sums [C, D] by counts [C]; where a count is 0, take the previous centroid."""
    means = (sums / counts.clamp(min=1).unsqueeze(-1)).to(compute_dtype(centroids.dtype))
    return torch.where((counts > 0).unsqueeze(-1), means, centroids.to(means.dtype))


def stratified_sample(x: Tensor, included: Tensor, clusters: int, seed: int, role: str, head: int) -> Tensor:
    """Take one included token from each of ``clusters`` equal strata of the included tokens (section 5.2).

    The place within a stratum is a hash of (seed, role, head, stratum), so a batch equals its items and a
    repeated generation repeats. With fewer tokens than strata some are taken twice. Without any, the sample
    is 0.

    Shapes: x [S, D]; included bool [S]. Returns: [C, D] in x's dtype.
    """
    if x.shape[0] == 0:
        return x.new_zeros((clusters, x.shape[1]))
    token, occupied = one_of_each_stratum(included, clusters, seed, 0 if role == "query" else 1, head)
    return torch.where(occupied.any(), x.index_select(0, token), 0)
