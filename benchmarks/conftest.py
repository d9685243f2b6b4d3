"""Timings are taken in one process, whatever the tests do."""

from __future__ import annotations


def pytest_xdist_auto_num_workers() -> int:
    """No processes beside the first."""
    return 0
