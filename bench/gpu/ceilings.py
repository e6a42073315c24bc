"""What the device can do at best, measured in the same run: the copy ceiling and the matmul ceiling."""

from __future__ import annotations

import torch

from . import floors
from .setting import Setting
from .timing import Timing

COPY_BYTES = 2 << 30
COPY_PARTS = (4, 8, 32)
MATMUL_SIZE = 8192


def run(setting: Setting) -> None:
    """A large copy, counting bytes read and written; bf16 products of random numbers; what next to nothing takes."""
    device = setting.device
    size = 1 << 20 if setting.dry_run else COPY_BYTES
    copy = _copy(setting, size)
    setting.release_memory()
    for part in COPY_PARTS:  # a kernel moves less than the large copy, and a copy of that size may be slower, too
        smaller = _copy(setting, size // part)
        setting.out.facts(**{f"copy_of_1_{part}_gb_per_s": 2 * (size // part) / smaller.us / 1e3})
        setting.release_memory()
    n = 64 if setting.dry_run else MATMUL_SIZE
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    matmul = setting.timer(lambda: torch.mm(a, b, out=out))
    nothing = setting.timer(lambda: None)
    small = torch.empty(16, device=device)
    launch = setting.timer(lambda: small.zero_())
    setting.out.facts(
        copy_gb_per_s=2 * size / copy.us / 1e3,
        copy_bytes=size,
        matmul_tflop_per_s=floors.grouped_gemm_flops(n, n, n) / matmul.us / 1e6,
        matmul_size=n,
        empty_us=nothing.us,
        smallest_kernel_us=launch.us,
    )
    if not setting.dry_run:
        properties = torch.cuda.get_device_properties(0)
        setting.out.facts(
            num_sms=properties.multi_processor_count,
            l2_bytes=getattr(properties, "L2_cache_size", 0),
            memory_bytes=properties.total_memory,
        )
    setting.out.note(
        f"copy {2 * size / copy.us / 1e3:.0f} GB/s, bf16 matmul "
        f"{floors.grouped_gemm_flops(n, n, n) / matmul.us / 1e6:.0f} TFLOP/s, smallest kernel {launch.us:.1f} us"
    )


def _copy(setting: Setting, size: int) -> Timing:
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return setting.timer(lambda: target.copy_(source))
