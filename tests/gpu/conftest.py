"""Tests of this folder run on a CUDA device, and test_dry_run.py runs the same functions without one."""

from fresh_process import fresh_process

__all__ = ["fresh_process"]
