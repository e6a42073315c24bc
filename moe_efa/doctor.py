"""`moe-efa doctor`: what is built, what this host offers, and the cure for what is missing.

Looks and measures nothing; the standalone benchmark (`moe-efa bench`) is the test that follows.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import platform
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_efa import _C, device, env, errors, libfabric, topology
from moe_efa._version import __version__

_SHM_BYTES = 1 << 30  # one rank's default memory_budget_bytes
_OLDEST_TORCH = (2, 7)


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be. An error rules out standalone use, a warning does not."""

    severity: str
    text: str
    cure: str


def examine(
    *,
    shm: Path = Path("/dev/shm"),
    verbs: Path = Path("/dev/infiniband"),
    sysfs: Path = topology.SYSFS,
) -> dict[str, Any]:
    """Facts about build and host, and ``problems``; ``ok`` says whether the standalone benchmark can run.

    Args:
        shm, verbs, sysfs: where to look, for tests.
    """
    build = libfabric.build_info()
    search, found = libfabric.search_path(), build["libfabric_found"]
    providers = _C.libfabric_providers(**search) if found else []
    host = topology.read_topology(sysfs)
    efa_devices = [nic.name for nic in host.nics]
    facts: dict[str, Any] = {
        "version": __version__,
        "build": {key: build[key] for key in ("protocol_version", "compiler", "libfabric_built")},
        "cuda": _cuda_facts(),
        "gdrcopy": _gdrcopy_facts(),
        "libfabric": {key: build[f"libfabric_{key}"] for key in ("found", "path", "version", "error")},
        "providers": providers,
        "auto_provider": _C.libfabric_default_provider(**search) if found else "",
        "efa_devices": efa_devices,
        "efa_pairing": topology.format_pairing(topology.pair(host, len(host.gpus) or 1)) if host.nics else [],
        "missing_for_efa": find_missing_for_efa(efa_devices, providers, verbs, _memlock_bytes()),
        "shm": _shm_facts(shm),
        "memlock_bytes": _memlock_bytes(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": {
            "version": str(torch.__version__),
            "gloo": dist.is_available() and dist.is_gloo_available(),
            "cuda_devices": torch.cuda.device_count(),
        },
        "environment": env.settings(),
        "wrong_settings": env.wrong_settings(),
    }
    problems = find_problems(facts)
    facts["problems"] = [asdict(problem) for problem in problems]
    facts["ok"] = not any(problem.severity == "error" for problem in problems)
    return facts


def find_missing_for_efa(
    devices: list[str],
    providers: list[str],
    verbs: Path,
    memlock_bytes: int | None,
    find_library: Callable[[str], str | None] = ctypes.util.find_library,
) -> list[str]:
    """What this host lacks to use EFA, in words; empty if nothing."""
    missing = []
    if not devices:
        missing.append("an EFA device")
    absent = [f"lib{name}" for name in ("ibverbs", "efa") if find_library(name) is None]
    if absent:
        missing.append(f"rdma-core ({', '.join(absent)})")
    if not verbs.is_dir():
        missing.append(str(verbs))
    if not any(provider.startswith("efa") for provider in providers):
        missing.append("libfabric's efa provider, or a device that it can open")
    if memlock_bytes is not None and memlock_bytes < _SHM_BYTES:
        missing.append(f"locked memory ({_gib(memlock_bytes)} by ulimit -l, 1 GiB per rank)")
    return missing


def find_problems(facts: dict[str, Any]) -> list[Problem]:
    """What stands in the way, worst first."""
    problems: list[Problem] = []

    def error(text: str, cure: str) -> None:
        problems.append(Problem("error", text, cure))

    def warn(text: str, cure: str) -> None:
        problems.append(Problem("warning", text, cure))

    for text in facts["wrong_settings"]:
        error(text, "unset it, or see the table of settings in README.md")
    devices, providers = facts["efa_devices"], facts["providers"]
    has_efa = any(provider.startswith("efa") for provider in providers)
    if not facts["build"]["libfabric_built"]:
        error(
            "moe_efa was built without the libfabric headers: nodes cannot be joined",
            "install libfabric-dev (on EFA hosts the EFA installer brings /opt/amazon/efa/include) and build again; "
            "`moe-efa bench --transport shm` works meanwhile",
        )
    elif not facts["libfabric"]["found"]:
        error(
            f"libfabric is not found: {facts['libfabric']['error'] or 'no libfabric.so.1 anywhere'}",
            "EFA hosts: install the AWS EFA installer; elsewhere: apt-get install libfabric1, or pip install "
            "'moe-efa[fabric]', or set MOE_EFA_LIBFABRIC; `moe-efa bench --transport shm` works meanwhile",
        )
    elif not providers:
        error("libfabric has no provider that could join nodes", "install a libfabric with the tcp or efa provider")
    if devices and facts["libfabric"]["found"] and not has_efa:
        error(
            f"{len(devices)} EFA device(s), but {facts['libfabric']['path']} has no efa provider",
            "use the EFA installer's library: MOE_EFA_LIBFABRIC=/opt/amazon/efa/lib/libfabric.so.1",
        )
    if not facts["torch"]["gloo"]:
        error("torch has no gloo backend, which the benchmark uses to meet", "install torch from pytorch.org or PyPI")
    if facts["shm"] is None:
        error("there is no /dev/shm", "mount -t tmpfs tmpfs /dev/shm")
    elif facts["shm"]["free_bytes"] < _SHM_BYTES:
        warn(
            f"/dev/shm has {facts['shm']['free_bytes'] / 2**20:.0f} MiB free: a rank registers up to 1 GiB there",
            "mount -o remount,size=16G /dev/shm (containers: --shm-size=16g), or lower memory_budget_bytes",
        )
    memlock = facts["memlock_bytes"]
    if devices and memlock is not None and memlock < _SHM_BYTES:
        error(
            f"`ulimit -l` allows {memlock / 2**20:.0f} MiB of locked memory: EFA cannot register 1 GiB per rank",
            "ulimit -l unlimited (/etc/security/limits.conf; containers: --ulimit memlock=-1)",
        )
    cuda, gpus = facts["cuda"], facts["torch"]["cuda_devices"]
    if gpus and not cuda["built"]:
        warn(
            f"torch sees {gpus} GPU(s), but moe_efa was built without its CUDA library",
            "install moe_efa again with MOE_EFA_CUDA=1 set and nvcc (CUDA 12.8 or newer) on PATH",
        )
    elif gpus and cuda["device"] is None:
        warn(
            f"torch sees {gpus} GPU(s), but moe_efa cannot use the first: {cuda['error']}",
            "update the NVIDIA driver, or install moe_efa again, built with the CUDA toolkit that suits it",
        )
    if _release(facts["torch"]["version"]) < _OLDEST_TORCH:
        warn(f"torch {facts['torch']['version']} is older than 2.7", "pip install --upgrade torch")
    return sorted(problems, key=lambda problem: problem.severity)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def _cuda_facts() -> dict[str, Any]:
    """Is the library for GPUs built, and what is the first GPU, or why can it not be used."""
    built = device.CUDA_LIBRARY.exists()
    try:
        return {"built": built, "device": device.facts(), "error": ""}
    except errors.ConfigError as error:
        return {"built": built, "device": None, "error": str(error)}


def _gdrcopy_facts() -> dict[str, Any]:
    """Can GDRCopy be used, and which, or why not; whether it can pin a GPU's memory shows when a group is made."""
    library = env.gdrcopy() or ""
    if library == "off":
        return {"usable": False, "path": "", "version": "", "error": "MOE_EFA_GDRCOPY is off"}
    return _C.gdrcopy_info(library)


def _shm_facts(shm: Path) -> dict[str, int] | None:
    try:
        stat = os.statvfs(shm)
    except OSError:
        return None
    return {"bytes": stat.f_blocks * stat.f_frsize, "free_bytes": stat.f_bavail * stat.f_frsize}


def _memlock_bytes() -> int | None:
    """The limit, None for unlimited."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moe-efa doctor` to a parser."""
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")


def run_command(options: argparse.Namespace) -> int:
    """Print what was found: 0 if the standalone benchmark can run here, 1 if not."""
    facts = examine()
    print(json.dumps(facts, indent=2) if options.json else format_table(facts))
    return 0 if facts["ok"] else 1


def format_table(facts: dict[str, Any]) -> str:
    """What was found, for people."""
    build, library, shm, memlock = facts["build"], facts["libfabric"], facts["shm"], facts["memlock_bytes"]
    efa = facts["efa_devices"]
    rows = [
        ("moe_efa", f"{facts['version']}, protocol {build['protocol_version']}, compiler {build['compiler']}"),
        ("CUDA library", _cuda_text(facts["cuda"])),
        ("GDRCopy", _gdrcopy_text(facts["gdrcopy"])),
        ("libfabric headers", "built with" if build["libfabric_built"] else "built without"),
        ("libfabric", f"{library['version']} at {library['path']}" if library["found"] else "not found"),
        ("providers", ", ".join(facts["providers"]) or "none"),
        ("between nodes", f"{facts['auto_provider'] or 'nothing'}, unless a provider is named"),
        ("EFA devices", f"{len(efa)}: {', '.join(efa)}" if efa else "none"),
        *(("", line) for line in facts["efa_pairing"]),
        ("missing for EFA", "; ".join(facts["missing_for_efa"]) or "nothing"),
        ("/dev/shm", f"{_gib(shm['free_bytes'])} free of {_gib(shm['bytes'])}" if shm else "absent"),
        ("locked memory", "unlimited" if memlock is None else f"at most {_gib(memlock)} (ulimit -l)"),
        ("cores", str(facts["cores"])),
        ("kernel", facts["kernel"]),
        ("Python", facts["python"]),
        ("torch", f"{facts['torch']['version']}, {'with' if facts['torch']['gloo'] else 'without'} gloo"),
        ("GPUs", str(facts["torch"]["cuda_devices"])),
    ]
    rows += [(name, value) for name, value in facts["environment"].items()]
    lines = [f"{name:<22}{text}" for name, text in rows]
    for problem in facts["problems"]:
        lines += ["", f"{problem['severity']}: {problem['text']}", f"  cure: {problem['cure']}"]
    verdict = "standalone use works here: moe-efa bench" if facts["ok"] else "standalone use does not work here yet"
    return "\n".join([*lines, "", verdict])


def _cuda_text(cuda: dict[str, Any]) -> str:
    gpu = cuda["device"]
    if gpu is None:
        return f"built, but no GPU can be used: {cuda['error']}" if cuda["built"] else "not built"
    nics = "NICs can reach its memory" if gpu["dma_buf"] else "no NIC can reach its memory"
    return f"built, opens GPU 0: {gpu['name']}, {gpu['num_sms']} SMs, {nics}"


def _gdrcopy_text(gdrcopy: dict[str, Any]) -> str:
    if gdrcopy["usable"]:
        return f"{gdrcopy['version']} at {gdrcopy['path']}"
    return f"not used, arrivals are polled in host memory: {gdrcopy['error']}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
