from __future__ import annotations

import math

import pytest
import torch

from sparse_compile.call_log import COLUMNS, ROWS, CallRow, append_row, log_spec, read_rows

CPU = torch.device("cpu")


def empty_log() -> torch.Tensor:
    shape, dtype, device = log_spec(CPU)
    return torch.zeros(shape, dtype=dtype, device=device)


def test_an_empty_log_has_no_rows() -> None:
    assert tuple(empty_log().shape) == (1 + ROWS, COLUMNS)
    assert read_rows(empty_log()) == (0, [])


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
    log = empty_log()
    for number in range(written):
        append_row(log, torch.tensor(float(number)), None, None)
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


def test_a_row_is_written_in_place() -> None:
    log = empty_log()
    address, version = log.data_ptr(), log._version
    append_row(log, torch.tensor(0.5), None, None)
    assert log.data_ptr() == address
    assert log._version > version


def test_appending_reads_nothing_on_the_host() -> None:
    shape, dtype, _ = log_spec(CPU)
    log = torch.zeros(shape, dtype=dtype, device="meta")
    append_row(log, torch.zeros(2, device="meta"), torch.zeros(2, device="meta"), torch.zeros(1, device="meta"))
