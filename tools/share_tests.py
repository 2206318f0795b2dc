"""A pytest plugin: of the tests found, every n-th (tools/gpu_suite.py gives each of its processes another share).

NSA_TEST_SHARE=0/4 python -m pytest -p tools.share_tests tests
"""

from __future__ import annotations

import os

import pytest


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, _, shares = os.environ["NSA_TEST_SHARE"].partition("/")
    kept = items[int(share) :: int(shares)]
    taken = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in taken])
    items[:] = kept
