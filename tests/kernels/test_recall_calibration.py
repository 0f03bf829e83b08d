"""What is asked of an estimate after its plan was measured, and heads whose plan keeps too little."""

from __future__ import annotations

import math

import pytest
import torch
from block_axes import axis, random_mass
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import IMPLEMENTATIONS, OPS, cluster, packed, random_tensor

from sparse_compile.kernels.recall_map import reference
from sparse_compile.plan import unpack_bits

few = settings(max_examples=50, deadline=None, derandomize=True)
each_kernel = pytest.mark.parametrize("kernel", IMPLEMENTATIONS)


def logit(share):
    return math.log(share / (1 - share))


def calibrated(measured, asked, target=0.9, kernel="cpu", at_ceiling=0.0):
    """What is asked of each head next."""
    state = torch.tensor([asked], dtype=torch.float32)
    at_bounds = torch.tensor([0.0, at_ceiling]).expand(1, len(asked), 2)
    OPS.calibrate_recall(torch.tensor([measured], dtype=torch.float32), at_bounds, target, state, kernel)
    return state[0].tolist()


@each_kernel
def test_more_is_asked_where_less_was_kept_and_less_where_more_was(kernel):
    low, high, right = calibrated([0.8, 0.95, 0.9], [0.9] * 3, kernel=kernel)
    assert low > 0.9 > high and right == pytest.approx(0.9)
    assert low == pytest.approx(1 / (1 + math.exp(logit(0.8) - 2 * logit(0.9))), abs=1e-6)


def test_0_stands_for_the_target_and_is_replaced_by_it():
    measured = [0.7, 0.99, 1, math.nan, math.inf]
    assert calibrated(measured, [0.0] * 5) == pytest.approx(calibrated(measured, [0.9] * 5))


def test_what_was_learnt_stays_where_nothing_was_measured_and_out_of_reach():
    assert calibrated([math.nan, math.inf], [0.4, 0.96]) == pytest.approx([0.4, 0.96])
    assert calibrated([1.0, 0.5, 0.99], [0.4, 0.5, 0.96], at_ceiling=0.6) == pytest.approx([0.4, 0.5, 0.96])


@pytest.mark.parametrize("measured", [1, 1 - 2**-24, 0.99995])
def test_where_all_mass_was_kept_less_is_asked_in_small_steps(measured):
    (asked,) = calibrated([measured], [0.9])
    assert logit(asked) == pytest.approx(logit(0.9) - reference.SMALL_STEP, abs=1e-4)


def test_a_head_that_had_come_to_keep_everything_comes_back():
    """Its estimate asks for nearly all clusters, although the first alone holds the target."""
    asked = [0.9945]
    for _ in range(4):
        asked = calibrated([1.0], asked)
    assert asked[0] < 0.9


@few
@given(
    measured=st.floats(0, 1, width=32),
    asked=st.floats(0, 1, width=32),
    target=st.floats(0.01, 0.999),
)
def test_what_is_asked_stays_within_reach_of_the_target(measured, asked, target):
    (renewed,) = calibrated([measured], [asked], target)
    assert 0 < renewed < 1 and abs(logit(renewed) - logit(target)) <= reference.REACH + 1e-2


@pytest.mark.parametrize("odds", [0.06, 0.3, 1.0, 5.0, 16.0])
@pytest.mark.parametrize("target", [0.5, 0.9, 0.97])
def test_an_estimate_that_is_off_by_a_factor_in_the_odds_is_right_after_one_call(odds, target):
    def kept(asked):
        return 1 / (1 + math.exp(-(logit(asked) + math.log(odds))))

    asked = calibrated([kept(target)], [target], target)
    assert kept(asked[0]) == pytest.approx(target, abs=2e-6)
    again = calibrated([kept(asked[0])], asked, target)
    assert again == pytest.approx(asked, abs=1e-5), "and stays so"


def test_a_factor_beyond_reach_leaves_the_nearest_that_is_asked():
    asked = [0.9]
    for _ in range(5):
        asked = calibrated([0.2], asked)
    assert logit(asked[0]) == pytest.approx(logit(0.9) + reference.REACH, abs=1e-3)
    for _ in range(9):
        asked = calibrated([0.9999], asked)
    assert logit(asked[0]) == pytest.approx(logit(0.9) - reference.REACH, abs=1e-3)


class Site:
    """One site of SVG2 with a recall target: plans, and what is measured of them."""

    def __init__(self, spread: float, scale: float, target: float, ceiling: float) -> None:
        self.q, self.k = (spread * random_tensor(1, 2, n, 16, seed=n) for n in (400, 900))
        self.q[:, 1] *= 0.4
        self.clusters = cluster(self.q, self.k, 12, 90)
        self.scale, self.target, self.ceiling = scale, target, ceiling
        self.asked = torch.zeros(1, 2)

    def call(self) -> tuple[list[float], list[float]]:
        """Kept mass and the share of queries at the ceiling of both heads."""
        own = self.clusters
        bounds = (self.target, 0.0, self.ceiling, "mass", True, 0, "cpu")
        sides = (own.q_means, own.k_means, own.q_offsets, own.k_offsets, own.ready)
        keep, at_bounds = OPS.plan_estimated_recall(*sides, self.asked, self.scale, *bounds)
        plan = (own.q_order, own.q_offsets, own.k_order, own.k_offsets, keep)
        measured = OPS.kept_mass(self.q, self.k, None, [0, 400], *plan, self.scale, 400, 0, "cpu")
        OPS.calibrate_recall(measured, at_bounds, self.target, self.asked, "cpu")
        return measured[0].tolist(), at_bounds[0, :, 1].tolist()


def test_plans_approach_the_target_although_means_tell_too_much():
    """Means hide how uneven clusters are: the estimate is off, and what is measured corrects it."""
    site = Site(spread=1.5, scale=0.5, target=0.8, ceiling=1.0)
    far = [max(abs(kept - 0.8) for kept in site.call()[0]) for _ in range(6)]
    assert far[0] > 0.2 and max(far[2:]) < 0.015, far


@pytest.mark.parametrize("spread", [1.0, 1.5])
def test_a_head_that_is_out_of_reach_stays_whole(spread):
    """The kept mass of everything says nothing of the estimate: it must not make the next plan a poor one."""
    site = Site(spread=spread, scale=0.5 if spread > 1 else 0.25, target=0.8, ceiling=0.4)
    calls = [site.call() for _ in range(6)]
    assert all(down > reference.UNREACHED for _, held in calls[2:] for down in held), calls
    assert all(kept == 1 for measured, _ in calls[2:] for kept in measured), calls


@each_kernel
@pytest.mark.parametrize("padded", [True, False])
def test_weak_heads_attend_to_everything_and_others_stay(kernel, padded):
    query, key = axis("vvvt", [4, 0, 4, 2], heads=4, padding=2), axis("v" * 33 + "t", heads=2, padding=3)
    kept = torch.zeros(1, 4, 5, 35, dtype=torch.bool)
    kept[:, :, [0, 2], 3] = True
    keep, recall = packed(kept), torch.tensor([[0.2, 0.5, 0.7, math.nan]])
    arguments = (recall, query.offsets, key.offsets, keep, 0.5, padded, kernel)
    lifted = OPS.keep_weak_heads_whole(*arguments)
    assert lifted[0, :3].tolist() == pytest.approx([1, 0.5, 0.7]) and lifted[0, 3].isnan()
    now = unpack_bits(keep, 35)[0]
    assert now[0, [0, 2, 3], :34].all() and not now[0, 1].any() and not now[..., 34].any()
    assert now[0, 4].any() == padded and torch.equal(now[1:, :4], kept[0, 1:, :4])


def test_measured_heads_that_are_put_back_have_the_recall_of_everything():
    query, key = axis("v" * 5, heads=3), axis("v" * 20)
    mass = random_mass(query, key, heads=3) ** torch.tensor([3, 0.2, 1]).view(-1, 1, 1)
    keep, ready = torch.zeros(1, 3, 6, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    recall, _ = OPS.plan_top_k(mass, *query, *key, keep, ready, 0.8, "off", "mass", True, 0, "cpu")
    before = unpack_bits(keep, 21)
    lifted = OPS.keep_weak_heads_whole(recall, query.offsets, key.offsets, keep, 0.6, True, "cpu")
    weak = recall < 0.6
    after = unpack_bits(keep, 21)
    assert weak.tolist() == [[False, True, False]] and (lifted[weak] == 1).all() and after[weak][:, :5, :20].all()
    assert torch.equal(after[~weak][:, :5], before[~weak][:, :5]) and torch.equal(lifted[~weak], recall[~weak])
