from __future__ import annotations

import itertools

import pytest
import torch
from kernel_oracles import IMPLEMENTATIONS, OPS, random_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_compile.kernels.token_blocks import reference

each_kernel = pytest.mark.parametrize("kernel", IMPLEMENTATIONS)

LAYOUTS = {
    "all-video": (60, [0, 60], 16),
    "text-first": (60, [13, 60], 16),
    "text-last": (223, [0, 210], 32),
    "text-on-both-sides": (70, [5, 64], 16),
    "video-in-two-pieces": (100, [10, 30, 47, 90], 8),
    "all-text": (40, [], 16),
    "whole-blocks": (64, [0, 48], 16),
    "one-token-blocks": (9, [2, 7], 1),
    "block-longer-than-the-sequence": (11, [0, 7], 64),
    "one-token": (1, [0, 1], 4),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)

MASKS = {
    "end": lambda n: [i < n - n // 5 for i in range(n)],
    "middle": lambda n: [not n // 4 <= i < n // 2 for i in range(n)],
    "scattered": lambda n: [i % 3 != 1 for i in range(n)],
    "nothing-valid": lambda n: [False] * n,
    "everything-valid": lambda n: [True] * n,
}


def blocks_of(tokens, video, block):
    """The blocks as lists of tokens, and whether each is visual: the definition, one token at a time."""
    visual = [sum(bound <= i for bound in video) % 2 == 1 for i in range(tokens)]
    blocks, kinds = [], []
    for i in range(tokens):
        at_border = i == 0 or i in video
        if at_border or len(blocks[-1]) == block:
            blocks.append([])
            kinds.append(visual[i])
        blocks[-1].append(i)
    return blocks, kinds


def token_blocks(layout, valid=None, *, batch=2, heads=(4, 2), kernel="cpu"):
    """The key side of the op is that of ``layout``; the query side is another one."""
    tokens, video, block = LAYOUTS[layout]
    q, k = random_tensor(batch, heads[0], 30, 4), random_tensor(batch, heads[1], tokens, 4)
    return OPS.token_blocks(q, k, None, valid, [3, 30], video, 8, block, kernel)


@each_kernel
@each_layout
def test_blocks_in_place_are_cut_at_every_border_and_end_in_an_empty_padding_group(kernel, layout):
    _, _, _, order, offsets, is_video = token_blocks(layout, kernel=kernel)
    blocks, kinds = blocks_of(*LAYOUTS[layout])
    stops = list(itertools.accumulate(len(members) for members in blocks))
    assert order.shape == (2, 2, 0)
    assert is_video.tolist() == [*kinds, False]
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [[[0, *stops, stops[-1]]] * 2] * 2


@each_kernel
@each_layout
@pytest.mark.parametrize("mask", MASKS)
def test_padding_goes_to_the_last_group_and_leaves_every_block_its_place(kernel, layout, mask):
    tokens = LAYOUTS[layout][0]
    valid = torch.tensor([MASKS[mask](tokens), [True] * tokens])
    _, _, _, order, offsets, is_video = token_blocks(layout, valid, kernel=kernel)
    blocks, kinds = blocks_of(*LAYOUTS[layout])
    assert is_video.tolist() == [*kinds, False]
    for item in range(2):
        padding = [i for i in range(tokens) if not valid[item, i]]
        expected = [[i for i in members if valid[item, i]] for members in blocks] + [padding]
        for head in range(2):
            bounds = offsets[item, head].tolist()
            grouped = order[item, head].tolist()
            assert [grouped[a:b] for a, b in itertools.pairwise(bounds)] == expected


@each_kernel
def test_one_mask_serves_every_batch_item(kernel):
    valid = torch.tensor([MASKS["scattered"](223)])
    one = token_blocks("text-last", valid, kernel=kernel)
    each = token_blocks("text-last", valid.expand(2, -1), kernel=kernel)
    assert all(torch.equal(a, b) for a, b in zip(one, each, strict=True))
    assert one[3].shape == (2, 2, 223)


@each_kernel
def test_queries_and_keys_are_cut_apart(kernel):
    q_order, q_offsets, q_is_video, *_ = token_blocks("text-last", kernel=kernel)
    assert q_order.shape == (2, 4, 0)
    assert q_offsets.tolist() == [[[0, 3, 11, 19, 27, 30, 30]] * 4] * 2
    assert q_is_video.tolist() == [False, True, True, True, True, False]


def op_args(kernel, layout, masks):
    tokens, video, block = LAYOUTS[layout]
    q, k = random_tensor(2, 4, 30, 4), random_tensor(2, 2, tokens, 4)
    q_valid = torch.arange(30).lt(25).unsqueeze(0) if masks else None
    k_valid = torch.arange(tokens).lt(tokens - 1).expand(2, -1) if masks else None
    return (q, k, q_valid, k_valid, [3, 30], video, 8, block, kernel)


@each_kernel
@each_layout
@pytest.mark.parametrize("masks", [False, True])
def test_fakes_have_the_shapes_strides_and_dtypes_of_the_results(kernel, layout, masks):
    args = op_args(kernel, layout, masks)
    with FakeTensorMode() as mode:
        fakes = OPS.token_blocks(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))
    for fake, real in zip(fakes, OPS.token_blocks(*args), strict=True):
        assert fake.shape == real.shape and fake.stride() == real.stride() and fake.dtype == real.dtype


@each_kernel
@pytest.mark.parametrize("masks", [False, True])
def test_opcheck(kernel, masks):
    results = torch.library.opcheck(OPS.token_blocks.default, op_args(kernel, "text-last", masks))
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("masks", [False, True])
def test_the_body_reads_no_value_on_the_host(masks):
    from sparse_compile.ops import blocks

    args = op_args("reference", "text-last", masks)
    with FakeTensorMode() as mode:
        fakes = blocks._token_blocks(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))
    assert [x.shape for x in fakes] == [x.shape for x in blocks._token_blocks(*args)]


class _Names(TorchDispatchMode):
    """The names of all ops that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
def test_no_number_is_copied_from_the_host(masked: bool) -> None:
    """On a GPU ``x[-1] = n`` copies from pageable memory: it waits, and a CUDA graph cannot capture it."""
    valid = torch.ones(1, 40, dtype=torch.bool) if masked else None
    with _Names() as names:
        reference.token_blocks(torch.zeros(1, 2, 40, 8), valid, [0, 30], 16)
    assert names.seen and not {"aten::copy_", "aten::lift_fresh"} & names.seen
