"""Every CUDA kernel compiles for sm_80, sm_90a and sm_100a, without spills and within its registers and shared memory;
pack and pull move 16 bytes at a time and publish by a system-scope release. Needs nvcc, but neither a GPU nor a driver.

nvcc comes from PATH, from /usr/local/cuda, or from the Python packages of the extra `test`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "cuda-tests"
SOURCES = sorted((ROOT / "csrc" / "kernels" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")  # what the package promises; setup.py says how each is compiled
JOBS = 2
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
    """The objects and what ptxas said of them; kept until an input changes."""

    def __init__(self, build: ModuleType) -> None:
        self.nvcc = find_nvcc(build)
        self.flags = [*build.CUDA_COMPILE_FLAGS, "-Werror=all-warnings", "-Xptxas=-v"]
        self.cuobjdump = find_cuobjdump(self.nvcc)
        FOLDER.mkdir(parents=True, exist_ok=True)
        version = subprocess.run([self.nvcc, "--version"], capture_output=True, check=True).stdout
        digest = hashlib.sha256(version + " ".join(self.flags).encode())
        for path in sorted((ROOT / "csrc").rglob("*")):
            if path.suffix == ".h" and path.parts[len(ROOT.parts) + 1] in ("common", "proto", "kernels"):
                digest.update(path.read_bytes())
        self.inputs = digest.hexdigest()
        with ThreadPoolExecutor(JOBS) as pool:
            self.reports = dict(zip([path.stem for path in SOURCES], pool.map(self.compile, SOURCES), strict=True))

    def compile(self, source: Path) -> str:
        """Compiles for all architectures in one call; returns what was printed."""
        target, log, stamp = (FOLDER / f"{source.stem}{suffix}" for suffix in (".o", ".log", ".stamp"))
        signature = hashlib.sha256(self.inputs.encode() + source.read_bytes()).hexdigest()
        if target.exists() and log.exists() and stamp.exists() and stamp.read_text() == signature:
            return log.read_text()
        stamp.unlink(missing_ok=True)
        command = [self.nvcc, *self.flags, "-Icsrc", "-c", source, "-o", target]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        text = result.stdout + result.stderr
        assert result.returncode == 0, f"nvcc refuses {source.name}:\n{text}"
        log.write_text(text)
        stamp.write_text(signature)
        return text

    def sass(self, stem: str, arch: str) -> list[str]:
        """The instructions of an object."""
        command = [self.cuobjdump, "-sass", "-arch", arch, FOLDER / f"{stem}.o"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]+);", text)


@pytest.fixture(scope="module")
def compiled(build: ModuleType) -> Compiled:
    return Compiled(build)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stem", [path.stem for path in SOURCES])
def test_kernels_fit_without_spills(stem: str, compiled: Compiled) -> None:
    usages = parse_usage(compiled.reports[stem])
    assert {arch for _, arch in usages} == set(ARCHITECTURES)
    bounds = re.findall(r"__launch_bounds__\((\w+)", (ROOT / "csrc/kernels/cuda" / f"{stem}.cu").read_text())
    (threads,) = {constant(name) for name in bounds}
    for (kernel, arch), usage in usages.items():
        print(f"{kernel} {arch}: {usage}")
        assert usage.spill_bytes == 0, f"{kernel} spills on {arch}"
        assert usage.stack_bytes == 0, f"{kernel} has a stack on {arch}"
        assert usage.registers * threads <= REGISTERS_OF_SM, f"{kernel} does not fit on {arch}"
        assert usage.shared_bytes <= SHARED_BYTES


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("stem", [path.stem for path in SOURCES if path.stem != "plan"])
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
    for path in sorted((ROOT / "csrc/kernels/cuda").glob("*.h")):
        match = re.search(rf"constexpr std::uint32_t {name} = (\d+);", path.read_text())
        if match:
            return int(match[1])
    raise AssertionError(f"no constant {name}")


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
