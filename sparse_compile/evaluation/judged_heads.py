"""Single heads of the demo model for people to look at: their true attention, and what each Plan keeps of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparse_compile.config import Config
from sparse_compile.evaluation.eager_strategy import EagerAttention
from sparse_compile.evaluation.site_figures import SiteFigures, attention_mass, kept_pairs, recall
from sparse_compile.evaluation.tap import TappedAttention
from sparse_compile.phases import Moment
from sparse_compile.strategies.catalogue import load_strategy


@dataclass(frozen=True)
class KeptPairs:
    """What one method's Plan keeps of a head: bool [Sq, Sk], and two figures of it."""

    pairs: Tensor
    density: float
    recall: float


@dataclass(frozen=True)
class JudgedHead:
    """One head of one call. ``mass`` is softmax(scale q k^T), float64 [Sq, Sk]."""

    layer: str
    step: int
    branch: str
    head: int
    mass: Tensor
    kept: Mapping[str, KeptPairs]
    """By method."""

    def __str__(self) -> str:
        return f"{self.layer}, head {self.head}, step {self.step}, branch {self.branch}"


def judged_steps(options: Mapping[str, object], steps: int) -> tuple[int, ...]:
    """Up to three steps of the sparse part of a run, equally far apart, the first sparse one included.

    Args:
        options: of a method; ``dense_steps`` counts.
        steps: denoising steps.
    """
    first = Moment(0, steps).count(Config.from_options(options).dense_steps)
    apart = max(1, (steps - 1 - first) // 2)
    return tuple(step for step in range(first, first + 2 * apart + 1, apart) if step < steps)


def telling_heads(figures: Sequence[SiteFigures]) -> list[SiteFigures]:
    """Two heads of one call of the model: where a Plan gains most over a random choice of keys, and where least.

    Args:
        figures: of one method; the middle step is looked at, in its first branch.
    """
    steps = sorted({row.step for row in figures})
    middle = [row for row in figures if row.step == steps[len(steps) // 2]]
    own = sorted((row for row in middle if row.branch == middle[0].branch), key=_gain)
    return [own[-1], own[0]] if len(own) > 1 else own


def judge(
    tapped: Sequence[TappedAttention],
    chosen: SiteFigures,
    options: Mapping[str, Mapping[str, object]],
    kernel: str = "reference",
) -> JudgedHead:
    """The attention of one head, and what each method keeps of it.

    Args:
        tapped: from `tap`.
        chosen: which head of which call.
        options: by method.
        kernel: which implementation the ops use.
    """
    place = (chosen.layer, chosen.step, chosen.branch)
    call = next(call for call in tapped if (call.layer, call.step, call.branch) == place)
    mass = attention_mass(call.q, call.k, call.scale)
    kept = {}
    for method, given in options.items():
        config = Config.from_options(given)
        made = EagerAttention(load_strategy(config.method), config, kernel).searched(call.q, call.k, call.v, call.scale)
        pairs = kept_pairs(made.plan)
        share = float(recall(mass, pairs)[0, chosen.head])
        own = pairs[0, chosen.head]
        kept[method] = KeptPairs(own, float(own.double().mean()), share)
    return JudgedHead(*place, chosen.head, mass[0, chosen.head], kept)


def _gain(row: SiteFigures) -> float:
    """0 is what as many keys at random would keep, 1 is everything."""
    return (row.recall - row.density) / max(1e-9, 1 - row.density)
