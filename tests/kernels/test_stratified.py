from __future__ import annotations

import pytest
import torch

from sparse_compile.kernels.kmeans.stratified import one_of_each_stratum, one_of_each_stratum_of_heads


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("tokens", "strata", "share"), [(100, 7, 0.5), (5, 12, 1.0), (1, 3, 0.0), (200, 64, 0.1)])
def test_strata_of_all_heads_at_once_are_those_of_each_head(tokens, strata, share, shared):
    included = torch.rand(2, 1 if shared else 3, tokens, generator=torch.Generator().manual_seed(0)) < share
    token, occupied = one_of_each_stratum_of_heads(included, strata, 2**33 + 5, 1, 3)
    for b in range(2):
        for h in range(3):
            expected = one_of_each_stratum(included[b, 0 if shared else h], strata, 2**33 + 5, 1, h)
            assert torch.equal(token[b, h], expected[0]) and torch.equal(occupied[b, h], expected[1])
