"""For all tests: the installed package is what is tested, and Triton interprets its kernels where there is no GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the root, `import triton_kernels` would find our folder, and `import moe_efa` the sources of a wheel under test.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]

# Tests that are about a GPU say so; the others have their tensors on the CPU.
os.environ.setdefault("MOE_EFA_DEVICE", "cpu")

# A shell that starts this in the background has SIGINT ignored, and every process of the tests would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _import_interpreted_triton() -> None:
    """Triton decides when it is imported whether it interprets, and torch may import it during any test."""
    import torch

    if torch.cuda.is_available():
        return
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
        patch.setenv("TRITON_INTERPRET", "1")
        import triton  # noqa: F401


_import_interpreted_triton()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout that these tests belong to."""
    return ROOT


@pytest.fixture(scope="session")
def build() -> ModuleType:
    """setup.py as a module: which sources there are, where libfabric is, and the incremental compiler."""
    specification = importlib.util.spec_from_file_location("moe_efa_setup", ROOT / "setup.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module
