"""Triton's interpreter in place of a GPU, with the repairs that the tests make."""

from __future__ import annotations

import importlib.util
import os

from .package import ROOT


def use_interpreter() -> None:
    """Before Triton is imported. The kernels of moe_efa are imported here."""
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "SHIM_TIMEOUT_S": "20"}  # threads may starve
    path = ROOT / "tests" / "triton_kernels" / "conftest.py"
    specification = importlib.util.spec_from_file_location("moe_efa_interpreter_repairs", path)
    assert specification is not None and specification.loader is not None
    specification.loader.exec_module(importlib.util.module_from_spec(specification))
