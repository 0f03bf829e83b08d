"""When a generation is in which phase, and what follows for a whole generation from the time of each phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from sparse_compile.config import Config
from sparse_compile.phases import Moment, Phase
from sparse_compile.runtime.clock import keeps_dense
from sparse_compile.strategies.base import Strategy

FORMULA = (
    "speedup = steps * t_dense / sum over phases of count(phase) * t_phase;"
    " t_phase = (layers - dense_layers) * block(phase) + dense_layers * block(dense),"
    " t_dense = layers * dense block"
)


def phases_of(strategy: Strategy, config: Config, steps: int) -> list[Phase]:
    """The phase of each step of a generation in which no call is left out, from the strategy itself."""
    searched: int | None = None
    phases = []
    for step in range(steps):
        phase = strategy.phase(Moment(step, steps), searched, config)
        if phase in (Phase.SEARCH, Phase.REFINE):
            searched = step
        phases.append(phase)
    return phases


def first_steps(phases: list[Phase]) -> dict[Phase, int]:
    """The first step of each phase, in the order of the steps."""
    return {phase: phases.index(phase) for phase in dict.fromkeys(phases)}


def layers_kept_dense(layers: int, config: Config) -> int:
    """How many of so many layers the option ``dense_layers`` keeps dense."""
    return sum(keeps_dense(index, layers, config.dense_layers) for index in range(layers))


def projected_speedup(
    phases: list[Phase], dense: float, by_phase: Mapping[Phase, float], layers: int, kept_dense: int
) -> float:
    """`FORMULA`: of the blocks of a whole generation.

    Args:
        phases: of each step.
        dense: time of a block of the dense model.
        by_phase: time of a block in each phase, none of it kept dense.
        layers: blocks of the model.
        kept_dense: how many of them stay dense in every phase.
    """
    counts = Counter(phases)
    total = 0.0
    for phase, count in counts.items():
        total += count * ((layers - kept_dense) * by_phase[phase] + kept_dense * by_phase[Phase.DENSE])
    return len(phases) * layers * dense / total
