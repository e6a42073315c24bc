"""Helpers for tests and benchmarks of code that uses moe_efa. Nothing in the package itself imports them."""

from moe_efa.testing.compare import assert_bitwise, assert_within_ulps
from moe_efa.testing.spawn import RankError, spawn

__all__ = ["RankError", "assert_bitwise", "assert_within_ulps", "spawn"]
