"""Builds moe_efa and its native extension moe_efa._C (pybind11; neither torch nor libfabric is linked).

Read from the environment: CXX and CXXFLAGS as usual; MOE_EFA_NO_LIBFABRIC=1 leaves the libfabric rail out;
MOE_EFA_CUDA=1 asks for the library that runs on GPUs, moe_efa/libmoe_efa_cuda.so, and MOE_EFA_CUDA=0 leaves it out
(unset: built where there is a CUDA toolkit); the extension does not link it, but opens it where a GPU is used;
MOE_EFA_BUILD_JOBS bounds the compilers that run at once. Objects are kept in build/, so a second build compiles what
changed. Everything that is not code is in pyproject.toml.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / f"objects-{sysconfig.get_platform()}"
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
CUDA_LIBRARY = "libmoe_efa_cuda.so"  # beside the extension
OLDEST_NVCC = (12, 8)  # the first that knows sm_100a
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


def find_toolkit_nvcc() -> Path | None:
    """nvcc on PATH or of the usual toolkit."""
    path = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    return path.resolve() if path.exists() else None


def find_nvcc() -> Path | None:
    """nvcc of a toolkit, or of NVIDIA's Python packages."""
    wheels = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"))
    return find_toolkit_nvcc() or next((path.resolve() for path in wheels), None)


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    """(13, 0) for CUDA 13.0."""
    result = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"\brelease (\d+)\.(\d+)", result.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def chosen_nvcc() -> Path | None:
    """The nvcc to build the CUDA library with, None to leave it out: MOE_EFA_CUDA decides, or whether there is one."""
    choice = os.environ.get("MOE_EFA_CUDA", "")
    if choice == "0":
        return None
    # NVIDIA's Python packages come with a torch for GPUs too, to laptops that have no use for what they would build.
    nvcc = find_nvcc() if choice else find_toolkit_nvcc()
    if nvcc is None:
        if choice:
            raise BuildError("MOE_EFA_CUDA=1, but no nvcc on PATH, in /usr/local/cuda or in NVIDIA's Python packages")
        return None
    version = nvcc_version(nvcc)
    if version >= OLDEST_NVCC:
        return nvcc
    old = f"{nvcc} is of CUDA {version[0]}.{version[1]}; 12.8 or newer is needed"
    if choice:
        raise BuildError(f"MOE_EFA_CUDA=1, but {old}")
    warn(f"moe_efa WARNING: building without the CUDA library: {old}.\n  MOE_EFA_CUDA=0 says that none is wanted.")
    return None


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


def build_cuda_library(nvcc: Path, folder: Path, target: Path, more_flags: Sequence[str] = ()) -> list[Path]:
    """Compiles csrc/kernels/cuda/*.cu into `folder`, links `target`, which exports one symbol; returns the objects."""
    kernels = ROOT / "csrc" / "kernels" / "cuda"
    sources = [path.relative_to(ROOT) for path in sorted(kernels.glob("*.cu"))]
    # The version, because the toolkit's headers do not count for "up to date".
    version = "-DMOE_EFA_NVCC={}.{}".format(*nvcc_version(nvcc))
    flags = [*CUDA_COMPILE_FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden", version, *more_flags]
    objects = ObjectCompiler(folder).compile(sources, dict.fromkeys(sources, flags))
    target.parent.mkdir(parents=True, exist_ok=True)
    link = [*compiler(), *map(str, objects), *cuda_link_flags(nvcc), "-o", str(target), *LINK_FLAGS]
    _run([*link, f"-Wl,--version-script={kernels / 'cuda_library.map'}", "-Wl,-z,defs"])
    return objects


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
        _run(command, target.with_suffix(".log") if source.suffix == ".cu" else None)
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


def _run(command: list[str], log: Path | None = None) -> None:
    """Runs a compiler or linker. What it says is shown, and kept in `log`."""
    output = None if log is None else subprocess.PIPE
    result = subprocess.run(command, cwd=ROOT, check=False, stdout=output, stderr=output and subprocess.STDOUT)
    if log is not None:
        log.write_bytes(result.stdout)
        print(result.stdout.decode(errors="replace"), end="", flush=True)
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
        common = [*COMPILE_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        # Only the bindings can see Python and pybind11. The version stands in the flags because the folder does not
        # count for "up to date".
        binding_flags = [f"-DMOE_EFA_PYBIND11_VERSION={pybind11.__version__}"]
        for include in (python_include, Path(pybind11.get_include())):
            binding_flags += ["-isystem", str(include)]

        sources = source_files()
        flags = dict.fromkeys(sources, common)
        flags |= {path: [*common, *binding_flags] for path in sources if path.parts[1] == "bindings"}
        # Nor do others than these know whether there is a libfabric.
        flags |= {path: [*common, *libfabric.flags] for path in sources if path.name.startswith("libfabric_")}
        objects = ObjectCompiler(OBJECTS).compile(sources, flags)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        _run([*compiler(), *map(str, objects), "-o", str(target), *LINK_FLAGS])
        self._build_cuda_library(_cuda_library_beside(str(target)))

    def _build_cuda_library(self, target: Path) -> None:
        nvcc = chosen_nvcc()
        if nvcc is None:
            target.unlink(missing_ok=True)  # of an earlier build
            print("CUDA library: left out", flush=True)
            return
        print(f"CUDA library: nvcc {nvcc}", flush=True)
        try:
            build_cuda_library(nvcc, OBJECTS, target)
        except BuildError as error:
            raise BuildError(f"{error}\n  MOE_EFA_CUDA=0 builds moe_efa without its CUDA library") from error

    # The CUDA library goes where the extension goes: into a wheel, or beside the sources.

    def get_outputs(self) -> list[str]:
        outputs = super().get_outputs()
        return [*outputs, *(str(path) for path in map(_cuda_library_beside, outputs) if path.exists())]

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))
            library, target = _cuda_library_beside(built), _cuda_library_beside(self.get_ext_fullpath(ext.name))
            target.unlink(missing_ok=True)  # it may be in use
            if library.exists():
                shutil.copy2(library, target)


def _cuda_library_beside(extension: str) -> Path:
    return Path(extension).with_name(CUDA_LIBRARY)


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
