"""What a case of the table of families says, and what a row of a census is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

Inputs = dict[str, Any]
Built = tuple[nn.Module, Inputs]
"""A model and the keyword arguments of one call."""

CROSS, SPARSE = "cross_attention", "sparse"


class Row(NamedTuple):
    """One kind of attention site: as the tables count them."""

    role: str
    layout: str
    keys: int
    mask: str
    grid: str
    verdict: str


Rows = Mapping[Row, int]
"""How many sites there are of each kind."""


@dataclass(frozen=True)
class Regional:
    """What is found where the repeated blocks of a model are compiled one by one."""

    graphs: int
    rows: Rows


@dataclass(frozen=True)
class Case:
    """A tiny model of one family, and what is to be found in its graphs.

    Text, image and video lengths differ in every model, so that a wrong split shows.
    """

    title: str
    """The family as people call it."""
    build: Callable[[], Built]
    """Its name is the name of the case."""
    whole: Rows
    """Sites of the graphs of the whole model."""
    graphs: int = 1
    """Graphs of the whole model."""
    regional: Regional | None = None
    """None where the class declares no repeated blocks."""
    fullgraph: bool = False
    """Whether Dynamo breaks the model apart unless it must not."""
    video: tuple[str, ...] = ("hidden_states",)
    """The arguments that change from step to step."""
    dense_only: str = ""
    """Why no site of this family can be sparse, in the words of the documentation."""
    quick: bool = False
    """Whether it is among the few that `make test` runs."""
    note: str = ""
    """What the documentation says besides."""

    @property
    def name(self) -> str:
        return self.build.__name__

    def rows(self, regional: bool) -> Rows:
        if not regional:
            return self.whole
        assert self.regional is not None, f"{self.name} has no repeated blocks"
        return self.regional.rows

    def goes_sparse(self, regional: bool = False) -> bool:
        return any(row.verdict == SPARSE for row in self.rows(regional))
