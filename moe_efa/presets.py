"""Published shapes of Mixture-of-Experts layers, for benchmarks and plans. Tokens are per rank."""

from __future__ import annotations

_DEEPSEEK_V3 = {"hidden": 7168, "topk": 8, "experts": 256}
_KIMI_K2 = {"hidden": 7168, "topk": 8, "experts": 384}
PRESETS: dict[str, dict[str, int]] = {
    "decode": {"tokens": 128, **_DEEPSEEK_V3},
    "prefill": {"tokens": 4096, **_DEEPSEEK_V3},
    "deepseek-v3": {"tokens": 4096, **_DEEPSEEK_V3},
    "kimi-k2": {"tokens": 4096, **_KIMI_K2},
}


def describe_presets() -> str:
    """All of them in one line."""
    return "; ".join(
        f"{name}: {preset['tokens']} x {preset['hidden']}, top-{preset['topk']} of {preset['experts']}"
        for name, preset in PRESETS.items()
    )
