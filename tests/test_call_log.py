from __future__ import annotations

import math

import pytest
import torch

from sparse_compile.call_log import (
    COLUMNS,
    ROWS,
    CallRow,
    HeadFigures,
    append_row,
    carry_over,
    log_spec,
    read_heads,
    read_rows,
)

CPU = torch.device("cpu")


def empty_log(heads: int = 0) -> torch.Tensor:
    shape, dtype, device = log_spec(CPU, heads)
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("heads", [0, 3])
def test_an_empty_log_has_no_rows_and_no_heads(heads: int) -> None:
    assert tuple(empty_log(heads).shape) == (1 + ROWS + heads, COLUMNS)
    assert read_rows(empty_log(heads)) == (0, [])
    assert read_heads(empty_log(heads)) == []


def test_rows_come_back_oldest_first() -> None:
    log = empty_log()
    for number in range(3):
        append_row(log, torch.tensor(number / 4), None, None)
    assert read_rows(log) == (3, [CallRow(0.0, None, 0), CallRow(0.25, None, 0), CallRow(0.5, None, 0)])


def test_densities_and_masses_are_averaged_and_tokens_are_summed() -> None:
    log = empty_log()
    append_row(log, torch.tensor([[0.25, 0.75]]), torch.tensor([0.5, 1.0]), torch.tensor([3, 4], dtype=torch.int32))
    assert read_rows(log) == (1, [CallRow(0.5, 0.75, 7)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_precision_of_the_values_is_taken(dtype: torch.dtype) -> None:
    log = empty_log()
    append_row(log, torch.tensor(0.5, dtype=dtype), torch.tensor(0.25, dtype=dtype), None)
    assert read_rows(log)[1] == [CallRow(0.5, 0.25, 0)]


@pytest.mark.parametrize("written", [ROWS - 1, ROWS, ROWS + 1, 2 * ROWS, 2 * ROWS + 3])
def test_the_ring_keeps_the_newest_rows(written: int) -> None:
    log = empty_log(heads=2)
    for number in range(written):
        append_row(log, torch.full((1, 2), float(number)), None, None)
    count, rows = read_rows(log)
    assert count == written
    assert [row.density for row in rows] == [float(n) for n in range(max(0, written - ROWS), written)]


def test_the_ring_goes_on_beyond_a_million_rows() -> None:
    log = empty_log()
    log[0, 0] = 2**20 + 5
    append_row(log, torch.tensor(0.125), None, None)
    count, rows = read_rows(log)
    assert (count, rows[-1].density) == (2**20 + 6, 0.125)


def test_a_mass_that_is_not_a_number_is_told_as_unknown() -> None:
    log = empty_log()
    append_row(log, torch.tensor(0.5), torch.tensor(math.nan), None)
    assert read_rows(log)[1] == [CallRow(0.5, None, 0)]


def test_masses_that_are_no_numbers_are_left_out_of_the_mean() -> None:
    log = empty_log(heads=2)
    append_row(log, torch.tensor([[0.25, 0.5]]), torch.tensor([[0.75, math.nan]]), None)
    assert read_rows(log)[1] == [CallRow(0.375, 0.75, 0)]
    assert read_heads(log) == [HeadFigures(0.25, 0.75), HeadFigures(0.5, None)]


def test_each_head_has_the_mean_over_the_batch_in_the_newest_call() -> None:
    log = empty_log(heads=3)
    append_row(log, torch.ones(2, 3), torch.ones(2, 3), None)
    density = torch.tensor([[0.25, 0.5, 1.0], [0.75, 0.5, 0.5]])
    mass = torch.tensor([[0.5, math.nan, math.nan], [1.0, 0.5, math.nan]])
    append_row(log, density, mass, torch.tensor(4))
    assert read_heads(log) == [HeadFigures(0.5, 0.75), HeadFigures(0.5, 0.5), HeadFigures(0.75, None)]
    written, rows = read_rows(log)
    assert written == 2
    assert rows[1] == CallRow(pytest.approx(3.5 / 6), pytest.approx(2 / 3), 4)


def test_a_call_that_does_not_measure_mass_forgets_that_of_the_call_before() -> None:
    log = empty_log(heads=2)
    append_row(log, torch.full((1, 2), 0.5), torch.full((1, 2), 0.75), None)
    append_row(log, torch.full((1, 2), 0.25), None, None)
    assert read_heads(log) == [HeadFigures(0.25, None)] * 2
    assert [row.kept_mass for row in read_rows(log)[1]] == [0.75, None]


def filled_log(heads: int) -> torch.Tensor:
    log = empty_log(heads)
    for number in range(1, 4):
        append_row(log, torch.full((1, heads), number / 4), None, None)
    return log


def test_a_log_of_other_heads_takes_over_the_calls_and_waits_for_the_heads() -> None:
    old, new = filled_log(2), empty_log(3)
    carry_over(old, new)
    assert read_rows(new) == read_rows(old)
    assert read_heads(new) == []


def test_a_log_elsewhere_takes_over_everything() -> None:
    old, new = filled_log(2), empty_log(2)
    carry_over(old, new)
    torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    assert new.data_ptr() != old.data_ptr()


def test_a_row_is_written_in_place() -> None:
    log = empty_log(heads=2)
    address, version = log.data_ptr(), log._version
    append_row(log, torch.full((1, 2), 0.5), None, None)
    assert log.data_ptr() == address
    assert log._version > version


@pytest.mark.parametrize("heads", [0, 2])
def test_appending_reads_nothing_on_the_host(heads: int) -> None:
    shape, dtype, _ = log_spec(CPU, heads)
    log = torch.zeros(shape, dtype=dtype, device="meta")
    figures = torch.zeros(1, 2, device="meta")
    append_row(log, figures, figures, torch.zeros(1, device="meta"))
