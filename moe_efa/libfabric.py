"""Tells the native extension where to look for libfabric: the user's choice, and what Python packages carry."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

from moe_efa import _C, env

_PACKAGES = ("mpich",)
_FILE_NAME = "libfabric.so.1"


def search_path() -> dict[str, Any]:
    """The keyword arguments ``libfabric`` and ``libfabric_hints`` of the native extension."""
    return {"libfabric": env.libfabric_path() or "", "libfabric_hints": carried_by_packages()}


def carried_by_packages() -> list[str]:
    """Paths of the libfabric libraries that installed Python packages carry."""
    found = []
    for package in _PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found += [os.path.realpath(file.locate()) for file in files if file.name == _FILE_NAME]
    return found


def build_info() -> dict[str, Any]:
    """What the native extension was built with, and the libfabric that it finds."""
    return _C.build_info(**search_path())
