"""Builds moe_efa and its native extension moe_efa._C (pybind11; neither torch nor libfabric is linked).

Read from the environment: CXX and CXXFLAGS as usual; MOE_EFA_NO_LIBFABRIC=1 leaves the libfabric rail out;
MOE_EFA_CUDA=1 builds the CUDA kernels in, with nvcc; MOE_EFA_BUILD_JOBS bounds the compilers that run at once. Objects
are kept in build/, so a second build compiles what changed. Everything that is not code is in pyproject.toml.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCE_FOLDERS = (
    "common",
    "proto",
    "engine",
    "transport",
    "kernels",
    "kernels/cpu",
    "kernels/cuda",
    "kernels/device",
    "simulator",
    "runtime",
    "bindings",
)
EFA_INSTALLER_INCLUDE = Path("/opt/amazon/efa/include")
COMPILE_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # products and sums are rounded one by one, so that all implementations agree bitwise
    "-Wall",
    "-Wextra",
)
CUDA_ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
CUDA_COMPILE_FLAGS = (
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",  # csrc/proto is constexpr, for host and device alike
    "-fmad=false",  # as -ffp-contract=off
    "-Xcompiler=-Wall",
    *(f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in CUDA_ARCHITECTURES),
)
LINK_FLAGS = ("-shared", "-pthread", "-Wl,--as-needed", "-ldl", "-lrt")


class BuildError(RuntimeError):
    """The extension cannot be built here; the message says what is missing."""


@dataclass(frozen=True)
class Libfabric:
    """The libfabric headers to compile against. The library itself is opened at run time."""

    version: str | None  # None: no headers
    include_dir: Path | None = None  # None: the compiler finds them by itself

    @property
    def flags(self) -> list[str]:
        flags = [f"-DMOE_EFA_HAVE_LIBFABRIC={int(self.version is not None)}"]
        return flags if self.include_dir is None else [*flags, "-isystem", str(self.include_dir)]


def compiler() -> list[str]:
    """The C++ compiler as an argument list."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler: install g++ 11 or newer (Debian/Ubuntu: apt-get install g++), or set CXX")


def find_nvcc() -> Path | None:
    """nvcc on PATH, of the usual toolkit, or of NVIDIA's Python packages."""
    wheels = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"))
    candidates = [Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"), *wheels]
    return next((path.resolve() for path in candidates if path.exists()), None)


def asked_for_cuda() -> Path | None:
    """The nvcc to build CUDA kernels with, where MOE_EFA_CUDA=1 asks for them."""
    if os.environ.get("MOE_EFA_CUDA", "0") in ("", "0"):
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("MOE_EFA_CUDA=1, but no nvcc on PATH, in /usr/local/cuda or in NVIDIA's Python packages")
    return nvcc


def cuda_toolkit(nvcc: Path) -> Path:
    """Where nvcc takes its headers and libraries from: it may be a script elsewhere."""
    command = [str(nvcc), "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(r"^#\$ TOP=(.+)$", result.stderr, re.MULTILINE)
    return Path(match[1]).resolve() if match else nvcc.parents[1]


def cuda_link_flags(nvcc: Path) -> list[str]:
    """The static CUDA runtime, so that the extension also loads where there is none."""
    toolkit = cuda_toolkit(nvcc)
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        library = toolkit / folder / "libcudart_static.a"
        if library.exists():
            return [str(library)]
    raise BuildError(f"no libcudart_static.a below {toolkit}")


def find_libfabric() -> Libfabric:
    """Asks the preprocessor for <rdma/fabric.h>, first in its own search path, then where the EFA installer puts it."""
    if os.environ.get("MOE_EFA_NO_LIBFABRIC", "0") not in ("", "0"):
        return Libfabric(None)
    probe = "#include <rdma/fabric.h>\nmoe_efa_probe FI_MAJOR_VERSION FI_MINOR_VERSION\n"
    for include_dir in (None, EFA_INSTALLER_INCLUDE):
        flags = [] if include_dir is None else ["-isystem", str(include_dir)]
        command = [*compiler(), *flags, "-E", "-P", "-x", "c++", "-"]
        result = subprocess.run(command, input=probe, capture_output=True, text=True, check=False)
        match = re.search(r"moe_efa_probe (\d+) (\d+)", result.stdout)
        if result.returncode == 0 and match:
            return Libfabric(f"{match[1]}.{match[2]}", include_dir)
    return Libfabric(None)


def source_files(*, bindings: bool = True) -> list[Path]:
    """The translation units of the library for the C++ compiler, relative to the root."""
    folders = [folder for folder in SOURCE_FOLDERS if bindings or folder != "bindings"]
    return [path.relative_to(ROOT) for folder in folders for path in sorted((ROOT / "csrc" / folder).glob("*.cc"))]


def warn(message: str) -> None:
    """Prints to stderr and, where a front end such as pip swallows that, to the terminal of the user who waits."""
    print(message, file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        return
    with contextlib.suppress(OSError):
        terminal = os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY)
        try:
            if os.tcgetpgrp(terminal) == os.getpgrp():
                os.write(terminal, f"\n{message}\n".encode())
        finally:
            os.close(terminal)


class ObjectCompiler:
    """Compiles translation units into one folder, in parallel, and skips those whose inputs did not change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def compile(self, sources: list[Path], flags: dict[Path, list[str]]) -> list[Path]:
        """Compiles `sources` with `flags` for each; returns the objects, in the same order."""
        jobs = int(os.environ.get("MOE_EFA_BUILD_JOBS", "0")) or os.cpu_count() or 2
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock, ThreadPoolExecutor(max_workers=jobs) as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one build at a time in one tree
            futures = [pool.submit(self._compile_one, source, flags[source]) for source in sources]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _compile_one(self, source: Path, flags: list[str]) -> Path:
        target = self.folder / source.with_suffix(".o")
        # -MMD leaves system headers out: those of the isolated build environment move with every build.
        depends, stamp = target.with_suffix(".d"), target.with_suffix(".cmd")
        tool = [str(find_nvcc())] if source.suffix == ".cu" else compiler()
        command = [*tool, *flags, "-Icsrc", "-MMD", "-MF", str(depends), "-c", str(source), "-o", str(target)]
        signature = "\n".join([*_without_system_folders(command), sysconfig.get_python_version()])
        if self._up_to_date(target, depends, stamp, signature):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        print(f"compiling {source}", flush=True)
        start = time.time_ns()
        _run(command)
        os.utime(target, ns=(start, start))  # an input that was edited during the compilation is newer
        stamp.write_text(signature)
        return target

    @staticmethod
    def _up_to_date(target: Path, depends: Path, stamp: Path, signature: str) -> bool:
        if not (target.exists() and depends.exists() and stamp.exists()) or stamp.read_text() != signature:
            return False
        inputs = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        built = target.stat().st_mtime_ns
        return all((ROOT / name).exists() and (ROOT / name).stat().st_mtime_ns <= built for name in inputs)


def _without_system_folders(command: list[str]) -> list[str]:
    kept = iter(command)
    return [word for word in kept if word != "-isystem" or not next(kept)]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, cwd=ROOT, check=False)
    if result.returncode != 0:
        raise BuildError(f"exit status {result.returncode} from: {shlex.join(command)}")


class BuildExtension(build_ext):
    """Compiles csrc/ with one command per translation unit and links it to moe_efa/_C."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        libfabric = find_libfabric()
        if libfabric.version is None:
            warn(
                "moe_efa WARNING: building without libfabric: ranks on different nodes will not be able to talk.\n"
                "  Its headers (rdma/fabric.h) are neither in the compiler's search path nor in "
                f"{EFA_INSTALLER_INCLUDE}.\n"
                "  Install libfabric-dev (Debian/Ubuntu), libfabric-devel (Amazon Linux, RHEL) or the AWS EFA "
                "installer, then install moe_efa again."
            )
        else:
            print(f"libfabric headers {libfabric.version}: {libfabric.include_dir or 'system'}", flush=True)

        python_include = Path(sysconfig.get_path("include"))
        if not (python_include / "Python.h").exists():
            raise BuildError(f"no Python.h in {python_include}: install python3-dev (Debian/Ubuntu) or python3-devel")
        common = [*COMPILE_FLAGS, *libfabric.flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        # Only the bindings can see Python and pybind11. The version stands in the flags because the folder does not
        # count for "up to date".
        binding_flags = [f"-DMOE_EFA_PYBIND11_VERSION={pybind11.__version__}"]
        for include in (python_include, Path(pybind11.get_include())):
            binding_flags += ["-isystem", str(include)]

        sources = source_files()
        nvcc = asked_for_cuda()
        binding_flags.append(f"-DMOE_EFA_HAVE_CUDA={int(nvcc is not None)}")
        flags = {path: common + (binding_flags if path.parts[1] == "bindings" else []) for path in sources}
        link_flags = list(LINK_FLAGS)
        if nvcc is not None:
            link_flags += cuda_link_flags(nvcc)
            kernels = sorted((ROOT / "csrc" / "kernels" / "cuda").glob("*.cu"))
            for path in (kernel.relative_to(ROOT) for kernel in kernels):
                sources.append(path)
                flags[path] = [*CUDA_COMPILE_FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden"]
        objects = ObjectCompiler(ROOT / "build" / f"objects-{sysconfig.get_platform()}").compile(sources, flags)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        _run([*compiler(), *map(str, objects), "-o", str(target), *link_flags])


def packages() -> tuple[list[str], dict[str, str]]:
    """Packages and where they lie. triton_kernels/ itself is no package: its name belongs to an unrelated project."""
    kernels = ROOT / "triton_kernels" / "src"
    nested = [f"moe_efa.triton_kernels.{name}" for name in find_packages(str(kernels))]
    names = [*find_packages(str(ROOT), include=["moe_efa", "moe_efa.*"]), "moe_efa.triton_kernels", *nested]
    return names, {"moe_efa.triton_kernels": "triton_kernels/src"}


def main() -> None:
    os.chdir(ROOT)
    names, folders = packages()
    options: dict[str, Any] = {"packages": names, "package_dir": folders}
    sources = [str(path) for path in source_files()]
    extension = Extension("moe_efa._C", sources, language="c++")
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension}, **options)


if __name__ == "__main__":
    main()
