"""What `python -m build` and `pip install` give: a source archive that builds, a wheel and an editable install.

Everything happens in copies, with the tools that are installed here and nothing from the network. The extension is
compiled without optimization and the CUDA library is left out: these tests look at what is packaged, not at how fast it
is, and tests/csrc/test_cuda_compile.py builds that library.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

for module in ("build", "setuptools", "wheel", "pybind11"):
    pytest.importorskip(module, reason="not installed; the test extra has it")

pytestmark = pytest.mark.timeout(1200)  # the first test waits for the compiler

LEFT_OUT = (".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", ".hypothesis")
ENVIRONMENT = {**os.environ, "CXXFLAGS": "-O0", "MOE_EFA_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
PROBE = """
import importlib, importlib.metadata, importlib.util, json, os
import moe_efa, moe_efa._C
import moe_efa.triton_kernels
import moe_efa.triton_kernels.reference
folder = os.path.dirname(moe_efa.__file__)
print(json.dumps({
    "package": folder,
    "extension": moe_efa._C.__file__,
    "kernels": list(moe_efa.triton_kernels.__path__),
    "typed": [os.path.exists(os.path.join(folder, name)) for name in ("py.typed", "_C.pyi")],
    "version": [moe_efa.__version__, importlib.metadata.version("moe_efa")],
    "build_info": moe_efa.build_info(),
    "clash": repr(importlib.util.find_spec("triton_kernels")),
}))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a command and returns all that it prints; fails the test with it."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}"
    return result.stdout


def build(kind: str, source: Path, target: Path, **environment: str) -> tuple[Path, str]:
    """Builds an sdist or a wheel; returns the file and what was printed."""
    command = (sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", target, source)
    output = run(*command, cwd=target.parent, **environment)
    (built,) = target.iterdir()
    return built, output


class Environment:
    """A virtual environment that finds what is installed here, but not the moe_efa that is under development here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        (packages,) = folder.glob("lib/python*/site-packages")
        # Folders named in a .pth file are searched, but .pth files in them (so editable installs) are not read.
        inherited = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (packages / "inherited.pth").write_text("\n".join(inherited))

    def install(self, *arguments: str | Path) -> str:
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", "--no-index")
        return run(*pip, *arguments, cwd=self.folder)

    def probe(self) -> dict[str, Any]:
        output = run(self.python, "-I", "-c", PROBE, cwd=self.folder)
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def sdist(repo_root: Path, folder: Path) -> Path:
    checkout = folder / "checkout"
    shutil.copytree(repo_root, checkout, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return build("sdist", checkout, folder / "sdist")[0]


@pytest.fixture(scope="module")
def unpacked(sdist: Path, folder: Path) -> Path:
    """The source archive, unpacked: all that follows is built from it."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return source


@pytest.fixture(scope="module")
def wheel(unpacked: Path, folder: Path) -> Path:
    return build("wheel", unpacked, folder / "wheel")[0]


@pytest.fixture(scope="module")
def from_wheel(wheel: Path, folder: Path) -> Environment:
    environment = Environment(folder / "venv-wheel")
    environment.install(wheel)
    return environment


@pytest.fixture(scope="module")
def editable(unpacked: Path, wheel: Path, folder: Path) -> Environment:
    """After the wheel, whose objects it finds."""
    environment = Environment(folder / "venv-editable")
    environment.install("--no-build-isolation", "--editable", unpacked)
    return environment


def test_sdist_has_everything_to_build_and_test(sdist: Path, repo_root: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for pattern in ("csrc/**/*.h", "csrc/**/*.cc", "triton_kernels/src/*.py", "moe_efa/**/*.py", "tests/**/*.py"):
        wanted = {path.relative_to(repo_root).as_posix() for path in repo_root.glob(pattern)}
        assert wanted and wanted <= names, sorted(wanted - names)
    root_files = {"setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md", "CHANGELOG.md", ".clang-format"}
    assert root_files <= names, sorted(root_files - names)
    assert not [name for name in names if name.endswith((".so", ".o"))]


def test_wheel_has_the_package_and_nothing_else(wheel: Path, repo_root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"moe_efa", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}
    assert {"moe_efa/py.typed", "moe_efa/_C.pyi", "moe_efa/triton_kernels/quantize.py"} <= names
    modules = {path.relative_to(repo_root).as_posix() for path in (repo_root / "moe_efa").rglob("*.py")}
    assert modules <= names, sorted(modules - names)
    assert [name for name in names if name.endswith(".so")] == [
        name for name in names if name.startswith("moe_efa/_C.") and name.endswith(".so")
    ]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.parametrize("kind", ["from_wheel", "editable"])
def test_installed_package(kind: str, request: pytest.FixtureRequest, folder: Path, unpacked: Path) -> None:
    environment: Environment = request.getfixturevalue(kind)
    found = environment.probe()
    origin = environment.folder if kind == "from_wheel" else unpacked
    for path in (found["package"], found["extension"], *found["kernels"]):
        assert Path(path).is_relative_to(origin), path
    assert found["typed"] == [True, True]
    assert found["version"][0] == found["version"][1] == found["build_info"]["version"]
    assert str(folder) not in found["clash"], "our folder answers to `import triton_kernels`"


def test_extra_fabric_brings_a_libfabric(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    assert "Provides-Extra: fabric" in metadata
    assert re.search(r"^Requires-Dist: mpich>=5.*extra == .fabric", metadata, re.MULTILINE)


@pytest.mark.parametrize("kind", ["from_wheel", "editable"])
def test_command_is_installed(kind: str, request: pytest.FixtureRequest) -> None:
    environment: Environment = request.getfixturevalue(kind)
    assert "moe-efa" in run(environment.folder / "bin" / "moe-efa", "--help", cwd=environment.folder)


def test_extension_links_neither_torch_nor_libfabric(from_wheel: Environment) -> None:
    dynamic = run("readelf", "-d", from_wheel.probe()["extension"], cwd=from_wheel.folder)
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert any(name.startswith("libstdc++") for name in needed), needed
    assert not [name for name in needed if any(word in name for word in ("torch", "c10", "fabric", "python", "cuda"))]


def test_build_without_libfabric_warns_and_says_so(unpacked: Path, wheel: Path, folder: Path) -> None:
    assert wheel.exists()  # builds in one folder follow each other
    built, output = build("wheel", unpacked, folder / "wheel-without", MOE_EFA_NO_LIBFABRIC="1")
    assert "WARNING: building without libfabric" in output
    assert "libfabric-dev" in output and "EFA installer" in output
    environment = Environment(folder / "venv-without")
    environment.install(built)
    assert environment.probe()["build_info"]["libfabric_built"] is False


def test_build_with_libfabric_says_so(from_wheel: Environment) -> None:
    probe = subprocess.run(
        [os.environ.get("CXX", "g++"), "-E", "-x", "c++", "-isystem", "/opt/amazon/efa/include", "-"],
        input=b"#include <rdma/fabric.h>\n",
        capture_output=True,
        check=False,
    )
    assert from_wheel.probe()["build_info"]["libfabric_built"] is (probe.returncode == 0)
