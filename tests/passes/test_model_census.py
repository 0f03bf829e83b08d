"""The tiny models against their tables: whole, block by block, and with symbolic sizes."""

from __future__ import annotations

import pytest
from dynamo_capture import capture_model, census, classified
from tiny_model_tables import EXPECTED, GRAPHS, REGIONAL
from tiny_models import BUILDERS


@pytest.mark.parametrize("name", BUILDERS)
def test_every_site_of_a_whole_model_is_classified_as_in_the_table(name: str) -> None:
    graphs = capture_model(name)
    assert len(graphs) == GRAPHS[name]
    assert dict(census(graphs)) == EXPECTED[name]


@pytest.mark.parametrize("name", REGIONAL)
def test_block_by_block_the_same_sites_become_sparse(name: str) -> None:
    graphs = capture_model(name, regional=True)
    found = census(graphs)
    assert (len(graphs), found.total()) == REGIONAL[name]
    sparse = {(kind.role, kind.layout) for kind in found if kind.verdict == "sparse"}
    assert sparse == {(kind.role, kind.layout) for kind in EXPECTED[name] if kind.verdict == "sparse"}


@pytest.mark.parametrize("name", ["wan_t2v", "hunyuan_video", "flux"])
def test_symbolic_sizes_change_no_verdict(name: str) -> None:
    assert dict(census(capture_model(name, dynamic=True))) == EXPECTED[name]


def test_every_sparse_site_of_a_model_has_its_own_layer() -> None:
    (captured,) = capture_model("wan_i2v")
    keys = [(site.owner, site.ordinal) for site in classified(captured)]
    assert len(set(keys)) == len(keys) == 6
