"""Every kernel compiles for sm_90, and the first of them for sm_100, without spills, with wide accesses, unfused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moe_efa.triton_kernels import (
    checks,
    dequantize,
    grouped_gemm_fp8,
    permute_quantize,
    plan_rows,
    quantize,
    quantize_128x128,
    reference,
    router_topk,
    rows,
    swiglu,
    swiglu_backward,
    unpermute,
)

Variant = dict[str, Any]
FLOATS = ("bf16", "fp32")
HIDDEN_SIZE, INTERMEDIATE_SIZE, TOP_K, NUM_EXPERTS = 7168, 2048, 8, 256
PROCESSES = 2


def variant(kernel: str, num_warps: int, signature: dict[str, str], constants: dict[str, Any], **more: Any) -> Variant:
    kernel = f"moe_efa.triton_kernels.{kernel}"
    return {"kernel": kernel, "arch": 90, "num_warps": num_warps, "signature": signature, "constants": constants} | more


def quantize_variants() -> dict[str, Variant]:
    return {
        f"quantize_1x128-sm{arch}-h{hidden_size}-{dtype}-{scale_format}": variant(
            "quantize:quantize_1x128_kernel",
            quantize.NUM_WARPS,
            {"x_ptr": f"*{dtype}", "q_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "num_blocks": "i32"},
            {
                "hidden_size": hidden_size,
                "power_of_two": scale_format == "ue8m0",
                "blocks_per_program": quantize.BLOCKS_PER_PROGRAM,
                "block_size": reference.BLOCK_SIZE,
            },
            arch=arch,
            sass=arch == 90 and hidden_size == HIDDEN_SIZE and dtype == "bf16",
        )
        for arch, hidden_size, dtypes, formats in [
            (90, HIDDEN_SIZE, FLOATS, reference.SCALE_FORMATS),
            (90, 2000, ["bf16"], ["fp32"]),
            (90, 130, ["bf16"], ["fp32"]),
            (100, HIDDEN_SIZE, ["bf16"], reference.SCALE_FORMATS),
        ]
        for dtype in dtypes
        for scale_format in formats
    }


def quantize_weights_variants() -> dict[str, Variant]:
    return {
        f"quantize_128x128-{n}x{k}-{dtype}": variant(
            "quantize_128x128:quantize_128x128_kernel",
            quantize_128x128.NUM_WARPS,
            {"x_ptr": f"*{dtype}", "q_ptr": "*fp8e4nv", "scales_ptr": "*fp32"},
            {"n": n, "k": k, "block_size": reference.BLOCK_SIZE},
            sass=dtype == "bf16",
        )
        for n, k in ((2 * INTERMEDIATE_SIZE, HIDDEN_SIZE), (576, HIDDEN_SIZE))
        for dtype in FLOATS[: 2 if n > 576 else 1]
    }


def dequantize_variants() -> dict[str, Variant]:
    return {
        f"dequantize_1x128-{dtype}": variant(
            "dequantize:dequantize_1x128_kernel",
            dequantize.NUM_WARPS,
            {"q_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "x_ptr": f"*{dtype}", "num_blocks": "i32"},
            {
                "hidden_size": HIDDEN_SIZE,
                "blocks_per_program": dequantize.BLOCKS_PER_PROGRAM,
                "block_size": reference.BLOCK_SIZE,
            },
        )
        for dtype in FLOATS
    }


def plan_variants() -> dict[str, Variant]:
    experts = {"num_experts": NUM_EXPERTS, "padded_experts": NUM_EXPERTS}
    slots = {"slots_per_program": plan_rows.SLOTS_PER_PROGRAM}
    ids = {"topk_idx_ptr": "*i64", "counts_ptr": "*i32"}
    counts = {"tokens_per_expert_ptr": "*i64"}
    return {
        "plan_rows-count": variant(
            "plan_rows:count_kernel",
            plan_rows.NUM_WARPS,
            {**ids, "num_slots": "i32"},
            {**experts, **slots},
            options=checks.ASSERTING,
        ),
        "plan_rows-scan": variant(
            "plan_rows:scan_kernel",
            plan_rows.NUM_WARPS,
            {"counts_ptr": "*i32", **counts, "num_blocks": "i32"},
            {
                "num_experts": NUM_EXPERTS,
                "experts_per_program": plan_rows.EXPERTS_PER_PROGRAM,
                "blocks_per_step": plan_rows.BLOCKS_PER_STEP,
            },
        ),
        "plan_rows-place": variant(
            "plan_rows:place_kernel",
            plan_rows.NUM_WARPS,
            {
                **ids,
                **counts,
                "offsets_ptr": "*i32",
                "positions_ptr": "*i32",
                "num_slots": "i32",
                "expert_alignment": "i32",
            },
            {**experts, **slots},
        ),
    }


def row_variants() -> dict[str, Variant]:
    """The kernels that move rows by a plan."""
    plan = {"positions_ptr": "*i32", "offsets_ptr": "*i32", "tokens_per_expert_ptr": "*i64"}
    numbers = {"num_tokens": "i32", "num_rows": "i32"}
    sizes = {"hidden_size": HIDDEN_SIZE, "top_k": TOP_K, "padded_top_k": TOP_K, "num_experts": NUM_EXPERTS}
    tail = {"tail_programs": rows.TAIL_PROGRAMS}
    block, _, num_warps = rows.column_blocks(HIDDEN_SIZE)
    unpermute_block, _, _ = rows.column_blocks(HIDDEN_SIZE, unpermute.MAX_BLOCK)
    asserting = {"options": checks.ASSERTING}
    variants = {}
    for dtype in FLOATS:
        variants[f"permute-{dtype}"] = variant(
            "permute:permute_kernel",
            num_warps,
            {
                "x_ptr": f"*{dtype}",
                "topk_weights_ptr": "*fp32",
                **plan,
                "rows_ptr": f"*{dtype}",
                "weights_ptr": "*fp32",
                **numbers,
            },
            {**sizes, **tail, "block": block},
            **asserting,
        )
        for power_of_two in (False, True)[: 2 if dtype == "bf16" else 1]:
            variants[f"permute_quantize-{dtype}-{'ue8m0' if power_of_two else 'fp32'}"] = variant(
                "permute_quantize:permute_quantize_kernel",
                permute_quantize.NUM_WARPS,
                {"x_ptr": f"*{dtype}", **plan, "q_ptr": "*fp8e4nv", "scales_ptr": "*fp32", **numbers},
                {
                    "topk_weights_ptr": None,
                    "weights_ptr": None,
                    **sizes,
                    **tail,
                    "power_of_two": power_of_two,
                    "blocks_per_program": permute_quantize.BLOCKS_PER_PROGRAM,
                    "block_size": reference.BLOCK_SIZE,
                },
                **asserting,
            )
        for kind, out_dtype in [("weighted", dtype)] + [("plain", out) for out in FLOATS if dtype == "bf16"]:
            optional = ["weights_ptr", "row_values_ptr", "topk_values_ptr"]
            weighted = kind == "weighted"
            variants[f"unpermute-{dtype}-{kind}{'' if out_dtype == dtype else f'-to-{out_dtype}'}"] = variant(
                "unpermute:unpermute_kernel",
                unpermute.num_warps(unpermute_block),
                {
                    "y_ptr": f"*{dtype}",
                    "positions_ptr": "*i32",
                    "offsets_ptr": "*i32",
                    "out_ptr": f"*{out_dtype}",
                    "num_rows": "i32",
                    **(dict.fromkeys(optional, "*fp32") if weighted else {}),
                },
                {**sizes, "block": unpermute_block, **({} if weighted else dict.fromkeys(optional))},
                **asserting,
            )
        variants[f"unpermute_backward-{dtype}"] = variant(
            "unpermute_backward:unpermute_backward_kernel",
            num_warps,
            {
                "grad_out_ptr": f"*{dtype}",
                "y_ptr": f"*{dtype}",
                "weights_ptr": "*fp32",
                **plan,
                "grad_y_ptr": f"*{dtype}",
                "grad_weights_ptr": "*fp32",
                **numbers,
            },
            {**sizes, **tail, "block": block},
            **asserting,
        )
    return variants


def swiglu_variants() -> dict[str, Variant]:
    """Quantized, with weights and clamped; and plain."""
    num_blocks = swiglu_backward.blocks_at_a_time(INTERMEDIATE_SIZE)
    sizes = {"intermediate_size": INTERMEDIATE_SIZE, "block_size": reference.BLOCK_SIZE, "power_of_two": False}
    variants = {}
    for dtype in FLOATS:
        for quantized in (True, False)[: 2 if dtype == "bf16" else 1]:
            name = f"{dtype}-quantized-clamped" if quantized else dtype
            kinds = {"weights_ptr": "*fp32", "scales_ptr": "*fp32"} if quantized else {}
            nothing = {} if quantized else {"weights_ptr": None, "scales_ptr": None}
            limit = {"limit": 7.0 if quantized else None}
            variants[f"swiglu-{name}"] = variant(
                "swiglu:swiglu_kernel",
                swiglu.NUM_WARPS,
                {
                    "gate_up_ptr": f"*{dtype}",
                    "out_ptr": "*fp8e4nv" if quantized else f"*{dtype}",
                    "num_blocks": "i32",
                    **kinds,
                },
                {**sizes, **limit, "blocks_per_program": swiglu.BLOCKS_PER_PROGRAM, **nothing},
            )
            if quantized:
                kinds |= {"grad_weights_ptr": "*fp32", "q_ptr": "*fp8e4nv"}
            else:
                nothing |= {"grad_weights_ptr": None, "q_ptr": None}
            variants[f"swiglu_backward-{name}"] = variant(
                "swiglu_backward:swiglu_backward_kernel",
                swiglu_backward.num_warps(num_blocks),
                {
                    "grad_hidden_ptr": f"*{dtype}",
                    "gate_up_ptr": f"*{dtype}",
                    "grad_gate_up_ptr": f"*{dtype}",
                    **kinds,
                },
                {**sizes, **limit, "num_blocks": num_blocks, **nothing},
            )
    return variants


def router_variants() -> dict[str, Variant]:
    """DeepSeek-V3, Qwen3 with a pinned selection, and the gradients of both."""
    options = {"top_k": TOP_K, "norm_topk_prob": True, "epsilon": 1e-20, "routed_scaling_factor": 2.5}
    outputs = {"topk_idx_ptr": "*i64", "topk_weights_ptr": "*fp32", "scores_ptr": "*fp32"}
    variants = {}
    for name, softmax, num_experts, n_group, topk_group in (
        ("sigmoid-groups", False, 256, 8, 4),
        ("softmax-pinned", True, 128, 1, 1),
    ):
        padded_groups, padded_group_size = router_topk.tile(num_experts, n_group)
        num_warps = router_topk.num_warps(num_experts)
        router = {"softmax": softmax, "num_experts": num_experts, **options}
        given, absent = ("pinned_idx_ptr", "bias_ptr") if softmax else ("bias_ptr", "pinned_idx_ptr")
        variants[f"router_topk-{name}"] = variant(
            "router_topk:router_topk_kernel",
            num_warps,
            {"logits_ptr": "*fp32", given: "*i64" if softmax else "*fp32", **outputs},
            {
                absent: None,
                **router,
                "n_group": n_group,
                "topk_group": topk_group,
                "padded_groups": padded_groups,
                "padded_group_size": padded_group_size,
                "padded_top_k": TOP_K,
            },
            **({"options": checks.ASSERTING} if softmax else {}),
        )
        variants[f"router_topk_backward-{name}"] = variant(
            "router_topk_backward:router_topk_backward_kernel",
            num_warps,
            {
                "grad_weights_ptr": "*fp32",
                "grad_scores_ptr": "*fp32",
                "topk_idx_ptr": "*i64",
                "scores_ptr": "*fp32",
                "grad_logits_ptr": "*fp32",
            },
            {**router, "padded_experts": num_experts},
        )
    return variants


def gemm_variants() -> dict[str, Variant]:
    return {
        f"grouped_gemm_fp8-{dtype}": variant(
            "grouped_gemm_fp8:grouped_gemm_fp8_kernel",
            grouped_gemm_fp8.NUM_WARPS,
            {
                "a_desc": "tensordesc<fp8e4nv[128, 128]>",
                "a_scales_ptr": "*fp32",
                "b_desc": "tensordesc<fp8e4nv[128, 128]>",
                "b_scales_ptr": "*fp32",
                "offsets_ptr": "*i32",
                "out_ptr": f"*{dtype}",
                "num_rows": "i32",
            },
            {"n": 4096, "k": HIDDEN_SIZE, "num_experts": 8, "padded_groups": 16, "block_size": reference.BLOCK_SIZE},
            options={"enable_fp_fusion": True, "num_stages": grouped_gemm_fp8.NUM_STAGES},
            sass=True,
        )
        for dtype in FLOATS
    }


VARIANTS = {
    **quantize_variants(),
    **quantize_weights_variants(),
    **dequantize_variants(),
    **plan_variants(),
    **row_variants(),
    **swiglu_variants(),
    **router_variants(),
    **gemm_variants(),
}
SPILLING = {
    "kernel": "__main__:spilling_kernel",
    "arch": 90,
    "num_warps": 4,
    "signature": {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32"},
    "constants": {"size": 256},
}


def compile_all(variants: list[Variant], cache: Path) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_only.py"))],
        input=json.dumps(variants),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of compile_only.py for the variants of the selected tests, from processes that do not interpret."""
    variants = {**VARIANTS, "spilling": SPILLING}
    items = [item for item in request.session.items if item.path == request.path]
    selected = {item.callspec.params.get("name") for item in items if hasattr(item, "callspec")} | {"spilling"}
    names = [name for name in variants if name in selected]
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(PROCESSES) as threads:
        shares = [names[i::PROCESSES] for i in range(PROCESSES)]
        results = threads.map(lambda share: compile_all([variants[name] for name in share], cache), shares)
        return {name: r for share, rs in zip(shares, results, strict=True) for name, r in zip(share, rs, strict=True)}


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_without_spills(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled[name]["stack"] == 0
    assert not re.search(r"\b(LDL|STL)\b", compiled[name]["sass"])  # where it was asked for


@pytest.mark.parametrize("name", [name for name in VARIANTS if not re.match(r"plan_rows|grouped_gemm|.*-h130-", name)])
def test_rows_of_whole_vectors_use_16_byte_accesses(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    for ptx, sass in ("ld", "LDG"), ("st", "STG"):
        assert re.search(rf"\b{ptx}\.global[\w.:]*\.v4\.b32\b", compiled[name]["ptx"])
        assert not compiled[name]["sass"] or re.search(rf"\b{sass}\.E\.128\b", compiled[name]["sass"])


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("grouped_gemm")])
def test_divisions_are_ieee_and_nothing_is_fused(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    arithmetic = set(re.findall(r"\b(?:div|fma|mad|rcp)\.[\w.]*f32\b", compiled[name]["ptx"]))
    divides = re.match(r"(permute_)?quantize|swiglu|router", name)
    assert arithmetic == ({"div.rn.f32"} if divides else set())


@pytest.mark.parametrize("name", [name for name in VARIANTS if re.match(r"(permute_)?quantize|.*quantized", name)])
def test_fp8_is_clamped_before_the_cast(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    """Read from the code: no input shows it, since the hardware's cast and the interpreter's saturate as well."""
    clamped = re.search(r"\bmin\.(xorsign\.abs\.)?f32\b.*cvt\.rn\.satfinite\.e4m3x2", compiled[name]["ptx"], re.DOTALL)
    assert clamped is not None


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("permute_quantize")])
def test_scales_are_laid_out_once_for_all_rows(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    """A barrier for each of the K stores would mean that the scales go through shared memory each time."""
    assert len(re.findall(r"\bbar\.sync\b", compiled[name]["ptx"])) < TOP_K


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.get("options") == checks.ASSERTING])
def test_assertions_are_kept(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    assert "__assertfail" in compiled[name]["ptx"]


@pytest.mark.parametrize("name", gemm_variants())
def test_products_are_those_of_the_fp8_tensor_core(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    """128 of k are added in the tensor core, then scaled into fp32; tiles come by bulk copies."""
    sass = compiled[name]["sass"]
    assert len(re.findall(r"\bQGMMA\.64x128x32\.F32\.E4M3\.E4M3\b", sass)) == 128 // 32
    assert re.search(r"\bUTMALDG\.2D\b", sass)


def test_a_spill_would_be_seen(compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled["spilling"]["stack"] > 0
