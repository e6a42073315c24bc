"""Every kernel compiles for sm_90 and sm_100 in every configuration, without spills and with wide accesses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_efa.triton_kernels import quantize, reference

ARCHITECTURES = (90, 100)
DTYPES = {"bf16": "*bf16", "fp32": "*fp32"}


def quantize_variants() -> dict[str, dict[str, Any]]:
    return {
        f"quantize_1x128-sm{arch}-h{hidden_size}-{dtype}-{scale_format}": {
            "kernel": "moe_efa.triton_kernels.quantize:quantize_1x128_kernel",
            "arch": arch,
            "num_warps": quantize.NUM_WARPS,
            "signature": {"x_ptr": DTYPES[dtype], "q_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "num_blocks": "i32"},
            "constants": {
                "hidden_size": hidden_size,
                "power_of_two": scale_format == "ue8m0",
                "blocks_per_program": quantize.BLOCKS_PER_PROGRAM,
                "block_size": reference.BLOCK_SIZE,
                "fp8_max": reference.FP8_MAX,
                "min_scale": reference.MIN_SCALE,
            },
        }
        for arch in ARCHITECTURES
        for hidden_size in (7168, 2000, 130)
        for dtype in DTYPES
        for scale_format in quantize.SCALE_FORMATS
    }


VARIANTS = quantize_variants()
SPILLING = {
    "kernel": "__main__:spilling_kernel",
    "arch": 90,
    "num_warps": 4,
    "signature": {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32"},
    "constants": {"size": 256},
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of compile_only.py for all variants, from one process that does not interpret."""
    variants = {**VARIANTS, "spilling": SPILLING}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_only.py"))],
        input=json.dumps(list(variants.values())),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return dict(zip(variants, json.loads(result.stdout), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_spills(variant: str, compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled[variant]["stack"] == 0
    assert not re.search(r"\b(LDL|STL)\b", compiled[variant]["sass"])


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "-h130-" not in name])
def test_rows_of_whole_vectors_use_16_byte_accesses(variant: str, compiled: dict[str, dict[str, Any]]) -> None:
    assert re.search(r"\bLDG\.E\.128\b", compiled[variant]["sass"])
    assert re.search(r"\bSTG\.E\.128\b", compiled[variant]["sass"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_divisions_are_ieee_and_nothing_is_fused(variant: str, compiled: dict[str, dict[str, Any]]) -> None:
    arithmetic = set(re.findall(r"\b(?:div|fma|mad|rcp)\.[\w.]*f32\b", compiled[variant]["ptx"]))
    assert arithmetic == {"div.rn.f32"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp8_is_clamped_before_the_cast(variant: str, compiled: dict[str, dict[str, Any]]) -> None:
    """Read from the code: no input shows it, since the hardware's cast and the interpreter's saturate as well."""
    clamped = re.search(
        r"\bmin\.(xorsign\.abs\.)?f32\b.*cvt\.rn\.satfinite\.e4m3x2", compiled[variant]["ptx"], re.DOTALL
    )
    assert clamped is not None


def test_a_spill_would_be_seen(compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled["spilling"]["stack"] > 0
