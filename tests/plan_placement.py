"""Plans on another device."""

from __future__ import annotations

from sparse_compile.plan import Plan, PooledKeys


def moved(plan: Plan, device: str) -> Plan:
    """The same Plan on a device."""
    return Plan(*(None if x is None else x.to(device) for x in vars(plan).values()))


def moved_pooled(pooled: PooledKeys, device: str) -> PooledKeys:
    """The same pooled keys on a device."""
    return PooledKeys(*(None if x is None else x.to(device) for x in vars(pooled).values()))
