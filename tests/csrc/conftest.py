"""What the tests that compile csrc/ share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def build() -> ModuleType:
    """setup.py as a module: which sources there are, where libfabric is, and the incremental compiler."""
    specification = importlib.util.spec_from_file_location("moe_efa_setup", ROOT / "setup.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module
