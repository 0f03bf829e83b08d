"""The errors that users of the package see."""

from __future__ import annotations


class SparseAttentionError(ValueError):
    """A broken rule: what holds, what was given, what to do."""

    def __init__(self, rule: str, value: object, remedy: str) -> None:
        super().__init__(f"{rule}; got {value!r}. {remedy}")
        self.rule = rule
        self.value = value
        self.remedy = remedy


class StrictModeError(SparseAttentionError):
    """Under ``strict=True``: a site is unsupported, or a generation ran without any sparse attention."""
