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
GDRCOPY_SOURCE = Path("tests/csrc/runtime/gdrcopy_stand_in.cc")
FOLDER = ROOT / "build" / "device-tests"
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra"]


@pytest.fixture(scope="session")
def device_library(build: ModuleType) -> Path | None:
    """The library that plays the GPU; None where there is one."""
    if torch.cuda.is_available() and device.CUDA_LIBRARY.exists():
        return None
    return shared_library(build, SOURCES, "libemulated_device.so")


@pytest.fixture(scope="session")
def gdrcopy_library(build: ModuleType) -> Path:
    """The library that plays GDRCopy."""
    if torch.cuda.is_available():
        pytest.skip("it maps memory of the device that host threads play")
    return shared_library(build, [GDRCOPY_SOURCE], "libgdrapi.so")


def shared_library(build: ModuleType, sources: list[Path], name: str) -> Path:
    """Compiles what changed, and links it."""
    objects = build.ObjectCompiler(FOLDER).compile(sources, dict.fromkeys(sources, FLAGS))
    target = FOLDER / name
    partial = FOLDER / f"partial-{os.getpid()}.so"
    command = [*build.compiler(), "-shared", *map(str, objects), "-o", str(partial), "-pthread"]
    subprocess.run(command, check=True)
    partial.rename(target)
    return target


@pytest.fixture
def ranks(device_library: Path | None) -> DeviceRanks:
    """Ranks whose kernels run on the device."""
    return DeviceRanks(device_library)
