"""Every CUDA kernel compiles for sm_80, sm_90a and sm_100a, without spills and within its registers and shared memory;
pack and pull move 16 bytes at a time and publish by a system-scope release. The library of them and of the device that
launches them is the one that setup.py builds. Needs nvcc, but neither a GPU nor a driver.

nvcc comes from PATH, from /usr/local/cuda, or from the Python packages of the extra `test`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from moe_efa import ConfigError, device

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "cuda-tests"
SOURCES = ROOT / "csrc" / "kernels" / "cuda"
KERNELS = sorted(path.stem for path in SOURCES.glob("*.cu") if "__global__" in path.read_text())
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")  # what the package promises; setup.py says how each is compiled
REGISTERS_OF_SM = 65536
SHARED_BYTES = 48 * 1024  # what a launch gets without asking for more


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel on one architecture."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


def parse_usage(text: str) -> dict[tuple[str, str], Usage]:
    """(kernel, architecture) -> usage, from the output of `nvcc -Xptxas -v`."""
    usages = {}
    entry = re.compile(
        r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for match in entry.finditer(text):
        name = re.search(r"\d([a-z_]+_kernel)E", match["symbol"])
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        usages[name[1] if name else match["symbol"], match["arch"]] = Usage(
            registers=int(match["registers"]),
            stack_bytes=int(match["stack"]),
            spill_bytes=int(match["stores"]) + int(match["loads"]),
            shared_bytes=int(shared[1]) if shared else 0,
        )
    return usages


def find_nvcc(build: ModuleType) -> Path:
    """A CUDA compiler. Everywhere but on machines that the extra `test` has no compiler for, one has to be found."""
    nvcc: Path | None = build.find_nvcc()
    if nvcc is not None:
        return nvcc
    message = "no nvcc: install the extra `test` of moe_efa (x86_64), or a CUDA toolkit from 12.8 on"
    if platform.machine() != "x86_64":
        pytest.skip(message)
    pytest.fail(message)


def find_cuobjdump(nvcc: Path) -> Path:
    """cuobjdump of the toolkit, or the one that Triton carries."""
    candidates = [nvcc.parent / "cuobjdump", Path(shutil.which("cuobjdump") or "/nowhere")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    found = next((path for path in candidates if path.exists()), None)
    assert found is not None, "no cuobjdump beside nvcc, on PATH or in triton"
    return found


class Compiled:
    """The library, its objects and what ptxas said of them; kept until an input changes."""

    def __init__(self, build: ModuleType) -> None:
        nvcc = find_nvcc(build)
        self.cuobjdump = find_cuobjdump(nvcc)
        self.library = FOLDER / build.CUDA_LIBRARY
        objects = build.build_cuda_library(nvcc, FOLDER, self.library, ["-Werror=all-warnings", "-Xptxas=-v"])
        self.objects: dict[str, Path] = {path.stem: path for path in objects}
        self.reports = {stem: path.with_suffix(".log").read_text() for stem, path in self.objects.items()}

    def sass(self, stem: str, arch: str) -> list[str]:
        """The instructions of an object."""
        command = [self.cuobjdump, "-sass", "-arch", arch, self.objects[stem]]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]+);", text)


@pytest.fixture(scope="module")
def compiled(build: ModuleType) -> Compiled:
    return Compiled(build)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stem", KERNELS)
def test_kernels_fit_without_spills(stem: str, compiled: Compiled) -> None:
    usages = parse_usage(compiled.reports[stem])
    assert {arch for _, arch in usages} == set(ARCHITECTURES)
    bounds = re.findall(r"__launch_bounds__\((\w+)", (SOURCES / f"{stem}.cu").read_text())
    (threads,) = {constant(name) for name in bounds}
    for (kernel, arch), usage in usages.items():
        print(f"{kernel} {arch}: {usage}")
        assert usage.spill_bytes == 0, f"{kernel} spills on {arch}"
        assert usage.stack_bytes == 0, f"{kernel} has a stack on {arch}"
        assert usage.registers * threads <= REGISTERS_OF_SM, f"{kernel} does not fit on {arch}"
        assert usage.shared_bytes <= SHARED_BYTES


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("stem", [stem for stem in KERNELS if stem != "plan"])
def test_instructions(stem: str, arch: str, compiled: Compiled) -> None:
    instructions = compiled.sass(stem, arch)
    assert instructions, f"no code for {arch}"

    def all_that(pattern: str) -> list[int]:
        return [i for i, text in enumerate(instructions) if re.search(pattern, text)]

    assert all_that(r"\bLDG\.E\.128"), "loads of 16 bytes"
    assert all_that(r"\bSTG\.E\.128"), "stores of 16 bytes"
    assert not all_that(r"\b(LDL|STL)\b"), "memory of a thread: spilled, or indexed"
    assert not all_that(r"\bFFMA\.(FTZ|SAT)"), "flushes or saturates"
    # A release is a fence and a strong store; every wait is a strong load.
    releases = all_that(r"\bSTG?\.E\.64\.STRONG\.SYS")
    fences = all_that(r"\bMEMBAR\.\w+\.SYS")
    assert releases, "publishes"
    assert all(any(0 < release - fence < 24 for fence in fences) for release in releases), "a fence before each release"
    assert all_that(r"\bLDG?\.E\.64\.STRONG\.SYS"), "waits"


def constant(name: str) -> int:
    """The value of a kCamel constant of the CUDA kernels."""
    if name.isdigit():
        return int(name)
    for path in sorted(SOURCES.glob("*.h")):
        match = re.search(rf"constexpr std::uint32_t {name} = (\d+);", path.read_text())
        if match:
            return int(match[1])
    raise AssertionError(f"no constant {name}")


def test_every_kernel_is_loaded_before_one_may_wait() -> None:
    (loaded,) = re.findall(r"for \(const void\* kernel :\s*\{([^}]*)\}", (SOURCES / "cuda_device.cu").read_text())
    text = "".join((SOURCES / f"{stem}.cu").read_text() for stem in KERNELS)
    kernels = re.findall(r"__global__[^{;]*?\b(\w+)_kernel\(", text)
    assert len(kernels) == text.count("__global__")
    assert sorted(re.findall(r"(\w+)_kernel_entry\(\)", loaded)) == sorted(kernels)


def readelf(library: Path, *options: str) -> str:
    return subprocess.run(["readelf", "-W", *options, library], capture_output=True, text=True, check=True).stdout


@pytest.mark.timeout(900)
def test_library_exports_one_symbol_and_links_no_cuda(compiled: Compiled) -> None:
    symbols = [line.split() for line in readelf(compiled.library, "--dyn-syms").splitlines()]
    exported = [words[7] for words in symbols if len(words) > 7 and words[4] != "LOCAL" and words[6].isdecimal()]
    assert exported == ["moe_efa_open_device"]
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", readelf(compiled.library, "-d"))
    assert any(name.startswith("libstdc++") for name in needed), needed
    assert not [name for name in needed if any(word in name for word in ("cuda", "torch", "c10", "python"))]


@dataclass(frozen=True)
class Opened:
    """What moe_efa_open_device returned and wrote."""

    device: int | None
    error: str


def open_device(library: Path, *, abi: int, index: int, error_bytes: int = 1024) -> Opened:
    function = ctypes.CDLL(str(library)).moe_efa_open_device
    function.restype = ctypes.c_void_p
    function.argtypes = (ctypes.c_uint32, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
    error = ctypes.create_string_buffer(b"?" * 1024)
    device = function(abi, index, error, error_bytes)
    return Opened(device, error.value.decode())


def device_abi() -> int:
    match = re.search(r"kDeviceAbi = (\d+);", (ROOT / "csrc/kernels/device.h").read_text())
    assert match
    return int(match[1])


@pytest.mark.timeout(900)
def test_library_opens_without_a_driver_and_says_what_is_missing(compiled: Compiled) -> None:
    opened = open_device(compiled.library, abi=device_abi(), index=-1)
    assert opened.device is None
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert opened.error == "there is no NVIDIA driver (libcuda.so.1) here"
    else:
        assert "there is no GPU -1: this process sees" in opened.error
    assert open_device(compiled.library, abi=device_abi(), index=-1, error_bytes=9).error == opened.error[:8]
    with pytest.raises(ConfigError, match=f"{compiled.library}: {re.escape(opened.error)}"):
        device.facts(-1, library=compiled.library)


@pytest.mark.timeout(900)
def test_library_refuses_callers_of_another_build(compiled: Compiled) -> None:
    opened = open_device(compiled.library, abi=device_abi() + 1, index=0)
    assert opened.device is None
    assert f"device interface {device_abi()}, not {device_abi() + 1}" in opened.error
    assert "build moe_efa again" in opened.error


def test_choice_of_a_compiler(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toolkit, wheel = tmp_path / "toolkit", tmp_path / "wheel"
    for path, version in ((toolkit, "12.4"), (wheel, "13.0")):
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
        path.chmod(0o755)

    def choose(choice: str, *, found: Path | None, in_toolkit: bool) -> Path | None:
        monkeypatch.setenv("MOE_EFA_CUDA", choice)
        monkeypatch.setattr(build, "find_nvcc", lambda: found)
        monkeypatch.setattr(build, "find_toolkit_nvcc", lambda: found if in_toolkit else None)
        chosen: Path | None = build.chosen_nvcc()
        return chosen

    assert choose("0", found=wheel, in_toolkit=True) is None
    assert choose("", found=wheel, in_toolkit=True) == wheel
    assert choose("", found=wheel, in_toolkit=False) is None, "nobody asked"
    assert choose("1", found=wheel, in_toolkit=False) == wheel
    assert choose("", found=toolkit, in_toolkit=True) is None, "too old"
    for found, reason in ((None, "no nvcc"), (toolkit, r"CUDA 12\.4; 12\.8 or newer")):
        with pytest.raises(build.BuildError, match=reason):
            choose("1", found=found, in_toolkit=True)


def test_parser_sees_spills() -> None:
    text = """
ptxas info    : Compiling entry function '_ZN7moe_efa12_GLOBAL__N_111pack_kernelENS1_8PackArgsE' for 'sm_90a'
ptxas info    : Function properties for _ZN7moe_efa12_GLOBAL__N_111pack_kernelENS1_8PackArgsE
    24 bytes stack frame, 28 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 24 bytes cumulative stack size, 8 bytes smem, 776 bytes cmem[0]
"""
    assert parse_usage(text) == {("pack_kernel", "sm_90a"): Usage(64, 24, 64, 8)}


def test_gpu_check_refuses_where_there_is_no_gpu() -> None:
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("there may be a GPU: bench/gpu_check.py says more")
    result = subprocess.run(
        [sys.executable, ROOT / "bench" / "gpu_check.py"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "no GPU here" in result.stderr
