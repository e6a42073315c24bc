"""Builds csrc/ (without the bindings) and every test_*.cc below this folder with sanitizers; each program is one test.

Tests whose names end in _threads are built with a thread sanitizer, and with the sources that they need. Objects are
kept in build/native-tests and build/thread-tests, so only what changed is compiled again. MOE_EFA_MUTANTS is defined:
the wrong variants of the protocol (csrc/common/mutant.h) exist here, so that tests can show that they are caught.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
ALL_SOURCES = sorted(path.relative_to(ROOT) for path in HERE.rglob("test_*.cc"))
SOURCES = [path for path in ALL_SOURCES if not path.stem.endswith("_threads")]
THREAD_SOURCES = [path for path in ALL_SOURCES if path.stem.endswith("_threads")]
FOLDER = ROOT / "build" / "native-tests"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD_FOLDER = ROOT / "build" / "thread-tests"
THREAD_SANITIZER = ["-fsanitize=thread"]
# Everything that runs where ranks are threads, built without libfabric.
THREAD_LIBRARY = re.compile(
    r"csrc/(engine|kernels/(cpu|cuda|device)|transport|runtime)/|csrc/simulator/(workload|reference)"
)
FLAGS = ["-std=c++20", "-O1", "-g1", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", "-DMOE_EFA_MUTANTS=1"]
EMULATED_DEVICE = HERE.relative_to(ROOT) / "device" / "emulated_device.cc"
# A libfabric 2.x that a Python package carries; the one of the system is what the loader finds by itself.
LIBFABRIC_2 = Path(sysconfig.get_path("data")) / "lib" / "mpich" / "libfabric.so.1"
LEAK_OPTIONS = f"suppressions={HERE / 'lsan.supp'}:print_suppressions=0"
TIMEOUT_S = 300


def variants() -> list[Any]:
    """(source, libfabric to open): tests of the libfabric rail run once for each library that is here."""
    found = []
    for source in SOURCES:
        name = source.relative_to(HERE.relative_to(ROOT)).with_suffix("").as_posix()
        found.append(pytest.param(source, None, id=name))
        if source.name.startswith("test_libfabric") and LIBFABRIC_2.exists():
            found.append(pytest.param(source, LIBFABRIC_2, id=f"{name}-libfabric2"))
    return found


class NativeTests:
    """The library as an archive, and a program for each test."""

    def __init__(
        self, build: ModuleType, folder: Path, flags: list[str], library: list[Path], tests: list[Path]
    ) -> None:
        self.build, self.folder = build, folder
        self.sanitizers = [flag for flag in flags if "sanitize" in flag]
        self.flags = [*FLAGS, *flags]
        self.archive = folder / "libmoe_efa.a"
        self.archive.unlink(missing_ok=True)
        objects = self._compile(library)
        subprocess.run(["ar", "rcs", str(self.archive), *map(str, objects)], check=True)
        with contextlib.suppress(build.BuildError):  # a test that does not compile fails by itself, in `program`
            self._compile(tests)

    def program(self, source: Path) -> Path:
        target = self.folder / source.with_suffix("")
        (test,) = self._compile([source])
        self._library(source)
        link = [*self.build.compiler(), *self.sanitizers, str(test), str(self.archive), "-o", str(target)]
        subprocess.run([*link, "-pthread", "-ldl", "-lrt"], check=True)
        return target

    def _library(self, test: Path) -> None:
        """What test_a.cc opens at run time: a_stand_in.so beside the program, where its source has an a_stand_in.cc.

        So does test_a_threads.cc.
        """
        source = test.with_name(f"{test.stem.removeprefix('test_').removesuffix('_threads')}_stand_in.cc")
        if (ROOT / source).exists():
            (library,) = self._compile([source], "-fPIC", "-fvisibility=hidden")
            target = self.folder / source.with_suffix(".so")
            link = [*self.build.compiler(), *self.sanitizers, "-shared", str(library), "-o", str(target)]
            subprocess.run([*link, "-Wl,-z,defs", "-pthread"], check=True)

    def _compile(self, sources: list[Path], *more: str) -> list[Path]:
        flags = [*self.flags, *more]
        objects: list[Path] = self.build.ObjectCompiler(self.folder).compile(sources, dict.fromkeys(sources, flags))
        return objects


@pytest.fixture(scope="module")
def tools(build: ModuleType) -> None:
    """Skips where there is no compiler or no doctest."""
    if shutil.which("g++") is None and "CXX" not in os.environ:
        pytest.skip("no C++ compiler")
    probe = [*build.compiler(), "-E", "-x", "c++", "-"]
    if subprocess.run(probe, input=b"#include <doctest/doctest.h>\n", capture_output=True, check=False).returncode:
        pytest.skip("no doctest/doctest.h (Debian/Ubuntu: apt-get install doctest-dev)")


@pytest.fixture(scope="module")
def native_tests(tools: None, build: ModuleType) -> NativeTests:
    """Everything compiled, in parallel."""
    flags = [*SANITIZERS, *build.find_libfabric().flags]
    library = [*build.source_files(bindings=False), EMULATED_DEVICE]
    return NativeTests(build, FOLDER, flags, library, SOURCES)


@pytest.fixture(scope="module")
def thread_tests(tools: None, build: ModuleType) -> NativeTests:
    """What the tests of threads need, with a thread sanitizer."""
    library = [path for path in build.source_files(bindings=False) if THREAD_LIBRARY.match(path.as_posix())]
    library.append(EMULATED_DEVICE)
    return NativeTests(build, THREAD_FOLDER, THREAD_SANITIZER, library, THREAD_SOURCES)


@pytest.mark.timeout(1800)  # the first test waits for the compiler
@pytest.mark.parametrize(("source", "libfabric"), variants())
def test_native(source: Path, libfabric: Path | None, native_tests: NativeTests) -> None:
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1", "LSAN_OPTIONS": LEAK_OPTIONS}
    environment.pop("MOE_EFA_LIBFABRIC", None)
    if libfabric is not None:
        environment["MOE_EFA_LIBFABRIC"] = str(libfabric)
    result = run([str(native_tests.program(source))], environment)
    assert result.returncode == 0, f"exit status {result.returncode} of {source}"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("source", THREAD_SOURCES, ids=lambda source: source.stem)
def test_threads(source: Path, thread_tests: NativeTests) -> None:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 second_deadlock_stack=1"}
    program = str(thread_tests.program(source))
    result = run([program], environment)
    if "unexpected memory mapping" in result.stdout and shutil.which("setarch"):
        # Older sanitizers do not stand the address randomization of newer kernels.
        result = run(["setarch", "-R", program], environment)
    assert result.returncode == 0, f"exit status {result.returncode} of {source}"


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=TIMEOUT_S,
        check=False,
    )
    print(result.stdout)
    return result


def test_there_are_native_tests() -> None:
    assert SOURCES
    assert THREAD_SOURCES
