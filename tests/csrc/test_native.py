"""Every test_*.cc below this folder with the sanitizers of addresses and of undefined behaviour; each is one test.

Those whose names end in _threads are test_threads.py's.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SOURCES = sorted(path.relative_to(ROOT) for path in HERE.rglob("test_*.cc") if not path.stem.endswith("_threads"))
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# A libfabric 2.x that a Python package carries; the one of the system is what the loader finds by itself.
LIBFABRIC_2 = Path(sysconfig.get_path("data")) / "lib" / "mpich" / "libfabric.so.1"
LEAK_OPTIONS = f"suppressions={HERE / 'lsan.supp'}:print_suppressions=0"


def variants() -> list[Any]:
    """(source, libfabric to open): tests of the libfabric rail run once for each library that is here."""
    found = []
    for source in SOURCES:
        name = source.relative_to(HERE.relative_to(ROOT)).with_suffix("").as_posix()
        found.append(pytest.param(source, None, id=name))
        if source.name.startswith("test_libfabric") and LIBFABRIC_2.exists():
            found.append(pytest.param(source, LIBFABRIC_2, id=f"{name}-libfabric2"))
    return found


@pytest.fixture(scope="module")
def native_tests(native_test_builder: Any, build: ModuleType) -> Any:
    """Everything compiled, in parallel."""
    flags = [*SANITIZERS, *build.find_libfabric().flags]
    return native_test_builder(build, Path("native-tests"), flags, build.source_files(bindings=False), SOURCES)


@pytest.mark.timeout(1800)  # the first test waits for the compiler
@pytest.mark.parametrize(("source", "libfabric"), variants())
def test_native(source: Path, libfabric: Path | None, native_tests: Any) -> None:
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1", "LSAN_OPTIONS": LEAK_OPTIONS}
    environment.pop("MOE_EFA_LIBFABRIC", None)
    if libfabric is not None:
        environment["MOE_EFA_LIBFABRIC"] = str(libfabric)
    result = native_tests.run([str(native_tests.program(source))], environment)
    assert result.returncode == 0, f"exit status {result.returncode} of {source}"


def test_there_are_native_tests() -> None:
    assert SOURCES
