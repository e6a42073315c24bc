"""Runs the tests of the CUDA kernels on a GPU: the same cases that `make test` runs on emulated threads, launched.

    python bench/gpu_check.py            # builds below build/gpu-check, then runs every case
    python bench/gpu_check.py --build    # only builds: needs nvcc, but no GPU

Every output is compared bit by bit with the CPU kernels. Nothing is timed. Exit status: 0 when all agree, 1 when not, 2
where this machine cannot tell (no GPU, nvcc, g++ or doctest).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "gpu-check"
TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests/csrc/kernels").glob("test_cuda_*.cc"))
HOST_FLAGS = ["-std=c++20", "-O2", "-pthread", "-ffp-contract=off", "-DMOE_EFA_MUTANTS=1"]


def refuse(why: str) -> None:
    """Ends the program where nothing can be said about a GPU."""
    print(f"gpu_check: {why}", file=sys.stderr)
    sys.exit(2)


def load_setup() -> ModuleType:
    """setup.py as a module: where nvcc is, and how kernels are compiled."""
    specification = importlib.util.spec_from_file_location("moe_efa_setup", ROOT / "setup.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def find_gpu() -> str:
    """The name of the first GPU, asked of the driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        refuse("no GPU here: there is no NVIDIA driver (libcuda.so.1)")
    count, device, name = ctypes.c_int(0), ctypes.c_int(0), ctypes.create_string_buffer(128)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        refuse("no GPU here: the NVIDIA driver finds none")
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, len(name), device)
    return name.value.decode()


def build(setup: ModuleType, nvcc: Path) -> list[Path]:
    """Compiles kernels and tests; returns the test programs."""
    kernels = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc/kernels/cuda").glob("*.cu"))
    host = [
        path.relative_to(ROOT)
        for folder in ("csrc/kernels/cpu", "csrc/kernels/cuda")
        for path in sorted((ROOT / folder).glob("*.cc"))
    ]
    include = ["-isystem", str(setup.cuda_toolkit(nvcc) / "include")]
    flags = {path: list(setup.CUDA_COMPILE_FLAGS) for path in kernels}
    flags |= dict.fromkeys(host, HOST_FLAGS)
    flags |= {path: [*HOST_FLAGS, "-DMOE_EFA_TEST_ON_GPU=1", *include] for path in TESTS}
    objects = setup.ObjectCompiler(FOLDER).compile([*kernels, *host, *TESTS], flags)
    common = [str(path) for path in objects[: -len(TESTS)]]

    def link(test: Path, object_file: Path) -> Path:
        target = FOLDER / test.stem
        command = [*setup.compiler(), str(object_file), *common, "-o", str(target), "-pthread"]
        subprocess.run([*command, *setup.cuda_link_flags(nvcc), "-ldl", "-lrt"], check=True, cwd=ROOT)
        return target

    with ThreadPoolExecutor() as pool:
        return list(pool.map(link, TESTS, objects[-len(TESTS) :]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="build the programs and stop")
    arguments = parser.parse_args()
    setup = load_setup()
    if not arguments.build:
        print(f"on {find_gpu()}", flush=True)
    nvcc = setup.find_nvcc()
    if nvcc is None:
        refuse("no nvcc on PATH, in /usr/local/cuda or in NVIDIA's Python packages")
    try:
        programs = build(setup, nvcc)
    except (setup.BuildError, subprocess.CalledProcessError) as error:
        refuse(f"cannot build: {error}")
    if arguments.build:
        return 0
    failed = [path.name for path in programs if subprocess.run([str(path)], cwd=ROOT, check=False).returncode != 0]
    print(
        f"{len(programs) - len(failed)} of {len(programs)} programs agree" + f"; not {', '.join(failed)}" * bool(failed)
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
