"""Dispatch and combine by Triton between gloo processes: the bits of the oracle, and of ExpertParallel on one node.

One set of processes per number of ranks runs all its scenarios; a test looks up its own outcome.
"""

from __future__ import annotations

import doctest
import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

from moe_efa import ConfigError, ExpertParallel, ExpertParallelConfig, reference
from moe_efa.testing import RankError, assert_bitwise, spawn
from moe_efa.testing.routing import PATTERNS, uneven_token_counts
from moe_efa.triton_kernels import intra_node, intra_node_ops
from moe_efa.triton_kernels.intra_node import IntraNode

DTYPES = reference.DTYPES
OPS = torch.ops.moe_efa_triton
NOT_ON_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="gloo does not exchange tensors of a GPU")


@dataclass(frozen=True)
class Case:
    """One line of the grid. ``tokens`` is the most that a rank has."""

    num_ranks: int
    dtype: str = "bf16"
    tokens: int = 7
    hidden_size: int = 40
    top_k: int = 2
    pattern: str = "uniform"
    drop_fraction: float = 0.0
    alignment: int = 1
    weighted: bool = True
    wire_dtype: str = "auto"
    combine_dtype: str = "auto"
    fp8_scale: str = "fp32"

    @property
    def id(self) -> str:
        parts = [f"ep{self.num_ranks}", self.dtype, f"tok{self.tokens}", f"h{self.hidden_size}", f"top{self.top_k}"]
        parts += [self.pattern] if self.pattern != "uniform" else []
        parts += [f"drop{self.drop_fraction:g}"] if self.drop_fraction else []
        parts += [f"align{self.alignment}"] if self.alignment > 1 else []
        parts += [] if self.weighted else ["unweighted"]
        parts += [f"wire-{self.wire_dtype}"] if self.wire_dtype != "auto" else []
        parts += [f"combine-{self.combine_dtype}"] if self.combine_dtype != "auto" else []
        parts += [self.fp8_scale] if self.fp8_scale != "fp32" else []
        return "-".join(parts)

    @property
    def sizes(self) -> dict[str, Any]:
        return {"num_experts": 2 * self.num_ranks, "hidden_size": self.hidden_size, "top_k": self.top_k}

    @property
    def words(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("wire_dtype", "combine_dtype", "fp8_scale")}

    @property
    def num_tokens(self) -> list[int]:
        return uneven_token_counts(self.num_ranks, self.tokens, seed=1)

    @property
    def full_rank(self) -> int:
        return self.num_tokens.index(self.tokens)

    def inputs(self, rank: int) -> tuple[torch.Tensor, ...]:
        """x, topk_idx, topk_weights, the gradient of the result and another x."""
        num_tokens = self.num_tokens[rank]
        routing = PATTERNS[self.pattern](
            num_tokens, 2 * self.num_ranks, self.top_k, seed=rank, drop_fraction=self.drop_fraction
        )
        generator = torch.Generator().manual_seed(rank)
        x, grad_out, other = torch.randn(3, num_tokens, self.hidden_size, generator=generator).to(DTYPES[self.dtype])
        return x, *routing, grad_out, other


CASES = [
    Case(2, drop_fraction=0.2, alignment=4),
    Case(2, dtype="fp32", pattern="one_expert", top_k=3, alignment=8),
    Case(2, pattern="duplicates", top_k=4, weighted=False),
    Case(2, pattern="nothing", alignment=2),
    Case(2, dtype="fp32", tokens=0),
    Case(2, hidden_size=300, wire_dtype="fp8"),
    Case(2, dtype="fp32", hidden_size=136, wire_dtype="fp8", fp8_scale="ue8m0", weighted=False, alignment=2),
    Case(2, dtype="fp32", wire_dtype="bf16", combine_dtype="bf16"),
    Case(4, dtype="bf16", top_k=4, drop_fraction=0.2, combine_dtype="fp32", alignment=2),
    Case(4, dtype="bf16", top_k=6, pattern="skewed", weighted=False),
    Case(4, dtype="fp32", top_k=4, pattern="duplicates", alignment=4),
]
RESULTS = ("rows", "weights", "offsets", "tokens_per_expert", "y", "out")
GRADIENTS = ("grad_y", "grad_rows", "grad_weights", "grad_x", "grad_topk_weights")
REPLAYED = ("replayed", "grad_replayed", "grad_other")


def run(ep: Any, case: Case, rank: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """All that a round gives, on either implementation."""
    x, topk_idx, topk_weights, grad_out, other = (t.to(device) for t in case.inputs(rank))
    leaves = [t.requires_grad_() for t in (x, topk_weights, other)]
    d = ep.dispatch(x, topk_idx, topk_weights, expert_alignment=case.alignment)
    bias = 0 if case.weighted else d.weights[:, None].to(x.dtype)
    y = torch.where((d.weights == 0)[:, None], torch.nan, d.x * 3 + bias)  # padding must not be read
    out = ep.combine(y, d.handle, weighted=case.weighted)
    inner = torch.autograd.grad(out, [y, d.x, d.weights], grad_out, retain_graph=True)
    grads = torch.autograd.grad(out, leaves[:2], grad_out)
    replayed = ep.dispatch(other, handle=d.handle)
    grad_replayed = torch.sin(replayed.x.detach() + 1)
    (grad_other,) = torch.autograd.grad(replayed.x, leaves[2], grad_replayed)
    assert replayed.weights is d.weights
    results = [d.x, d.weights, d.offsets, d.tokens_per_expert, y, out, *inner, *grads]
    results += [replayed.x, grad_replayed, grad_other]
    return {name: t.detach().cpu() for name, t in zip(RESULTS + GRADIENTS + REPLAYED, results, strict=True)}


# Scenarios, between processes


def a_case(rank: int, group: dist.ProcessGroup, case: Case) -> Any:
    node = IntraNode(group, **case.sizes, **case.words)
    actual = run(node, case, rank)
    with ExpertParallel(group, **case.sizes, **case.words, max_tokens_per_rank=16, timeout_s=60.0) as ep:
        assert ep.node_size == case.num_ranks
        return actual, run(ep, case, rank)


def what_travels(rank: int, group: dist.ProcessGroup) -> None:
    """A row for each (token, rank), and routing data only in a dispatch without a handle."""
    case = Case(2, top_k=4, pattern="duplicates", drop_fraction=0.2)
    node = IntraNode(group, **case.sizes)
    x, topk_idx, topk_weights, _, _ = case.inputs(rank)
    exchange, sent = dist.all_to_all_single, []

    def counted(output: torch.Tensor, tensor: torch.Tensor, *splits: list[int], group: dist.ProcessGroup) -> None:
        sent.append(tensor.numel())
        exchange(output, tensor, *splits, group=group)

    def spent(call: Callable[[], Any]) -> tuple[Any, list[int]]:
        sent.clear()
        return call(), sent.copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counted)
        leaves = x.requires_grad_(), topk_weights.requires_grad_()
        d, of_dispatch = spent(lambda: node.dispatch(leaves[0], topk_idx, leaves[1]))
        out, of_combine = spent(lambda: node.combine(d.x * 3, d.handle))
        _, of_backward = spent(lambda: out.sum().backward())
        _, of_replay = spent(lambda: node.dispatch(x, handle=d.handle))
    pairs = {(token, idx // 2) for token, row in enumerate(topk_idx.tolist()) for idx in row if idx >= 0}
    arrived = len(d.handle.plan.positions)
    row, facts = 2 * case.hidden_size, 4 * case.top_k
    counts = 2 * (2 + 2) * 8
    assert of_dispatch == [counts, len(pairs) * 2 * facts, len(pairs) * row]
    assert of_combine == [arrived * row]
    assert of_backward == [len(pairs) * row, arrived * row, arrived * facts]
    assert of_replay == [len(pairs) * row]


def errors_come_before_anything_is_sent(rank: int, group: dist.ProcessGroup) -> None:
    case = Case(2)
    node, other = IntraNode(group, **case.sizes), IntraNode(group, **case.sizes, combine_dtype="fp32")
    x, topk_idx, topk_weights, _, _ = case.inputs(case.full_rank)
    if rank == 0:
        for arguments, message in [
            ((x, topk_idx.clamp(min=4), topk_weights), r"topk_idx must be in \[-1, 4\)"),
            ((x, topk_idx.int(), topk_weights), "topk_idx must be int64"),
            ((x, topk_idx[:, :1], topk_weights), r"topk_idx must be \[\d, 2\]"),
            ((x, topk_idx, topk_weights.double()), "topk_weights must be float32"),
            ((x[:, 1:], topk_idx, topk_weights), r"x must be \[num_tokens, 40\]"),
            ((x.half(), topk_idx, topk_weights), "bfloat16 or float32"),
            ((x.t().contiguous().t(), topk_idx, topk_weights), "contiguous"),
            ((x, topk_idx), "needs topk_idx and topk_weights"),
        ]:
            with pytest.raises(ValueError, match=message):
                node.dispatch(*arguments)
        with pytest.raises(ValueError, match="expert_alignment"):
            node.dispatch(x, topk_idx, topk_weights, expert_alignment=0)
    d = node.dispatch(x, topk_idx, topk_weights, expert_alignment=2)
    if rank == 1:
        for call, message in [
            (lambda: node.combine(d.x[1:], d.handle), "the handle's dispatch gave"),
            (lambda: node.combine(d.x[:, 1:], d.handle), r"y must be \[rows, 40\]"),
            (lambda: node.combine(d.x, d), "pass its .handle"),
            (lambda: other.combine(d.x, d.handle), "another group or configuration"),
            (lambda: node.dispatch(x[1:], handle=d.handle), "the handle's dispatch had"),
            (lambda: node.dispatch(x, topk_idx, topk_weights, handle=d.handle), "not allowed with a handle"),
            (lambda: node.dispatch(x, handle=d.handle, expert_alignment=4), "differs from the handle's 2"),
        ]:
            with pytest.raises(ValueError, match=message):
                call()
    assert node.combine(d.x, d.handle).shape == x.shape
    with pytest.raises(ValueError, match="ranks disagree on x's dtype"):
        node.dispatch(x.float() if rank else x, topk_idx, topk_weights)


def wrong_configurations_are_refused_by_all(rank: int, group: dist.ProcessGroup) -> None:
    for changes, message in [
        ({"hidden_size": 40 + rank}, "rank 1 was configured with hidden_size=41, rank 0 with 40"),
        ({"num_experts": 3}, "not a multiple of the group's 2 ranks"),
        ({"num_experts": 8192}, "at most 4096"),
        ({"top_k": 5}, "top_k=5 is more than num_experts=4"),
        ({"top_k": 0}, "top_k must be a positive integer"),
        ({"combine_dtype": "fp8"}, "combine_dtype='fp8' is unknown"),
        ({"wire_dtype": "fp16"}, "wire_dtype='fp16' is unknown"),
        ({"fp8_scale": "bf16"}, "fp8_scale='bf16' is unknown"),
    ]:
        with pytest.raises(ConfigError, match=message):
            IntraNode(group, **{**Case(2).sizes, **changes})


def test_a_handle_of_other_sizes_is_refused(device: torch.device) -> None:
    sizes = {"num_experts": 3, "hidden_size": 7, "top_k": 2}
    x, topk_idx = torch.ones(2, 7, device=device), torch.tensor([[0, 1], [2, 2]], device=device)
    d = IntraNode(None, **sizes).dispatch(x, topk_idx, torch.ones(2, 2, device=device))
    for change in ({"num_experts": 4}, {"hidden_size": 5}, {"top_k": 1}):
        other = IntraNode(None, **sizes | change)
        with pytest.raises(ValueError, match="another group or configuration"):
            other.combine(torch.ones(d.handle.rows, other.hidden_size, device=device), d.handle)


def compiled_steps_are_the_eager_ones(rank: int, group: dist.ProcessGroup) -> None:
    node = IntraNode(group, **Case(2).sizes)

    def step(x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        d = node.dispatch(x * 2, topk_idx, topk_weights, expert_alignment=4)
        again = node.dispatch(x, handle=d.handle)
        return node.combine(torch.relu(d.x) + again.x, d.handle)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for num_tokens in (5, 8, 0):
        case = Case(2, tokens=9, drop_fraction=0.2)
        x, topk_idx, topk_weights, _, _ = case.inputs(case.full_rank)
        found = []
        for function in (compiled, step):
            leaves = [t[: num_tokens + rank].clone().requires_grad_() for t in (x, topk_weights.nan_to_num(0.0))]
            out = function(leaves[0], topk_idx[: num_tokens + rank], leaves[1])
            found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
        for name, got, want in zip(("out", "grad_x", "grad_topk_weights"), *found, strict=True):
            assert_bitwise(got, want, f"{name} of {num_tokens} tokens")
    assert counter.frame_count <= 3


SCENARIOS: dict[str, tuple[int, Callable[..., Any]]] = {
    **{case.id: (case.num_ranks, functools.partial(a_case, case=case)) for case in CASES},
    **{
        scenario.__name__: (2, scenario)
        for scenario in (
            what_travels,
            errors_come_before_anything_is_sent,
            wrong_configurations_are_refused_by_all,
            compiled_steps_are_the_eager_ones,
        )
    },
}


def run_all(rank: int, group: dist.ProcessGroup, names: list[str]) -> dict[str, Any]:
    """On a rank, whose process pytest did not prepare: results by name, or the text of an error."""
    path = Path(__file__).with_name("conftest.py")
    spec = importlib.util.spec_from_file_location("conftest_of_kernels", path)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.use_deterministic_algorithms(True)  # what is allocated is filled with NaN
    outcomes: dict[str, Any] = {}
    for name in names:
        try:
            outcomes[name] = SCENARIOS[name][1](rank, group)
        except (Exception, pytest.fail.Exception):
            outcomes[name] = traceback.format_exc()
    return outcomes


@functools.cache
def outcomes_of(num_ranks: int) -> list[dict[str, Any]] | Exception:
    names = [name for name, (wanted, _) in SCENARIOS.items() if wanted == num_ranks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        try:
            return spawn(run_all, num_ranks, names, timeout=400.0, fresh=True)
        except (RankError, TimeoutError) as error:
            return error


def outcome(name: str) -> list[Any]:
    """What every rank has to say."""
    outcomes = outcomes_of(SCENARIOS[name][0])
    if isinstance(outcomes, Exception):
        raise outcomes
    results = [found[name] for found in outcomes]
    for rank, result in enumerate(results):
        assert not isinstance(result, str), f"rank {rank}: {result}"
    return results


# Tests


@NOT_ON_GPU
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_the_oracle(case: Case) -> None:
    found = [actual for actual, _ in outcome(case.id)]
    x, topk_idx, topk_weights, grad_out, other = zip(*map(case.inputs, range(case.num_ranks)), strict=True)
    config = ExpertParallelConfig(**case.sizes, **case.words, max_tokens_per_rank=16)
    plan = reference.make_plan(topk_idx, num_experts=config.num_experts, expert_alignment=case.alignment)

    def all_of(name: str) -> list[torch.Tensor]:
        return [results[name] for results in found]

    def compare(name: str, expected: Any) -> None:
        for rank, (got, want) in enumerate(zip(all_of(name), expected, strict=True)):
            assert_bitwise(got, want, f"{name} of rank {rank}")

    scale = {"fp8_scale": case.fp8_scale}
    received = reference.dispatch(x, topk_weights, plan, wire_dtype=case.wire_dtype, **scale)
    compare("rows", [d.x for d in received])
    compare("weights", [d.weights for d in received])
    compare("offsets", [d.offsets for d in received])
    compare("tokens_per_expert", [d.tokens_per_expert for d in received])
    weights = all_of("weights") if case.weighted else None
    sizes: dict[str, Any] = {"node_size": case.num_ranks}
    out = reference.combine(all_of("y"), plan, weights=weights, combine_dtype=case.combine_dtype, **sizes)
    compare("out", out)

    wire_dtype = config.grad_dispatch_dtype
    grad_y, _ = reference.combine_backward(
        grad_out, [y.nan_to_num(0) for y in all_of("y")], plan, weights=weights, wire_dtype=wire_dtype
    )
    compare("grad_y", grad_y)
    if case.weighted:
        for rank, grad_rows in enumerate(reference.dispatch_rows(grad_out, plan, wire_dtype=wire_dtype)):
            products = grad_rows.double() * found[rank]["y"].nan_to_num(0).double()
            bound = case.hidden_size * 2.0**-24 * products.abs().sum(1)
            assert ((found[rank]["grad_weights"].double() - products.sum(1)).abs() <= bound).all()
    sizes["combine_dtype"] = config.grad_combine_dtype
    grad_x, grad_topk_weights = reference.dispatch_backward(all_of("grad_rows"), all_of("grad_weights"), plan, **sizes)
    assert grad_topk_weights is not None
    compare("grad_x", grad_x)
    compare("grad_topk_weights", grad_topk_weights)

    compare("replayed", reference.dispatch_rows(other, plan, wire_dtype=case.wire_dtype, **scale))
    compare("grad_other", reference.dispatch_backward(all_of("grad_replayed"), None, plan, **sizes)[0])


@NOT_ON_GPU
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_expert_parallel_on_one_node(case: Case) -> None:
    for actual, expected in outcome(case.id):
        for name, want in expected.items():
            if case.weighted and name in ("grad_weights", "grad_topk_weights"):  # summed in orders of their own
                torch.testing.assert_close(actual[name], want, rtol=1e-5, atol=1e-5)
            else:
                assert_bitwise(actual[name], want, name)


@NOT_ON_GPU
@pytest.mark.parametrize("name", [name for name in SCENARIOS if not name.startswith("ep")])
def test_between_processes(name: str) -> None:
    outcome(name)


# A single rank


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_rank_is_expert_parallel_without_a_group(dtype: str, device: torch.device) -> None:
    case = Case(1, dtype=dtype, pattern="duplicates", alignment=2)
    with ExpertParallel(None, **case.sizes, max_tokens_per_rank=16, device="cpu") as ep:
        actual, expected = run(IntraNode(None, **case.sizes), case, 0, device), run(ep, case, 0)
    for name in (*RESULTS, "grad_y", "grad_rows", "grad_x", *REPLAYED):
        assert_bitwise(actual[name], expected[name], name)


def test_docstring_example(device: torch.device) -> None:
    with device:
        result = doctest.testmod(intra_node, extraglobs={"torch": torch})
    assert result.attempted >= 6 and result.failed == 0


def calls(device: torch.device) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every operator with its arguments."""
    x, topk_idx, topk_weights, grad_out, _ = (t.to(device) for t in Case(1, dtype="fp32", drop_fraction=0.2).inputs(0))
    topk_weights = topk_weights.nan_to_num(0.0)
    node = IntraNode(None, **Case(1).sizes)
    d = node.dispatch(x, topk_idx, topk_weights, expert_alignment=2)
    plan, options, num_rows = list(d.handle.plan), tuple(d.handle.options), len(d.x)
    leaves = [t.clone().requires_grad_() for t in (x, topk_weights, d.x, d.weights)]
    return {
        "dispatch": (OPS.dispatch, (leaves[0], topk_idx, leaves[1], 2, 2, *options)),
        "dispatch_backward": (OPS.dispatch_backward, (d.x, d.weights, plan, "", "auto")),
        "dispatch_backward-of-tokens": (OPS.dispatch_backward, (d.x, None, plan, "", "bf16")),
        "replay": (OPS.replay, (leaves[0], plan, 2, num_rows, *options)),
        "combine": (OPS.combine, (leaves[2], leaves[3], plan, 2, num_rows, *options)),
        "combine-plain": (OPS.combine, (leaves[2], None, plan, 2, num_rows, *options)),
        "combine_backward": (OPS.combine_backward, (grad_out, d.x, d.weights, plan, 2, num_rows, "", "auto")),
        "combine_backward-plain": (OPS.combine_backward, (grad_out, None, None, plan, 2, num_rows, "", "bf16")),
    }


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_rank_without_tokens_drops_no_call(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks would wait for it. Inductor knows that results of size 0 need no computation."""
    node = IntraNode(None, **Case(1).sizes)
    exchange, made = intra_node_ops._exchange, []

    def counted(rows: torch.Tensor, splits: list[list[int]], group: str) -> torch.Tensor:
        made.append(len(rows))
        return exchange(rows, splits, group)

    monkeypatch.setattr(intra_node_ops, "_exchange", counted)

    def step(x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        node.dispatch(x, topk_idx, topk_weights)  # nobody wants it
        d = node.dispatch(x * 2, topk_idx, topk_weights * 2)
        return node.combine(torch.relu(d.x), d.handle) * 2

    x, topk_idx, topk_weights, _, _ = (t.to(device) for t in Case(1, dtype="fp32", tokens=0).inputs(0))
    with torch._inductor.config.patch(compile_threads=1, force_disable_caches=True):
        out = torch.compile(step, fullgraph=True)(x.requires_grad_(), topk_idx, topk_weights.requires_grad_())
        out.sum().backward()
    assert len(made) == 2 * 3 + 1 + 1 + 2  # dispatches, combine, and backward of combine and of the second dispatch


OPERATORS = ("dispatch", "dispatch_backward", "dispatch_backward-of-tokens", "replay", "combine", "combine-plain")
OPERATORS += ("combine_backward", "combine_backward-plain")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, device: torch.device) -> None:
    operator, arguments = calls(device)[name]
    torch.library.opcheck(operator.default, arguments)
