"""The fewest bytes that each kernel has to move through the GPU's memory: every input read once, every output written
once. Rates and fractions of the copy ceiling are of these bytes, whatever a kernel really moves."""

from __future__ import annotations

BLOCK = 128  # elements of an FP8 block
BF16, FP32, INT32, INT64 = 2, 4, 4, 8
ROW_META, ROW_ENTRY, CHUNK_HEADER = 8, 12, 64  # csrc/proto/chunk.h


def blocks(columns: int) -> int:
    """FP8 blocks of a row."""
    return -(-columns // BLOCK)


def fp8_row(columns: int) -> int:
    """e4m3 values and fp32 scales.

    >>> fp8_row(7168)
    7392
    """
    return columns + FP32 * blocks(columns)


def quantize(tokens: int, hidden: int) -> int:
    """bf16 rows in, FP8 rows out."""
    return tokens * (BF16 * hidden + fp8_row(hidden))


def dequantize(rows: int, hidden: int) -> int:
    """FP8 rows in, bf16 rows out."""
    return quantize(rows, hidden)


def permute(tokens: int, rows: int, hidden: int) -> int:
    """A token is read once, and written to each of its rows, with a weight for each."""
    return BF16 * hidden * (tokens + rows) + 2 * FP32 * rows + INT32 * rows


def permute_quantize(tokens: int, rows: int, hidden: int) -> int:
    """The same with FP8 rows: quantized before the rows are many."""
    return BF16 * hidden * tokens + fp8_row(hidden) * rows + 2 * FP32 * rows + INT32 * rows


def pack(*, tokens: int, hidden: int, chunk_bytes: int) -> int:
    """Tokens that go anywhere are read once; chunks are written, headers and metadata included."""
    return BF16 * hidden * tokens + chunk_bytes


def pull(*, chunk_bytes: int, rows: int, hidden: int, fp8_out: bool) -> int:
    """Chunks are read once; every row is written, with its weight."""
    return chunk_bytes + rows * ((fp8_row(hidden) if fp8_out else BF16 * hidden) + FP32)


def combine(*, tokens: int, rows: int, hidden: int, weighted: bool = True) -> int:
    """Rows are read once, sums are written; a plan entry and a weight for each row."""
    return BF16 * hidden * (rows + tokens) + rows * (INT64 + (FP32 if weighted else 0))


def unpermute(tokens: int, rows: int, hidden: int) -> int:
    """As combine, with a position for each row."""
    return BF16 * hidden * (rows + tokens) + rows * (INT32 + FP32)


def unpermute_backward(tokens: int, rows: int, hidden: int) -> int:
    """The output's gradient is read once for each token, y once; gradients of y and of the weights are written."""
    return BF16 * hidden * (tokens + 2 * rows) + rows * (INT32 + 2 * FP32)


def swiglu(rows: int, intermediate: int, *, quantized: bool) -> int:
    """gate and up in, their product out; a weight for each row."""
    out = fp8_row(intermediate) if quantized else BF16 * intermediate
    return rows * (2 * BF16 * intermediate + out + FP32)


def swiglu_backward(rows: int, intermediate: int, *, quantized: bool) -> int:
    """grad_hidden, gate and up in; their gradients out in bf16, and in FP8 too; a weight and its gradient."""
    fp8 = 2 * fp8_row(intermediate) if quantized else 0
    return rows * (BF16 * intermediate + 2 * (2 * BF16 * intermediate) + fp8 + 2 * FP32)


def plan(tokens: int, topk: int, rows: int) -> int:
    """Ids and weights are read; written are an entry for each selection, two numbers for each row."""
    return tokens * topk * (INT64 + FP32 + ROW_ENTRY) + 2 * INT32 * rows


def plan_rows(tokens: int, topk: int, experts: int) -> int:
    """Ids are read once, positions written; counts and offsets."""
    return tokens * topk * (INT64 + INT32) + experts * (INT64 + INT32)


def router(tokens: int, experts: int, topk: int) -> int:
    """Logits in; ids, weights and, since gradients need them, all scores out."""
    return tokens * (2 * FP32 * experts + topk * (INT64 + FP32))


def grouped_gemm_flops(rows: int, n: int, k: int) -> int:
    """Multiplications and additions of rows [k] by matrices [n, k]; padding is not counted."""
    return 2 * rows * n * k
