"""Every test here starts as a fresh process would, and without gradients."""

from fresh_process import fresh_process

__all__ = ["fresh_process"]
