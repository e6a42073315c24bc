"""Which library runs the kernels, and where tensors are. It knows nothing of groups or calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe_efa import _C, env
from moe_efa.errors import ConfigError

CUDA_LIBRARY = Path(__file__).with_name("libmoe_efa_cuda.so")


def resolve(device: torch.device | str | None) -> str:
    """The word for :class:`ExpertParallelConfig` of what a caller asks for.

    None takes MOE_EFA_DEVICE, otherwise the GPU where there is one.

    Raises:
        ConfigError: for a device that this build, or this machine, does not have.
    """
    device = env.device() if device is None else device
    if device is None:
        return "cuda" if torch.cuda.is_available() and CUDA_LIBRARY.exists() else "cpu"
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device must be 'cpu' or 'cuda', not {device!r}") from None
    if asked.type == "cpu":
        return "cpu"
    if asked.type != "cuda":
        raise ConfigError(f"device must be 'cpu' or 'cuda', not {device!r}")
    if not CUDA_LIBRARY.exists():
        raise ConfigError(
            "device='cuda', but moe_efa was built without CUDA: install it where nvcc is found "
            "(with MOE_EFA_CUDA=1 the build says why it is not)"
        )
    if not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch finds no GPU")
    if asked.index is not None and asked.index != torch.cuda.current_device():
        current = torch.cuda.current_device()
        raise ConfigError(f"device='{asked}', but the current one is cuda:{current}: call torch.cuda.set_device first")
    return "cuda"


def native_options(device: str) -> dict[str, Any]:
    """Fields of the native configuration for this process's device; none where the CPU kernels run."""
    library = env.device_library() or (None if device == "cpu" else str(CUDA_LIBRARY))
    if library is None:
        return {}
    index = 0 if device == "cpu" else torch.cuda.current_device()
    return {"device_library": library, "device_index": index, "gdrcopy": env.gdrcopy() or ""}


def of_tensors(device: str) -> torch.device:
    """Where this process's tensors are."""
    return torch.device("cpu") if device == "cpu" else torch.device("cuda", torch.cuda.current_device())


def current_stream(device: torch.device) -> int:
    """The stream on which torch computes there; 0 on the CPU, which has none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def facts(index: int = 0, *, library: Path = CUDA_LIBRARY) -> dict[str, Any]:
    """Opens a GPU, which takes a moment and some of its memory, and tells what it is.

    Args:
        index: counts the GPUs that this process sees.
        library: another one than that of this installation, for tests.

    Returns:
        ``name``, ``kind`` ("cuda"), ``num_sms``; ``shares_memory``: the ranks of a host may read each other's memory;
        ``dma_buf``: a NIC can be given its memory; ``flushes_writes``: what a NIC writes has to be flushed.

    Raises:
        ConfigError: if the library was not built, or for the reason that it gives, such as that there is no driver.
    """
    if not library.exists():
        raise ConfigError(f"moe_efa was built without its CUDA library ({library}): MOE_EFA_CUDA=1 and nvcc build it")
    return _C.device_facts(str(library), index)
