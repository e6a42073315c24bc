"""Every test_*_threads.cc below this folder with the sanitizer of threads, and with the sources that they need."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.relative_to(ROOT) for path in Path(__file__).resolve().parent.rglob("test_*_threads.cc"))
# Everything that runs where ranks are threads, built without libfabric.
LIBRARY = re.compile(r"csrc/(engine|kernels/(cpu|cuda|device)|transport|runtime)/|csrc/simulator/(workload|reference)")


@pytest.fixture(scope="module")
def thread_tests(native_test_builder: Any, build: ModuleType) -> Any:
    """Everything compiled, in parallel."""
    library = [path for path in build.source_files(bindings=False) if LIBRARY.match(path.as_posix())]
    return native_test_builder(build, Path("thread-tests"), ["-fsanitize=thread"], library, SOURCES)


@pytest.mark.timeout(1800)  # the first test waits for the compiler
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_threads(source: Path, thread_tests: Any) -> None:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 second_deadlock_stack=1"}
    program = str(thread_tests.program(source))
    result = thread_tests.run([program], environment)
    if "unexpected memory mapping" in result.stdout and shutil.which("setarch"):
        # Older sanitizers do not stand the address randomization of newer kernels.
        result = thread_tests.run(["setarch", "-R", program], environment)
    assert result.returncode == 0, f"exit status {result.returncode} of {source}"


def test_there_are_tests_of_threads() -> None:
    assert SOURCES
