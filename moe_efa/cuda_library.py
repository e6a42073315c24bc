"""The library that runs on NVIDIA GPUs: built beside the native extension, which opens it where a GPU is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_efa import _C, errors

PATH = Path(_C.__file__).with_name("libmoe_efa_cuda.so")


def is_built() -> bool:
    """Whether this installation has the library. That says nothing of this host."""
    return PATH.exists()


def device_facts(index: int = 0, *, library: Path | None = None) -> dict[str, Any]:
    """Opens a GPU, which takes a moment and some of its memory, and tells what it is.

    Args:
        index: counts the GPUs that this process sees.
        library: another library than that of this installation, for tests.

    Returns:
        ``name``, ``kind`` ("cuda"), ``num_sms``; ``shares_memory``: the ranks of a host may read each other's memory;
        ``dma_buf``: a NIC can be given its memory; ``flushes_writes``: what a NIC writes has to be flushed.

    Raises:
        ConfigError: if the library was not built, or for the reason that it gives, such as that there is no driver.
    """
    path = library or PATH
    if not path.exists():
        raise errors.ConfigError(
            f"moe_efa was built without its CUDA library ({path}): build it again with MOE_EFA_CUDA=1 and nvcc"
        )
    return _C.device_facts(str(path), index)
