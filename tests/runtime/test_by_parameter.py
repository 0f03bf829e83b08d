from __future__ import annotations

import gc

import torch

from sparse_compile.runtime.by_parameter import ByParameter


def test_values_belong_to_objects_not_to_equal_tensors() -> None:
    table: ByParameter[str] = ByParameter()
    one, equal = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    assert table.setdefault(one, "one") == "one"
    assert table.setdefault(one, "another") == "one"
    assert table.get(one) == "one"
    assert table.get(equal) is None


def test_a_value_dies_with_its_parameter() -> None:
    table: ByParameter[str] = ByParameter()
    parameter = torch.nn.Parameter(torch.zeros(2))
    table.setdefault(parameter, "value")
    del parameter
    gc.collect()
    assert len(table) == 0


def test_a_new_parameter_at_an_old_address_finds_nothing() -> None:
    table: ByParameter[int] = ByParameter()
    for number in range(200):
        parameter = torch.nn.Parameter(torch.zeros(1))
        assert table.get(parameter) is None
        assert table.setdefault(parameter, number) == number


def test_clear_forgets_and_late_callbacks_do_no_harm() -> None:
    table: ByParameter[str] = ByParameter()
    parameter = torch.nn.Parameter(torch.zeros(1))
    table.setdefault(parameter, "old")
    table.clear()
    table.setdefault(parameter, "new")
    gc.collect()
    assert table.get(parameter) == "new"
