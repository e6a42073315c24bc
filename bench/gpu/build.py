"""Builds what runs on a GPU (tests of the CUDA kernels, the shim), and the shim on host threads for a dry run."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from .package import ROOT, WORK

HERE = Path("bench/gpu")
TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests/csrc/kernels").glob("test_cuda_*.cc"))
TESTS_MAIN = Path("tests/csrc/doctest_main.cc")
HOST_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-pthread", "-ffp-contract=off")
EMULATED_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-pthread", "-ffp-contract=off", "-fvisibility=hidden")
SHIM_NEEDS = ("pack.cc", "plan.cc", "quantize.cc", "rows.cc", "stream.cc")  # of csrc/kernels/cpu
TEST_FLAGS = ("-DMOE_EFA_MUTANTS=1", "-DMOE_EFA_TEST_ON_GPU=1", "-isystem", str(HERE / "doctest-include"))


def shim_path(*, dry_run: bool) -> Path:
    """Where the shim is built."""
    return WORK / ("libshim_emulated.so" if dry_run else "libshim.so")


def architecture(capability: list[int] | None) -> str:
    """For what GPU to compile: Hopper and Blackwell have code of their own kind. None: Hopper."""
    if capability is None:
        return "sm_90a"
    name = f"sm_{capability[0]}{capability[1]}"
    return f"{name}a" if capability[0] >= 9 else name


def cuda_sources() -> list[Path]:
    """The kernels' translation units: those with a body beside them."""
    folder = ROOT / "csrc/kernels/cuda"
    return [path.relative_to(ROOT) for path in sorted(folder.glob("*.cu")) if (folder / f"{path.stem}_body.h").exists()]


def host_sources() -> list[Path]:
    """The CPU kernels, and what belongs to the CUDA ones on the host."""
    cuda = [path for path in ("fault.cc", "plan_view.cc") if (ROOT / "csrc/kernels/cuda" / path).exists()]
    cpu = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc/kernels/cpu").glob("*.cc"))
    return [*cpu, *(Path("csrc/kernels/cuda") / path for path in cuda)]


def build_for_gpu(setup: ModuleType, nvcc: Path, arch: str) -> list[Path]:
    """Compiles with nvcc for one architecture; returns the test programs. The shim lies at shim_path().

    Raises:
        setup.BuildError, subprocess.CalledProcessError: a compiler or the linker refuses.
    """
    kernels = [*cuda_sources(), HERE / "waits.cu"]
    common, shim = host_sources(), HERE / "kernels_shim.cc"
    include = ["-isystem", str(setup.cuda_toolkit(nvcc) / "include")]
    generic = [flag for flag in setup.CUDA_COMPILE_FLAGS if not flag.startswith("-gencode")]
    code = f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"
    flags = {path: [*generic, code, "-Xcompiler=-fPIC"] for path in kernels}
    flags |= {path: [*HOST_FLAGS, "-O3"] for path in common}  # large results are compared with theirs
    flags |= {path: [*HOST_FLAGS, *TEST_FLAGS, *include] for path in (TESTS_MAIN, *TESTS)}
    flags[shim] = [*HOST_FLAGS, "-fvisibility=hidden", "-DMOE_EFA_SHIM_ON_GPU=1", *include]
    sources = [*kernels, *common, TESTS_MAIN, *TESTS, shim]
    objects = dict(zip(sources, setup.ObjectCompiler(WORK / "objects").compile(sources, flags), strict=True))
    runtime = [*cuda_runtime(setup, nvcc), "-ldl", "-lrt"]
    shared = [objects[path] for path in (*kernels, *common)]

    def link(test: Path) -> Path:
        target = WORK / test.stem
        _link(setup, [objects[test], objects[TESTS_MAIN], *shared], target, runtime)
        return target

    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(link, TESTS))
    _link(setup, [objects[shim], *shared], shim_path(dry_run=False), ["-shared", "-Wl,-z,defs", *runtime])
    return programs


def cuda_runtime(setup: ModuleType, nvcc: Path) -> list[str]:
    """Linker flags for the CUDA runtime: the static one, or where there is none the one that torch brings."""
    try:
        return list(setup.cuda_link_flags(nvcc))
    except setup.BuildError:
        packages = Path(sysconfig.get_path("purelib")) / "nvidia"
        shared = sorted(packages.glob("*/lib/libcudart.so.*"))
        if not shared:
            raise
        return [str(shared[-1]), f"-Wl,-rpath,{shared[-1].parent}"]


def build_emulated(setup: ModuleType) -> None:
    """The shim whose kernels run on host threads."""
    kernels = [path for path in host_sources() if path.parent.name == "cuda" or path.name in SHIM_NEEDS]
    sources = [HERE / "emulated_launch.cc", HERE / "kernels_shim.cc", *kernels]
    flags = {path: [*EMULATED_FLAGS, "-Itests/csrc/kernels"] for path in sources}
    objects = setup.ObjectCompiler(WORK / "emulated").compile(sources, flags)
    _link(setup, objects, shim_path(dry_run=True), ["-shared", "-Wl,-z,defs"])


def _link(setup: ModuleType, objects: list[Path], target: Path, flags: list[str]) -> None:
    partial = target.with_name(f"{target.name}.{os.getpid()}")  # whoever has loaded the old one keeps it
    command = [*setup.compiler(), *map(str, objects), "-o", str(partial), "-pthread", *flags]
    subprocess.run(command, check=True, cwd=ROOT)
    partial.replace(target)
