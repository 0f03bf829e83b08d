"""What the backend adds to a call: guard, look-up of state, extra graph inputs, bookkeeping.

    python benchmarks/overhead.py [--layers 40] [--rounds 300]

A compiled model in its sparse phase, with a strategy that declares SVG2's state and writes plain attention, against
`backend="inductor"` on the same model. Calls alternate, medians are compared, so what is left is the backend itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import sparse_compile
from sparse_compile.phases import Phase
from sparse_compile.strategies.svg2 import Svg2

if __name__ == "__main__":  # the backend imports the strategy by this name
    sys.modules["overhead"] = sys.modules["__main__"]
    sys.path.insert(0, str(Path(__file__).parent))

BUDGET_MICROSECONDS = 200


class PlainAttention(Svg2):
    """SVG2's phases and state around the attention as it was."""

    def write(self, build: Any, site: Any, phase: Phase) -> Any:
        """The attention as it was."""
        return build.attention()


class Block(torch.nn.Module):
    """A pre-norm attention block with its own projections."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = torch.nn.RMSNorm(dim)
        self.to_q, self.to_k, self.to_v, self.to_out = (torch.nn.Linear(dim, dim) for _ in range(4))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, dim] to the same shape."""
        x = self.norm(hidden_states)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        return hidden_states + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(torch.nn.Module):
    """A stack of equal blocks."""

    def __init__(self, layers: int, dim: int = 64, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block(dim, heads) for _ in range(layers))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, dim] to the same shape."""
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


Call = Callable[[torch.Tensor], torch.Tensor]


def as_sparse(module: torch.nn.Module) -> Call:
    """The module behind a function of its own: Dynamo keeps its entries by code, here apart from `as_plain`'s."""
    return lambda hidden_states: module(hidden_states)


def as_plain(module: torch.nn.Module) -> Call:
    """See `as_sparse`."""
    return lambda hidden_states: module(hidden_states)


def compiled(model: Model, regional: bool, wrap: Callable[[torch.nn.Module], Call], **how: Any) -> Call:
    """The model compiled as a whole, or block by block."""
    if not regional:
        return torch.compile(wrap(model), **how)
    blocks = [torch.compile(wrap(block), **how) for block in model.blocks]

    def call(hidden_states: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            hidden_states = block(hidden_states)
        return hidden_states

    return call


def measure(layers: int, tokens: int, rounds: int, regional: bool) -> Mapping[str, float]:
    """Medians in microseconds of alternating calls."""
    torch.compiler.reset()
    options = {"method": "overhead:PlainAttention", "min_tokens": 1, "dense_steps": 0, "dense_layers": 0}
    model = Model(layers).eval().requires_grad_(False)
    sparse = compiled(model, regional, as_sparse, backend="sparse_attn", options=options)
    plain = compiled(model, regional, as_plain, backend="inductor")
    x = torch.randn(1, tokens, 64)
    times: dict[str, list[float]] = {"inductor": [], "sparse_attn": []}
    with torch.no_grad(), sparse_compile.denoising(model, steps=rounds + 9) as clock, clock.branch("cond"):
        for _ in range(3):
            expected = plain(x)
        for _ in range(5):
            torch.testing.assert_close(sparse(x), expected)
            clock.step()
        assert sparse_compile.explain(model).generations[-1].steps[-1].phase == Phase.SPARSE
        pair = [("inductor", plain), ("sparse_attn", sparse)]
        for _ in range(rounds):
            pair.reverse()  # neither always finds the caches as the other left them
            for name, call in pair:
                start = time.perf_counter()
                call(x)
                times[name].append(1e6 * (time.perf_counter() - start))
            clock.step()
    medians = {name: statistics.median(values) for name, values in times.items()}
    added = medians["sparse_attn"] - medians["inductor"]
    return {**medians, "added": added, "share": added / medians["inductor"], "per_layer": added / layers}


def main() -> int:
    """Measure both ways of compiling, print, and fail where the whole model is over budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    results = {}
    for way in ("whole", "regional"):
        figures = measure(arguments.layers, arguments.tokens, arguments.rounds, way == "regional")
        results[way] = figures
        share, per_layer = f"{100 * figures['share']:+.1f} %", f"{figures['per_layer']:+.1f} us a layer"
        print(
            f"{way:9s} inductor {figures['inductor']:8.0f} us, sparse_attn {figures['sparse_attn']:8.0f} us:"
            f" {figures['added']:+.0f} us a call ({share}, {per_layer})"
        )
    if arguments.json:
        versions = {
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "layers": arguments.layers,
            "tokens": arguments.tokens,
        }
        arguments.json.write_text(json.dumps({**versions, **results}, indent=1) + "\n")
    within = results["whole"]["added"] <= BUDGET_MICROSECONDS
    print(f"whole model: {'within' if within else 'OVER'} the budget of {BUDGET_MICROSECONDS} us a call")
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
