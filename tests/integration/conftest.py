"""The device that ranks of integration tests may have."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moe_efa import device
from moe_efa.testing.device_ranks import DeviceRanks

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path.relative_to(ROOT) for path in sorted((ROOT / "tests/csrc/device").glob("*.cc"))]
FOLDER = ROOT / "build" / "device-tests"
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra"]


@pytest.fixture(scope="session")
def device_library(build: ModuleType) -> Path | None:
    """The library that plays the GPU; None where there is one."""
    if torch.cuda.is_available() and device.CUDA_LIBRARY.exists():
        return None
    objects = build.ObjectCompiler(FOLDER).compile(SOURCES, dict.fromkeys(SOURCES, FLAGS))
    target = FOLDER / "libemulated_device.so"
    partial = FOLDER / f"partial-{os.getpid()}.so"
    command = [*build.compiler(), "-shared", *map(str, objects), "-o", str(partial), "-pthread"]
    subprocess.run(command, check=True)
    partial.rename(target)
    return target


@pytest.fixture
def ranks(device_library: Path | None) -> DeviceRanks:
    """Ranks whose kernels run on the device."""
    return DeviceRanks(device_library)
