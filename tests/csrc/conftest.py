"""Builds csrc/ (without the bindings) and test_*.cc below this folder with a sanitizer, for test_native.py and
test_threads.py.

Objects are kept, so only what changed is compiled again. MOE_EFA_MUTANTS is defined: the wrong variants of the protocol
(csrc/common/mutant.h) exist here, so that tests can show that they are caught.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent.relative_to(ROOT)
COMMON = [HERE / "doctest_main.cc", HERE / "device" / "emulated_device.cc"]
FLAGS = ["-std=c++20", "-O1", "-g1", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", "-DMOE_EFA_MUTANTS=1"]
TIMEOUT_S = 300


class NativeTests:
    """The library as an archive, and a program for each test."""

    def __init__(
        self, build: ModuleType, folder: Path, flags: list[str], library: list[Path], tests: list[Path]
    ) -> None:
        if shutil.which("g++") is None and "CXX" not in os.environ:
            pytest.skip("no C++ compiler")
        probe = [*build.compiler(), "-E", "-x", "c++", "-"]
        if subprocess.run(probe, input=b"#include <doctest/doctest.h>\n", capture_output=True, check=False).returncode:
            pytest.skip("no doctest/doctest.h (Debian/Ubuntu: apt-get install doctest-dev)")
        self.build, self.folder = build, ROOT / "build" / folder
        self.sanitizers = [flag for flag in flags if "sanitize" in flag]
        self.flags = [*FLAGS, *flags]
        self.archive = self.folder / "libmoe_efa.a"
        self.archive.unlink(missing_ok=True)
        objects = self._compile([*library, *COMMON])
        subprocess.run(["ar", "rcs", str(self.archive), *map(str, objects)], check=True)
        with contextlib.suppress(build.BuildError):  # a test that does not compile fails by itself, in `program`
            self._compile(tests)

    def program(self, source: Path) -> Path:
        """The test as an executable."""
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

    @staticmethod
    def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Its output is the test's."""
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


@pytest.fixture(scope="session")
def native_test_builder() -> type[NativeTests]:
    """See :class:`NativeTests`."""
    return NativeTests
