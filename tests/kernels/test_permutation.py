from __future__ import annotations

import pytest
import torch

from sparse_compile.kernels.permutation.reference import sort_labels


@pytest.mark.parametrize("tokens", [0, 1, 63, 65, 1000])
@pytest.mark.parametrize("groups", [1, 7, 40])
def test_order_sorts_labels_and_keeps_the_order_inside_a_group(tokens, groups):
    generator = torch.Generator().manual_seed(tokens + groups)
    labels = torch.randint(groups, (2, 3, tokens), generator=generator, dtype=torch.int32)
    order, offsets = sort_labels(labels, groups)
    assert order.dtype == offsets.dtype == torch.int32
    assert order.shape == labels.shape and offsets.shape == (2, 3, groups + 1)
    for b in range(2):
        for h in range(3):
            row = labels[b, h].tolist()
            assert order[b, h].tolist() == sorted(range(tokens), key=lambda token: (row[token], token))
            assert offsets[b, h].diff().tolist() == [row.count(group) for group in range(groups)]
            assert offsets[b, h, 0] == 0 and offsets[b, h, -1] == tokens


def test_strided_labels_sort_like_contiguous_ones():
    labels = torch.arange(24, dtype=torch.int32).view(2, 4, 3).remainder(5).transpose(1, 2)
    strided, contiguous = sort_labels(labels, 5), sort_labels(labels.contiguous(), 5)
    assert all(torch.equal(a, b) for a, b in zip(strided, contiguous, strict=True))
