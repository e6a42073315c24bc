"""The oracle against torch's own operators, against the dense definition under autograd, and against hand-made sums."""

import doctest

import pytest
import torch

from moe_efa import reference
from moe_efa.quantization import dequantize_1x128, quantize_1x128
from moe_efa.testing import assert_bitwise, assert_within_ulps
from moe_efa.testing.routing import PATTERNS, uneven_token_counts

NUM_EXPERTS, TOP_K, HIDDEN_SIZE = 8, 4, 16


def make_inputs(pattern, num_ranks, dtype, *, integers=False):
    counts = uneven_token_counts(num_ranks, 12, seed=1)
    routings = [PATTERNS[pattern](counts[r], NUM_EXPERTS, TOP_K, seed=r, drop_fraction=0.2) for r in range(num_ranks)]
    generator = torch.Generator().manual_seed(7)
    x, topk_idx, topk_weights = [], [], []
    for count, routing in zip(counts, routings, strict=True):
        if integers:
            x.append(torch.randint(-4, 5, (count, HIDDEN_SIZE), generator=generator).to(dtype))
            weights = torch.randint(1, 4, (count, TOP_K), generator=generator).float()
            topk_weights.append(weights.masked_fill(routing.topk_idx == -1, float("nan")))
        else:
            x.append(torch.randn(count, HIDDEN_SIZE, generator=generator).to(dtype))
            topk_weights.append(routing.topk_weights)
        topk_idx.append(routing.topk_idx)
    return x, topk_idx, topk_weights


def test_docstring_examples_are_true():
    result = doctest.testmod(reference, extraglobs={"torch": torch})
    assert result.attempted > 20
    assert result.failed == 0


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dispatch_is_a_stable_sort_by_expert(pattern, num_ranks):
    x, topk_idx, topk_weights = make_inputs(pattern, num_ranks, torch.bfloat16)
    plan = reference.make_plan(topk_idx, num_experts=NUM_EXPERTS)
    received = reference.dispatch(x, topk_weights, plan)

    experts = torch.cat(topk_idx).reshape(-1)
    order = torch.argsort(experts, stable=True)
    order = order[experts[order] >= 0]
    rows = torch.cat(x).repeat_interleave(TOP_K, dim=0)[order]
    assert_bitwise(torch.cat([d.x for d in received]), rows)
    assert_bitwise(torch.cat([d.weights for d in received]), torch.cat(topk_weights).reshape(-1)[order])
    counts = torch.bincount(experts[order], minlength=NUM_EXPERTS)
    assert_bitwise(torch.cat([d.tokens_per_expert for d in received]), counts)
    for rank, d in enumerate(received):
        own = counts.reshape(num_ranks, -1)[rank]
        assert d.offsets.tolist() == [0, *own.cumsum(0).tolist()]
        assert d.offsets.dtype == torch.int32


@pytest.mark.parametrize("alignment", [1, 8, 16])
def test_padding_aligns_every_expert_and_changes_no_row(alignment):
    x, topk_idx, topk_weights = make_inputs("skewed", 2, torch.float32)
    dense = reference.dispatch(x, topk_weights, reference.make_plan(topk_idx, num_experts=NUM_EXPERTS))
    plan = reference.make_plan(topk_idx, num_experts=NUM_EXPERTS, expert_alignment=alignment)
    for rank, d in enumerate(reference.dispatch(x, topk_weights, plan)):
        assert_bitwise(d.tokens_per_expert, dense[rank].tokens_per_expert)
        assert all(offset % alignment == 0 for offset in d.offsets.tolist())
        assert int(d.offsets[-1]) == len(d.x)
        for expert, count in enumerate(d.tokens_per_expert.tolist()):
            start, stop = d.offsets[expert : expert + 2].tolist()
            dense_start = int(dense[rank].offsets[expert])
            assert stop - start == -(-count // alignment) * alignment
            assert_bitwise(d.x[start : start + count], dense[rank].x[dense_start : dense_start + count])
            assert not d.x[start + count : stop].any()
            assert not d.weights[start + count : stop].any()


def scaled_experts(num_experts):
    """Expert e multiplies by e + 1, exactly."""
    return [lambda rows, factor=e + 1: rows * factor for e in range(num_experts)]


def expert_factors(plan, rank):
    """[rows, 1] factor of every row's expert; NaN on padding rows."""
    factors = [float("nan") if row is None else row.expert_idx + 1.0 for row in plan.rows[rank]]
    return torch.tensor(factors).reshape(-1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_small_integers_agree_with_autograd_of_the_dense_layer(pattern, num_ranks, alignment, dtype):
    """Sums of small integers are exact in any order, so values and gradients must be equal to the last bit."""
    x, topk_idx, topk_weights = make_inputs(pattern, num_ranks, torch.float32, integers=True)
    plan = reference.make_plan(topk_idx, num_experts=NUM_EXPERTS, expert_alignment=alignment)
    received = reference.dispatch(x, topk_weights, plan)
    weights = [d.weights for d in received]
    y = [d.x * expert_factors(plan, rank) for rank, d in enumerate(received)]
    out = reference.combine(y, plan, weights=weights, node_size=1, combine_dtype="fp32")

    generator = torch.Generator().manual_seed(3)
    grad_out = [torch.randint(-2, 3, o.shape, generator=generator).to(dtype).float() for o in out]
    grad_y, grad_w = reference.combine_backward(grad_out, y, plan, weights=weights)
    grad_rows = [(g * expert_factors(plan, rank)).nan_to_num(0.0) for rank, g in enumerate(grad_y)]
    grad_x, grad_topk = reference.dispatch_backward(grad_rows, grad_w, plan, node_size=num_ranks)

    for rank in range(num_ranks):
        leaf = x[rank].clone().requires_grad_()
        leaf_weights = topk_weights[rank].nan_to_num(0.0).requires_grad_()
        dense = reference.moe_reference(leaf, topk_idx[rank], leaf_weights, scaled_experts(NUM_EXPERTS))
        dense.backward(grad_out[rank])
        # == and not bits: a dense sum starts from +0.0, ours from its first term, so zeros may differ in sign.
        assert torch.equal(out[rank], dense.detach()), f"out of rank {rank}"
        assert torch.equal(grad_x[rank], leaf.grad), f"gradient of x of rank {rank}"
        assert torch.equal(grad_topk[rank], leaf_weights.grad), f"gradient of topk_weights of rank {rank}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("node_size", [1, 2, 4])
def test_random_values_are_within_their_format_of_the_dense_layer(node_size, dtype):
    x, topk_idx, topk_weights = make_inputs("uniform", 4, dtype)
    plan = reference.make_plan(topk_idx, num_experts=NUM_EXPERTS)
    received = reference.dispatch(x, topk_weights, plan)
    out = reference.combine([d.x for d in received], plan, weights=[d.weights for d in received], node_size=node_size)
    for rank in range(4):
        magnitude = topk_weights[rank].nan_to_num(0.0).sum(1, keepdim=True) * x[rank].float()
        dense = reference.moe_reference(
            x[rank].float(), topk_idx[rank], topk_weights[rank], [lambda rows: rows] * NUM_EXPERTS
        )
        # A partial sum is rounded three times, each by at most half an ulp of at most the sum of all magnitudes.
        assert torch.all(dense.abs() <= magnitude.abs() * 1.001)
        fmt = "fp32" if dtype == torch.float32 else "bf16"
        assert_within_ulps(out[rank].float(), dense, ulps=6, fmt=fmt)


def plan_of_one_token(num_ranks, experts):
    """Rank 0 has one token that selects ``experts``; one expert per rank."""
    empty = torch.empty(0, len(experts), dtype=torch.int64)
    return reference.make_plan([torch.tensor([experts])] + [empty] * (num_ranks - 1), num_experts=num_ranks)


@pytest.mark.parametrize(
    ("node_size", "expected"),
    [
        (1, (1e8 + 1.0 - 1e8) + 1.0),  # the ranks one after the other: 1 is lost against 1e8
        (2, 0.0),  # (1e8 + 1) + (-1e8 + 1): each 1 is lost in its node
        (4, 1.0),
    ],
)
def test_sums_run_over_ranks_then_nodes(node_size, expected):
    plan = plan_of_one_token(4, [0, 1, 2, 3])
    y = [torch.tensor([[value]], dtype=torch.float32) for value in (1e8, 1.0, -1e8, 1.0)]
    out = reference.combine(y, plan, node_size=node_size)
    as_fp32 = torch.tensor([[expected]]) if node_size == 2 else torch.tensor([[1.0]])
    assert_bitwise(out[0], as_fp32)


def test_partial_sums_are_rounded_to_the_combine_dtype_and_the_result_to_that_of_y():
    # 256 + 1 needs 9 bits: bf16 has 8, so the 1 is lost as soon as a rank's sum is rounded to it.
    plan = reference.make_plan([torch.tensor([[0, 1, 2]]), torch.empty(0, 3, dtype=torch.int64)], num_experts=4)
    y = [torch.tensor([[256.0], [1.0]]), torch.tensor([[1.0]])]
    assert reference.combine(y, plan, node_size=1, combine_dtype="bf16")[0].item() == 257.0  # 256 + 1 in fp32
    assert reference.combine(y, plan, node_size=2, combine_dtype="bf16")[0].item() == 256.0  # the node's sum, rounded
    assert reference.combine(y, plan, node_size=2, combine_dtype="fp32")[0].item() == 258.0
    as_bf16 = [rows.bfloat16() for rows in y]
    assert reference.combine(as_bf16, plan, node_size=1, combine_dtype="fp32")[0].item() == 258.0
    assert reference.combine(as_bf16, plan, node_size=1)[0].item() == 256.0  # 257, rounded to y's bf16


def test_a_sum_starts_from_its_first_term():
    plan = plan_of_one_token(2, [0, 1])
    out = reference.combine([torch.tensor([[-0.0]])] * 2, plan, node_size=1)
    assert_bitwise(out[0], torch.tensor([[-0.0]]))


def test_the_wire_dtype_rounds_rows_that_a_rank_sends_to_itself():
    x = [torch.tensor([[1.0 + 2**-12, 3.0]])]
    plan = reference.make_plan([torch.tensor([[0]])], num_experts=1)
    received = reference.dispatch(x, [torch.ones(1, 1)], plan, wire_dtype="bf16")
    assert_bitwise(received[0].x, torch.tensor([[1.0, 3.0]]))


def test_products_are_rounded_before_they_are_added():
    # (1 + e)^2 = 1 + 2e + e^2 with e = 2^-12: e^2 is below half an ulp of fp32, and a fused multiply-add would keep it.
    e = 2.0**-12
    plan = plan_of_one_token(2, [0, 0])
    rows = torch.tensor([[-(1.0 + 2 * e)], [1.0 + e]])
    out = reference.combine([rows, rows[:0]], plan, weights=[torch.tensor([1.0, 1.0 + e]), torch.zeros(0)], node_size=1)
    assert out[0].item() == 0.0


def test_padding_of_y_is_never_read_and_gets_zero_gradients():
    plan = reference.make_plan([torch.tensor([[0], [0], [1]])], num_experts=2, expert_alignment=4)
    y = [torch.full((8, 2), float("nan"))]
    y[0][[0, 1, 4]] = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    weights = [torch.tensor([2.0, 3.0, 0, 0, 4.0, 0, 0, 0])]
    out = reference.combine(y, plan, weights=weights, node_size=1)
    assert out[0].tolist() == [[2.0, 4.0], [9.0, 12.0], [20.0, 24.0]]
    grad_y, grad_weights = reference.combine_backward([torch.ones(3, 2)], y, plan, weights=weights)
    assert grad_weights[0].tolist() == [3.0, 7.0, 0, 0, 11.0, 0, 0, 0]
    assert grad_y[0][:, 0].tolist() == [2.0, 3.0, 0, 0, 4.0, 0, 0, 0]


def test_uneven_divisions_are_refused():
    with pytest.raises(ValueError, match="num_experts=3"):
        reference.make_plan([torch.empty(0, 1, dtype=torch.int64)] * 2, num_experts=3)
    with pytest.raises(ValueError, match="node_size=3"):
        reference.combine([torch.empty(0, 1)] * 4, plan_of_one_token(4, [-1]), node_size=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fp8_scale", ["fp32", "ue8m0"])
def test_an_fp8_wire_rounds_every_row_as_the_quantizer_does(fp8_scale, dtype):
    x, topk_idx, topk_weights = make_inputs("skewed", 2, dtype)
    plan = reference.make_plan(topk_idx, num_experts=NUM_EXPERTS, expert_alignment=8)
    values = [dequantize_1x128(*quantize_1x128(t, scale_format=fp8_scale), dtype=dtype) for t in x]
    same = reference.dispatch(x, topk_weights, plan, wire_dtype="fp8", fp8_scale=fp8_scale)
    through = reference.dispatch(x, topk_weights, plan, wire_dtype="fp8", fp8_scale=fp8_scale, output="fp8")
    expected_rows = reference.dispatch(values, topk_weights, plan)
    for rank, (expected, got, raw) in enumerate(zip(expected_rows, same, through, strict=True)):
        assert_bitwise(got.x, expected.x)
        assert got.scales is None
        assert raw.scales is not None
        assert_bitwise(dequantize_1x128(raw.x, raw.scales, dtype=dtype), expected.x)
        padding = torch.tensor([row is None for row in plan.rows[rank]])
        assert padding.any()
        assert bool((raw.scales[padding] == 1).all())


def test_an_fp8_combine_publishes_bf16_and_quantizes_the_sum_of_every_node():
    plan = plan_of_one_token(4, [0, 1, 2, 3])
    # Against 448 the scale is 1. 17.03125 is 17 in bf16, a tie, and so 16 in e4m3; by itself it would be 18.
    y = [torch.tensor([[224.0, column]]) for column in (17.03125, 0.0, 10.0, 9.0)]
    assert reference.combine(y, plan, node_size=2, combine_dtype="fp8")[0].tolist() == [[896.0, 16.0 + 20.0]]
    # Each rank a node: blocks of 224, so scales of 0.5, at which 17 is 34, a tie, and goes to 32; 10 and 9 are exact.
    assert reference.combine(y, plan, node_size=1, combine_dtype="fp8")[0].tolist() == [[896.0, 16.0 + 10.0 + 9.0]]
    assert reference.combine(y, plan, node_size=4, combine_dtype="fp8")[0].tolist() == [[896.0, 36.0]]


def test_gradients_follow_the_dtype_they_are_given():
    x, topk_idx, topk_weights = make_inputs("uniform", 2, torch.float32)
    plan = reference.make_plan(topk_idx, num_experts=NUM_EXPERTS)
    rounded = [dequantize_1x128(*quantize_1x128(t)) for t in x]
    y = [torch.randn(len(rows), HIDDEN_SIZE) for rows in plan.rows]
    weights = [d.weights for d in reference.dispatch(x, topk_weights, plan)]
    for wire_dtype, values in (("auto", x), ("fp8", rounded)):
        grad_y, grad_w = reference.combine_backward(x, y, plan, weights=weights, wire_dtype=wire_dtype)
        expected_y, expected_w = reference.combine_backward(values, y, plan, weights=weights)
        for got, expected in zip([*grad_y, *grad_w], [*expected_y, *expected_w], strict=True):
            assert_bitwise(got, expected)
    for combine_dtype in ("auto", "bf16", "fp8"):
        grad_x, _ = reference.dispatch_backward(y, None, plan, node_size=1, combine_dtype=combine_dtype)
        out = reference.combine(y, plan, node_size=1, combine_dtype=combine_dtype)
        for got, expected in zip(grad_x, out, strict=True):
            assert_bitwise(got, expected)
