"""The native sources compile and link for aarch64, and the row kernels give the same bits there (in an emulator)."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "aarch64-tests"
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
SYSTEM_ROOT = Path("/usr/aarch64-linux-gnu")
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", "-DMOE_EFA_MUTANTS=1"]
MAIN = Path("tests/csrc/doctest_main.cc")
KERNEL_TESTS = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "tests" / "csrc" / "kernels").glob("test_*.cc")
    if not path.name.startswith("test_cuda_")  # bodies of GPU kernels, whatever the host
)

pytestmark = [
    pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is one: the other tests say it all"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER} (apt-get install g++-aarch64-linux-gnu)"),
]


def headers(name: str) -> list[str]:
    """Flags for a header-only folder of the system, without the rest of /usr/include, which is for another machine."""
    if not Path("/usr/include", name).is_dir():
        return []
    folder = FOLDER / "include"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / name
    if not link.is_symlink():
        link.symlink_to(Path("/usr/include", name))
    return ["-isystem", str(folder)]


class CrossBuild:
    """The library for aarch64 as a shared object without undefined symbols."""

    def __init__(self, build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", COMPILER)
        libfabric = headers("rdma")
        self.build = build
        self.flags = [*FLAGS, f"-DMOE_EFA_HAVE_LIBFABRIC={int(bool(libfabric))}", *libfabric, *headers("doctest")]
        self.objects = self.compile(build.source_files(bindings=False))
        self.library = FOLDER / "libmoe_efa.so"
        self.link(["-shared", "-Wl,-z,defs", *map(str, self.objects)], self.library)

    def compile(self, sources: list[Path]) -> list[Path]:
        objects: list[Path] = self.build.ObjectCompiler(FOLDER).compile(sources, dict.fromkeys(sources, self.flags))
        return objects

    def link(self, arguments: list[str], target: Path) -> None:
        subprocess.run([COMPILER, *arguments, "-o", str(target), "-pthread", "-ldl", "-lrt"], check=True)


@pytest.fixture(scope="module")
def cross_build(build: ModuleType) -> CrossBuild:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return CrossBuild(build, monkeypatch)


@pytest.mark.timeout(900)
def test_library_links_for_aarch64(cross_build: CrossBuild) -> None:
    described = subprocess.run(["file", "-b", str(cross_build.library)], capture_output=True, text=True, check=False)
    if described.returncode == 0:
        assert "aarch64" in described.stdout
    assert cross_build.library.read_bytes()[18] == 183  # e_machine: EM_AARCH64


@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"no {EMULATOR} (apt-get install qemu-user)")
@pytest.mark.parametrize("source", KERNEL_TESTS, ids=lambda source: source.stem)
def test_kernels_on_aarch64(source: Path, cross_build: CrossBuild) -> None:
    if not headers("doctest"):
        pytest.skip("no doctest/doctest.h (Debian/Ubuntu: apt-get install doctest-dev)")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("CXX", COMPILER)
        test, main = cross_build.compile([source, MAIN])
    program = FOLDER / source.stem
    cross_build.link([str(test), str(main), *map(str, cross_build.objects)], program)
    subprocess.run([EMULATOR, "-L", str(SYSTEM_ROOT), str(program)], check=True, cwd=ROOT, timeout=500)
