from __future__ import annotations

import math
import threading
from decimal import ROUND_HALF_UP, Decimal

import pytest
from generations import WAYS, generate, layers_of, phases
from hypothesis import given
from hypothesis import strategies as st
from toy_models import EAGER, Stack, tokens

import sparse_compile
from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.phases import Moment, Phase
from sparse_compile.runtime.clock import Clock, keeps_dense
from sparse_compile.runtime.state import Layer
from sparse_compile.strategies.base import Planner
from sparse_compile.strategies.svg2 import Svg2


def planner(**options: object) -> Planner:
    return Planner(Svg2(), Config.from_options({**EAGER, **options}, environ={}))


# ---------------------------------------------------------------------- steps


def test_steps_count_from_zero() -> None:
    clock = Clock()
    clock.start(3)
    seen = [clock.moment.step]
    for _ in range(3):
        clock.step()
        seen.append(clock.moment.step)
    assert seen == [0, 1, 2, 3]
    assert clock.steps == 3


def test_a_step_may_be_given_by_number() -> None:
    clock = Clock()
    clock.start(10, step=4)
    assert clock.moment == Moment(4, 10)
    clock.step(to=7)
    assert clock.moment == Moment(7, 10)


def test_moving_to_the_step_it_is_at_is_no_move() -> None:
    clock, model = Clock(), Stack(1)
    claim = clock.claim(model)
    clock.start(10)
    clock.step(to=3)
    moves = claim.moves
    clock.step(to=3)
    assert claim.moves == moves
    clock.step(to=4)
    assert claim.moves == moves + 1


def test_a_generation_may_turn_out_to_have_more_steps() -> None:
    clock = Clock()
    clock.start(4)
    generation = clock.generation
    clock.step(to=1, of=8)
    assert (clock.moment, clock.generation) == (Moment(1, 8), generation)


def test_a_loop_that_was_left_ends_its_generation_until_the_next_step_is_told() -> None:
    clock = Clock()
    clock.start(4)
    clock.step(to=2)
    clock.end()
    assert clock.over
    assert clock.phase(planner(dense_steps=0), None) is Phase.DENSE
    clock.step(to=3)
    assert not clock.over
    assert clock.moment == Moment(3, 4)


@pytest.mark.parametrize("steps", [0, -1, True, 2.0, "3", None])
def test_a_generation_needs_at_least_one_whole_step(steps: object) -> None:
    clock = Clock()
    before = clock.generation
    with pytest.raises(SparseAttentionError, match=r"at least 1.*number of steps"):
        clock.start(steps)  # type: ignore[arg-type]
    assert clock.generation == before


def test_a_denoising_block_of_no_steps_lets_the_model_go() -> None:
    model = Stack(1)
    with pytest.raises(SparseAttentionError, match="at least 1"), sparse_compile.denoising(model, steps=0):
        pass
    with sparse_compile.denoising(model, steps=1):
        pass


def test_generation_numbers_are_never_reused() -> None:
    clocks = [Clock(), Clock()]
    numbers = [clock.generation for clock in clocks]
    for _ in range(3):
        for clock in clocks:
            clock.start(5)
            numbers.append(clock.generation)
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(
    ("amount", "steps", "count"),
    [(0.5, 5, 3), (0.2, 50, 10), (0.25, 10, 3), (0.0, 9, 0), (1.0, 9, 9), (3, 50, 3), (0, 4, 0)],
)
def test_shares_of_the_steps_are_rounded_half_up(amount: float | int, steps: int, count: int) -> None:
    assert Moment(0, steps).count(amount) == count


def test_a_share_in_percent_is_rounded_as_on_paper() -> None:
    wrong = []
    for percent in range(101):
        for steps in range(1, 101):
            exact = (Decimal(percent) * steps / 100).quantize(Decimal(1), ROUND_HALF_UP)
            if Moment(0, steps).count(percent / 100) != exact:
                wrong.append((percent / 100, steps))
    assert wrong == []


# ---------------------------------------------------------------------- branches


def test_branches_nest_and_restore() -> None:
    clock = Clock()
    with clock.branch("outer"):
        with clock.branch("inner"):
            assert clock.branch_name == "inner"
        assert clock.branch_name == "outer"
    assert clock.branch_name is None


def test_a_branch_is_left_on_an_exception_too() -> None:
    clock = Clock()
    with pytest.raises(KeyError), clock.branch("outer"), clock.branch("inner"):
        raise KeyError
    assert clock.branch_name is None
    with clock.branch("again"):
        assert clock.branch_name == "again"


def in_thread(function: object) -> list[BaseException]:
    """The errors of a function that runs to its end in another thread."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()  # type: ignore[operator]
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors


def test_two_threads_in_a_branch_are_an_error_that_names_the_remedy() -> None:
    clock = Clock()

    def enter() -> None:
        with clock.branch("uncond"):
            pass

    with clock.branch("cond"):
        (error,) = in_thread(enter)
        assert clock.branch_name == "cond"
    assert isinstance(error, SparseAttentionError)
    assert "one generation at a time" in str(error)
    assert "own model" in str(error)
    assert in_thread(enter) == []


# ---------------------------------------------------------------------- dense layers


def kept(dense_layers: float | int | str, count: int | None, layers: int = 4) -> list[int]:
    return [index for index in range(layers) if keeps_dense(index, count, dense_layers)]


@pytest.mark.parametrize(
    ("dense_layers", "count", "expected"),
    [
        (0, 4, []),
        (2, 4, [0, 1]),
        (2, None, [0, 1]),
        (0.5, 4, [0, 1]),
        (0.49, 4, [0]),
        (0.03, 4, []),
        (1.0, 4, [0, 1, 2, 3]),
        (0.0, None, []),
        (0.03, None, [0, 1, 2, 3]),
        ("1", 4, [1]),
        ("1", None, [1]),
        ("1-2", 4, [1, 2]),
        ("-1", 4, [3]),
        ("-4", 4, [0]),
        ("-5", 4, []),
        ("0,-1", 4, [0, 3]),
        ("0,-1", None, [0, 1, 2, 3]),
        ("7", 4, []),
    ],
)
def test_dense_layers_name_layers_by_share_count_and_place(
    dense_layers: float | int | str, count: int | None, expected: list[int]
) -> None:
    assert kept(dense_layers, count) == expected


@given(st.integers(0, 100), st.integers(1, 100))
def test_a_share_of_the_layers_is_rounded_down(percent: int, count: int) -> None:
    assert len(kept(percent / 100, count, count)) == percent * count // 100


def test_a_layer_behind_the_counted_ones_is_not_taken_for_the_first() -> None:
    assert not keeps_dense(4, 4, "0")
    assert not keeps_dense(5, 4, "1-2")


# ---------------------------------------------------------------------- claims


def test_a_clock_that_was_never_started_keeps_everything_dense() -> None:
    model = Stack(1)
    claim = Clock().claim(model)
    layer = Layer(planner(dense_steps=0))
    assert claim.phase_of_new_layer(layer.planner, 0) is Phase.DENSE
    claim.add(layer)
    assert layer.phase is Phase.DENSE


def test_layers_are_numbered_by_their_first_calls() -> None:
    model = Stack(1)
    clock = Clock()
    claim = clock.claim(model)
    clock.start(4)
    own = planner()
    layers = [Layer(own) for _ in range(3)]
    for layer in reversed(layers):
        claim.add(layer)
    assert [layer.index for layer in layers] == [2, 1, 0]
    assert list(claim.layers()) == layers[::-1]


def test_planners_number_their_layers_apart() -> None:
    model = Stack(1)
    clock = Clock()
    claim = clock.claim(model)
    clock.start(4)
    first, second = Layer(planner()), Layer(planner())
    claim.add(first)
    claim.add(second)
    assert (first.index, second.index) == (0, 0)


def test_a_layer_takes_the_place_of_one_that_died() -> None:
    model = Stack(1)
    clock = Clock()
    claim = clock.claim(model)
    clock.start(4)
    own = planner(dense_layers=1)
    old, second = Layer(own), Layer(own)
    claim.add(old)
    claim.add(second)
    del old
    assert claim.phase_of_new_layer(own, 0) is Phase.DENSE
    new = Layer(own)
    claim.add(new)
    assert (new.index, new.kept_dense) == (0, True)
    third = Layer(own)
    claim.add(third)
    assert third.index == 2


DENSE_OF_FOUR = [
    pytest.param(1, [0], id="count"),
    pytest.param("-1", [3], id="last"),
    pytest.param(0.5, [0, 1], id="share"),
    pytest.param("1-2", [1, 2], id="range"),
    pytest.param(0, [], id="none"),
]


@pytest.mark.parametrize("dense_steps", [0, 1])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dense_layers", "dense"), DENSE_OF_FOUR)
def test_dense_layers_stay_dense_in_each_generation(
    way: str, dense_layers: float | int | str, dense: list[int], dense_steps: int
) -> None:
    model, call = WAYS[way](4, dense_layers=dense_layers, dense_steps=dense_steps)
    with sparse_compile.denoising(model, steps=4) as clock:
        generate(call, clock)
        clock.start(4)
        generate(call, clock)
    for index, seen in enumerate(phases(model)):
        assert ("sparse" in seen) == (index not in dense), f"layer {index}"
        assert set(seen) == {"dense"} if index in dense else seen[:8] == seen[8:], f"layer {index}"
    sites = sparse_compile.explain(model).to_dict()["sites"]
    assert [site["layer"] for site in sites if site["decision"] == "dense"] == [f"blocks.{i}" for i in dense]
    assert {site["reason"] for site in sites} == {None, "dense_layer"} if dense else {None}


@pytest.mark.parametrize("way", WAYS)
def test_until_the_layers_are_counted_a_share_keeps_all_of_them_dense(way: str) -> None:
    model, call = WAYS[way](4, dense_layers=0.25, dense_steps=0)
    with sparse_compile.denoising(model, steps=3) as clock:
        for _ in range(2):
            generate(call, clock, ["cond"])
            clock.start(3)
    assert phases(model) == [["dense"] * 6] + [["dense", "search", "sparse"] * 2] * 3


def test_counts_and_shares_of_dense_steps_agree_in_a_generation() -> None:
    for dense_steps in (2, 0.5, 0.4):
        model, call = WAYS["whole"](1, dense_steps=dense_steps)
        with sparse_compile.denoising(model, steps=4) as clock:
            generate(call, clock, ["cond"])
        assert phases(model) == [["dense", "dense", "search", "sparse"]], dense_steps
        assert math.isclose(float(sparse_compile.explain(model).generations[0].steps[0].density), 1.0)


def test_a_clock_that_was_let_go_moves_nothing() -> None:
    model, call = WAYS["regional"](1, dense_steps=0)
    with sparse_compile.denoising(model, steps=4) as old:
        call(tokens())
        old.step()
    with sparse_compile.denoising(model, steps=4):
        call(tokens())
        call(tokens())
        old.step()
        call(tokens())
    assert [call.branch for call in layers_of(model)[0].history] == [0, 0, 1, 2]
