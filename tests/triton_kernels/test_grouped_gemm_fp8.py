"""grouped_gemm_fp8 against fp64 products of the dequantized operands; and what is handed to DeepGEMM."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_efa.testing import assert_bitwise
from moe_efa.triton_kernels import grouped_gemm_fp8 as module
from moe_efa.triton_kernels import reference
from moe_efa.triton_kernels.grouped_gemm_fp8 import grouped_gemm_fp8

# rows of each expert, rows behind the last, n, k
CASES = {
    "no-rows": ([0, 0], 0, 16, 16),
    "short-blocks": ([3, 0, 5], 0, 48, 16),
    "one-expert-takes-all": ([0, 130, 0], 0, 16, 144),
    "several-blocks-along-n-and-k": ([1, 2], 0, 144, 272),
    "rows-behind-the-last-expert": ([4], 5, 16, 128),
    "no-expert-has-rows": ([0], 7, 16, 16),
}


def operands(case: str, device: torch.device) -> tuple[torch.Tensor, ...]:
    """a, a_scales, b, b_scales, offsets; rows behind the last expert are NaN."""
    counts, extra, n, k = CASES[case]
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    a = torch.randn(int(offsets[-1]) + extra, k, generator=generator)
    a *= torch.exp2(torch.randint(-8, 9, (len(a), 1), generator=generator).float())
    a[int(offsets[-1]) :] = torch.nan
    b = torch.randn(len(counts), n, k, generator=generator)
    tensors = (*reference.quantize_1x128(a), *reference.quantize_128x128(b), offsets)
    return tuple(t.to(device) for t in tensors)


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_error_is_that_of_fp32_sums(case: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = operands(case, device)
    assert_near_exact(grouped_gemm_fp8(*arguments, dtype=dtype, implementation="triton"), dtype, *arguments)
    assert_near_exact(reference.grouped_gemm_fp8(*arguments, dtype=dtype), dtype, *arguments)


def assert_near_exact(
    out: torch.Tensor,
    dtype: torch.dtype,
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    assert out.dtype == dtype and out.shape == (len(a), b.shape[1])
    # Products of e4m3 are exact in fp32; a tensor core adds them with about 14 bits.
    unit = 2.0**-24 * (a.shape[1] + 2) if a.is_cpu else 2.0**-12
    for expert_idx in range(len(b)):
        rows = slice(int(offsets[expert_idx]), int(offsets[expert_idx + 1]))
        columns = torch.arange(a.shape[1], device=a.device) // 128
        x = a[rows].double() * a_scales[rows][:, columns].double()
        of_row = torch.arange(b.shape[1], device=a.device) // 128
        w = b[expert_idx].double() * b_scales[expert_idx][of_row][:, columns].double()
        exact, magnitude = x @ w.T, x.abs() @ w.T.abs()
        bound = unit * magnitude + (2.0**-8 * exact.abs() if dtype == torch.bfloat16 else 0.0)
        assert ((out[rows].double() - exact).abs() <= bound).all()
    assert (out[int(offsets[-1]) :] == 0).all()


def test_a_tile_writes_rows_of_its_expert_only(device: torch.device) -> None:
    """Not seen in a whole result, where the interpreter comes to the other expert's tile later."""
    a, a_scales, b, b_scales, offsets = operands("short-blocks", device)
    out = torch.full((8, 48), 7.0, device=device)
    kernel, tile = module.grouped_gemm_fp8_kernel, [128, 128]
    kernel[(1,)](
        TensorDescriptor.from_tensor(a, tile),
        a_scales,
        TensorDescriptor.from_tensor(b.view(-1, 16), tile),
        b_scales,
        offsets,
        out,
        8,
        n=48,
        k=16,
        num_experts=3,
        padded_groups=4,
        block_size=128,
        num_warps=module.NUM_WARPS,
    )
    expected = reference.grouped_gemm_fp8(a, a_scales, b, b_scales, offsets, dtype=torch.float32)
    torch.testing.assert_close(out[:3], expected[:3], rtol=1e-2, atol=1e-4)
    assert (out[3:] == 7).all()


def test_quantize_128x128_by_hand() -> None:
    x = torch.zeros(1, 130, 129)
    x[0, 0, 0], x[0, 5, 7], x[0, 129, 0], x[0, 3, 128] = 896.0, -3.0, 224.0, torch.inf
    q, scales = reference.quantize_128x128(x)
    assert scales.shape == (1, 2, 2)
    assert scales[0, 0, 0] == 2.0 and scales[0, 1, 0] == 0.5 and scales[0, 1, 1] == 1.0 and scales[0, 0, 1].isnan()
    values = q.float()
    assert values[0, 0, 0] == 448.0 and values[0, 5, 7] == -1.5 and values[0, 129, 0] == 448.0
    assert values[0, :128, 128].isnan().all() and values[0, :, :128].isfinite().all()


def test_docstring_example(run_docstring_example: Callable[..., None]) -> None:
    run_docstring_example(grouped_gemm_fp8, reference.grouped_gemm_fp8)


def test_deep_gemm_gets_what_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for it: it is given the expert of each row, -1 where there is none, and writes into the result."""

    def stand_in(a: Any, b: Any, out: torch.Tensor, experts: torch.Tensor, *, disable_ue8m0_cast: bool) -> None:
        assert disable_ue8m0_cast and experts.dtype == torch.int32 and out.dtype == torch.bfloat16
        assert experts.tolist() == [0] * 128 + [2] * 256 + [-1] * 3
        for row, expert_idx in enumerate(experts.tolist()):
            if expert_idx >= 0:
                out[row] = (a[0][row].float() @ b[0][expert_idx].float().T) * a[1][row] * b[1][expert_idx, 0]

    fake = SimpleNamespace(m_grouped_fp8_gemm_nt_contiguous=stand_in)
    monkeypatch.setitem(sys.modules, "deep_gemm", fake)  # type: ignore[arg-type]
    offsets = torch.tensor([0, 128, 128, 384], dtype=torch.int32)
    a, a_scales = reference.quantize_1x128(torch.randn(387, 128, generator=torch.Generator().manual_seed(0)))
    b, b_scales = reference.quantize_128x128(torch.randn(3, 16, 128, generator=torch.Generator().manual_seed(1)))
    monkeypatch.setattr(module, "_obstacle_to_deep_gemm", lambda a, expert_alignment, dtype: None)
    out = grouped_gemm_fp8(a, a_scales, b, b_scales, offsets, expert_alignment=128)
    expected = reference.grouped_gemm_fp8(a, a_scales, b, b_scales, offsets)
    torch.testing.assert_close(out, expected, rtol=2.0**-7, atol=1e-3)
    assert_bitwise(out[384:], torch.zeros(3, 16, dtype=torch.bfloat16))


def test_deep_gemm_is_taken_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is pretended."""
    on_gpu = SimpleNamespace(device=torch.device("cuda"), shape=(256, 256))
    fake = SimpleNamespace(m_grouped_fp8_gemm_nt_contiguous=None)
    monkeypatch.setitem(sys.modules, "deep_gemm", fake)  # type: ignore[arg-type]
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    obstacle: Callable[..., str | None] = module._obstacle_to_deep_gemm
    assert obstacle(on_gpu, 256, torch.bfloat16) is None
    assert "Hopper" in str(obstacle(torch.zeros(1), 128, torch.bfloat16))
    assert "gives bfloat16" in str(obstacle(on_gpu, 128, torch.float32))
    assert "not a multiple of 128" in str(obstacle(on_gpu, 64, torch.bfloat16))
    assert "k is 144" in str(obstacle(SimpleNamespace(device=on_gpu.device, shape=(1, 144)), 128, torch.bfloat16))
    capability = (10, 0)
    assert "Hopper" in str(obstacle(on_gpu, 128, torch.bfloat16))
    capability = (9, 0)
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace())  # type: ignore[arg-type]
    assert "too old" in str(obstacle(on_gpu, 128, torch.bfloat16))
    monkeypatch.setitem(sys.modules, "deep_gemm", None)  # type: ignore[arg-type]  # import raises
    assert "not installed" in str(obstacle(on_gpu, 128, torch.bfloat16))


def fp8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 16)}, "a must be float8_e4m3fn"),
        ({"a_scales": torch.zeros(2, 2)}, r"a_scales must be \[2, 1\]"),
        ({"b": fp8(3, 16, 32)}, r"b must be \[num_experts, n, 16\]"),
        ({"b_scales": torch.zeros(3, 2, 1)}, r"b_scales must be \[3, 1, 1\]"),
        ({"offsets": torch.zeros(3, dtype=torch.int32)}, r"offsets must be \[4\]"),
        ({"offsets": torch.zeros(4, dtype=torch.int64)}, "offsets must be int32"),
        ({"offsets": torch.tensor([0, 1, 2, 3], dtype=torch.int32)}, "ascend from 0 to at most the 2 rows"),
        ({"offsets": torch.tensor([1, 1, 2, 2], dtype=torch.int32)}, "ascend from 0"),
        ({"offsets": torch.tensor([0, 2, 1, 2], dtype=torch.int32)}, "ascend from 0"),
        ({"b": fp8(0, 16, 16), "b_scales": torch.zeros(0, 1, 1), "offsets": torch.zeros(1).int()}, "num_experts"),
        ({"a": fp8(33)[1:].view(2, 16)}, "a must begin at a multiple of 16 bytes"),
        ({"expert_alignment": 0}, "expert_alignment must be a positive integer"),
        ({"a": fp8(2, 8), "b": fp8(3, 16, 8)}, "n and k must be multiples of 16, got 16 and 8"),
        ({"b": fp8(3, 8, 16)}, "n and k must be multiples of 16, got 8 and 16"),
        ({"dtype": torch.float16}, "dtype must be"),
        ({"implementation": "cublas"}, "implementation must be one of"),
        ({"implementation": "deep_gemm"}, "DeepGEMM cannot be used: it takes scales as ours on Hopper"),
    ],
    ids=[
        "not-fp8",
        "a-scales",
        "k",
        "b-scales",
        "experts",
        "int64",
        "beyond",
        "late",
        "back",
        "none",
        "odd",
        "align",
        "k-8",
        "n-8",
        "fp16",
        "word",
        "deep-gemm",
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "a": fp8(2, 16),
        "a_scales": torch.zeros(2, 1),
        "b": fp8(3, 16, 16),
        "b_scales": torch.zeros(3, 1, 1),
        "offsets": torch.zeros(4, dtype=torch.int32),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        grouped_gemm_fp8(**arguments)
