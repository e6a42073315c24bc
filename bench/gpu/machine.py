"""What this machine is: its GPU, driver, compilers and libraries. Loads no framework."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from .package import ROOT

_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_PACKAGES = ("torch", "triton", "numpy", "matplotlib")


class CannotTell(RuntimeError):
    """Nothing can be said about a GPU here; the message says what is missing."""


def find_gpu() -> dict[str, Any]:
    """Name, compute capability and driver of the first GPU, asked of the driver.

    Raises:
        CannotTell: there is no driver, or no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise CannotTell("no GPU here: there is no NVIDIA driver (libcuda.so.1)") from None
    count, device, name = ctypes.c_int(0), ctypes.c_int(0), ctypes.create_string_buffer(128)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        raise CannotTell("no GPU here: the NVIDIA driver finds none")
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in _COMPUTE_CAPABILITY:
        value = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return {"device": name.value.decode(), "capability": capability, "gpus": count.value, "driver": _driver_version()}


def _driver_version() -> str:
    """Of the kernel module: what nvidia-smi prints."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "unknown"
    match = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", text)
    return match[1] if match else "unknown"


def software(nvcc: Path | None) -> dict[str, Any]:
    """Date and versions."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": _first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]) or "unknown",
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["nvcc"] = _nvcc_version(nvcc) if nvcc is not None else None
    return found


def _nvcc_version(nvcc: Path) -> str:
    result = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"V([\d.]+)", result.stdout)
    return match[1] if match else "unknown"


def _first_line(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.splitlines()[0].strip() if result.returncode == 0 and result.stdout else ""


def load_setup() -> ModuleType:
    """setup.py as a module: where nvcc is, and how kernels are compiled."""
    specification = importlib.util.spec_from_file_location("moe_efa_setup", ROOT / "setup.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module
