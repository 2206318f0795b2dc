"""The build backend that pyproject.toml names: setuptools', but an isolated build asks for the right torch."""

from __future__ import annotations

from typing import Any

import torches
from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [torches.for_isolated_build()]


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    """A source distribution is made without torch."""
    return []
