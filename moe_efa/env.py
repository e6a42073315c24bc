"""The only reader of environment variables: a table, one typed getter per variable, and the table as Markdown."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from moe_efa.errors import ConfigError


@dataclass(frozen=True)
class Variable:
    """One environment variable; ``default`` is text for the reader."""

    name: str
    type: str
    default: str
    meaning: str


VARIABLES = (
    Variable(
        "MOE_EFA_LIBFABRIC",
        "path",
        "searched",
        "libfabric.so to load, instead of the EFA installer's, an installed Python package's or the loader's.",
    ),
    Variable(
        "MOE_EFA_SOCKET_ADDR",
        "IPv4 address",
        "found from MASTER_ADDR",
        "Address on which this rank listens for control connections and to which the tcp provider binds, "
        "if the ranks are on several hosts.",
    ),
    Variable(
        "MOE_EFA_HOST_ID",
        "text",
        "boot id and /dev/shm",
        "Identity of this host; ranks with equal identities must share /dev/shm. Decides `node_size`.",
    ),
    Variable(
        "MOE_EFA_NUM_THREADS",
        "integer >= 1",
        "cores / ranks of the host",
        "CPU kernel threads of this rank.",
    ),
    Variable(
        "MOE_EFA_OUTPUT_CACHE_BYTES",
        "integer >= 0",
        "536870912",
        "Memory of freed results on the CPU that a process keeps for the next ones; 0 keeps none.",
    ),
    Variable(
        "MOE_EFA_DEVICE",
        "cpu or cuda",
        "cuda where it works",
        "Where tensors of an `ExpertParallel` are that does not say (`device=None`).",
    ),
    Variable(
        "MOE_EFA_DEVICE_LIBRARY",
        "path",
        "none",
        "For tests, on all ranks: a library that plays the GPU. Tensors are on the CPU, all else is as on a GPU.",
    ),
    Variable(
        "MOE_EFA_GDRCOPY",
        "path or off",
        "searched",
        "libgdrapi.so to load, instead of the loader's or that of /opt/gdrcopy/lib; off: GDRCopy is not used.",
    ),
    Variable(
        "MOE_EFA_REORDER",
        "seed[,drop=NODE@N[,nic=I]]",
        "off",
        "For tests, on all ranks: the rails between nodes deliver as badly as SRD may (held, cut, repeated, reordered, "
        "refused for a while), as the seed says; with drop, a node is out of reach after N writes to it from a NIC of "
        "a rank, the I-th (from 0) or any.",
    ),
)


@dataclass(frozen=True)
class Reorder:
    """MOE_EFA_REORDER; ``drop_node`` is -1 for none, ``drop_nic`` -1 for all."""

    seed: int
    drop_node: int = -1
    drop_after: int = 0
    drop_nic: int = -1


def libfabric_path() -> str | None:
    """MOE_EFA_LIBFABRIC, or None."""
    return os.environ.get("MOE_EFA_LIBFABRIC") or None


def socket_address() -> str | None:
    """MOE_EFA_SOCKET_ADDR, or None. Raises ConfigError if it is no IPv4 address."""
    text = os.environ.get("MOE_EFA_SOCKET_ADDR")
    if not text:
        return None
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise ConfigError(f"MOE_EFA_SOCKET_ADDR={text!r} is not an IPv4 address such as 10.0.0.7") from None


def host_id() -> str | None:
    """MOE_EFA_HOST_ID, or None."""
    return os.environ.get("MOE_EFA_HOST_ID") or None


def num_threads(ranks_on_host: int) -> int:
    """MOE_EFA_NUM_THREADS, or this rank's share of the cores. Raises ConfigError if it is no positive integer."""
    text = os.environ.get("MOE_EFA_NUM_THREADS")
    if not text:
        return max(1, len(os.sched_getaffinity(0)) // ranks_on_host)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"MOE_EFA_NUM_THREADS={text!r} is not a positive integer")
    return int(text)


def output_cache_bytes() -> int:
    """MOE_EFA_OUTPUT_CACHE_BYTES, or 512 MiB. Raises ConfigError if it is no integer >= 0."""
    text = os.environ.get("MOE_EFA_OUTPUT_CACHE_BYTES")
    if not text:
        return 512 << 20
    if not text.isdecimal():
        raise ConfigError(f"MOE_EFA_OUTPUT_CACHE_BYTES={text!r} is not an integer >= 0")
    return int(text)


def device() -> str | None:
    """MOE_EFA_DEVICE, or None. Raises ConfigError if it is neither cpu nor cuda."""
    text = os.environ.get("MOE_EFA_DEVICE")
    if not text:
        return None
    if text not in ("cpu", "cuda"):
        raise ConfigError(f"MOE_EFA_DEVICE={text!r} is neither cpu nor cuda")
    return text


def device_library() -> str | None:
    """MOE_EFA_DEVICE_LIBRARY, or None."""
    return os.environ.get("MOE_EFA_DEVICE_LIBRARY") or None


def gdrcopy() -> str | None:
    """MOE_EFA_GDRCOPY, or None."""
    return os.environ.get("MOE_EFA_GDRCOPY") or None


def reorder() -> Reorder | None:
    """MOE_EFA_REORDER, or None. Raises ConfigError if it is not understood."""
    text = os.environ.get("MOE_EFA_REORDER")
    if not text:
        return None
    found = re.fullmatch(r"(\d{1,18})(?:,drop=(\d{1,4})@(\d{1,18})(?:,nic=(\d{1,2}))?)?", text, re.ASCII)
    if not found:
        raise ConfigError(f"MOE_EFA_REORDER={text!r} is not a seed such as 7, or 7,drop=1@100")
    seed, node, after, nic = found.groups()
    if node is None:
        return Reorder(int(seed))
    return Reorder(int(seed), int(node), int(after), -1 if nic is None else int(nic))


def override(variables: Mapping[str, str]) -> None:
    """Set variables of this process, for ranks of tests."""
    os.environ.update(variables)


def master_address() -> str | None:
    """MASTER_ADDR as torch.distributed's launchers set it, or None."""
    return os.environ.get("MASTER_ADDR") or None


@dataclass(frozen=True)
class Launch:
    """This process's place among those that a launcher started; ``init_method`` is for torch.distributed."""

    rank: int
    num_ranks: int
    init_method: str


def launch() -> Launch | None:
    """What torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID, SLURM_NTASKS) says, or None for a process on its own.

    Raises:
        ConfigError: if srun started several ranks and the host of rank 0 is not known.
    """
    if os.environ.get("RANK") and os.environ.get("WORLD_SIZE"):
        return Launch(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://")
    rank = os.environ.get("SLURM_PROCID")
    num_ranks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS")
    if not rank or not num_ranks or num_ranks == "1":
        return None
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or ""
    host = master_address() or _first_host(nodes)
    if not host:
        raise ConfigError("srun started several ranks, but neither MASTER_ADDR nor SLURM_STEP_NODELIST names a host")
    # Jobs that share a host need ports of their own.
    port = os.environ.get("MASTER_PORT") or str(29500 + int(os.environ.get("SLURM_JOB_ID") or 0) % 1000)
    return Launch(int(rank), int(num_ranks), f"tcp://{host}:{port}")


def _first_host(nodes: str) -> str:
    """The first of a Slurm host list: ``gpu[007-010,12],login`` -> ``gpu007``."""
    found = re.match(r"([^,\[]+)(?:\[([^-,\]]+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else ""


def settings() -> dict[str, str]:
    """The variables of the table that are set, with their text."""
    return {v.name: os.environ[v.name] for v in VARIABLES if os.environ.get(v.name)}


def wrong_settings() -> list[str]:
    """What is wrong with variables that are set, in words."""
    found = []
    for read in (lambda: num_threads(1), output_cache_bytes, device, socket_address, reorder):
        try:
            read()
        except ConfigError as error:
            found.append(str(error))
    return found


def as_markdown() -> str:
    """The table for the README."""
    lines = ["| variable | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{v.name}` | {v.type} | {v.default} | {v.meaning} |" for v in VARIABLES]
    return "\n".join(lines) + "\n"
