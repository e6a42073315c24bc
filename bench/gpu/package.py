"""``moe_efa`` as it lies in the tree: kernels and references without an installation and without the extension."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu-check"


def use_tree() -> None:
    """Makes ``moe_efa.triton_kernels`` and what it needs importable. ``moe_efa/__init__.py`` does not run."""
    for name, folder in (("moe_efa", ROOT / "moe_efa"), ("moe_efa.triton_kernels", ROOT / "triton_kernels" / "src")):
        if name in sys.modules:
            raise RuntimeError(f"{name} was imported before: nobody knows from where")
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    sys.modules["moe_efa"].triton_kernels = sys.modules["moe_efa.triton_kernels"]  # type: ignore[attr-defined]
