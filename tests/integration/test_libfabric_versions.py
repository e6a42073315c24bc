"""One binary, every libfabric on this machine: the same bits through the system's and an installed package's."""

from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_efa import _C, libfabric

BENCH = [
    *(sys.executable, "-c", "from moe_efa.cli import main; raise SystemExit(main())", "bench"),
    *("--ranks", "4", "--node-size", "2", "--tokens", "96", "--hidden", "130", "--iters", "1", "--warmup", "0"),
    *("--no-baseline", "--json", "-"),
]


def libraries() -> dict[str, str]:
    """Paths by a short name; the empty one is left for a machine without any."""
    found = {}
    system = ctypes.util.find_library("fabric")
    if system is not None:
        found["system"] = system
    for hint in libfabric.search_path()["libfabric_hints"]:
        if Path(hint).exists():
            found[f"package-{len(found)}"] = hint
    return found


@pytest.mark.skipif(not libraries(), reason="no libfabric on this machine")
@pytest.mark.parametrize("name", sorted(libraries()))
def test_round_over(name: str, tmp_path: Path) -> None:
    path = libraries()[name]
    done = subprocess.run(
        BENCH,
        cwd=tmp_path,
        env={**os.environ, "MOE_EFA_LIBFABRIC": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    version = version_of(path)
    assert f" {version} " in result["conditions"]["transport"]
    assert "bit by bit" in result["checks"]["small"]


def version_of(path: str) -> str:
    """Version of a library, asked in a process of its own: a process opens one libfabric for good."""
    code = f"from moe_efa import _C; print(_C.build_info(libfabric={path!r})['libfabric_version'])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


LOADED = """
from moe_efa import _C, libfabric
search = libfabric.search_path() | {"libfabric": LIBRARY}
print(_C.build_info(**search)["libfabric_path"])
print(*_C.libfabric_providers(**search))
maps = open("/proc/self/maps").read()
print("libefa-fi.so" in maps)
"""


@pytest.mark.parametrize("name", [name for name in sorted(libraries()) if name != "system"])
@pytest.mark.parametrize("provider_path", ["unset", "elsewhere"])
def test_plugins_beside_a_packages_library_are_found_unless_the_user_says_where(
    name: str, provider_path: str, tmp_path: Path
) -> None:
    path = libraries()[name]
    environment = {key: value for key, value in os.environ.items() if key != "FI_PROVIDER_PATH"}
    if provider_path == "elsewhere":
        environment["FI_PROVIDER_PATH"] = str(tmp_path)
    code = LOADED.replace("LIBRARY", repr(path))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    found, providers, loaded = done.stdout.splitlines()
    assert Path(found).resolve() == Path(path).resolve()
    assert "tcp" in providers.split()  # with and without the plug-ins
    hosted = all(ctypes.util.find_library(library) for library in ("ibverbs", "efa"))
    plugin = (Path(path).parent / "libfabric" / "libefa-fi.so").exists()
    assert loaded == str(hosted and plugin and provider_path == "unset")


def test_this_build_has_the_rail() -> None:
    assert _C.build_info()["libfabric_built"]
