"""The helpers that other tests trust: comparisons that can fail, routings that are what they say, ranks that end."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from moe_efa.testing import RankError, assert_bitwise, assert_within_ulps, spawn
from moe_efa.testing.compare import ulp
from moe_efa.testing.routing import PATTERNS, one_expert, skewed, uneven_token_counts, uniform

# Comparisons


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32, torch.int64])
def test_bitwise_accepts_equal_tensors(dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    assert_bitwise(tensor, tensor.clone())
    assert_bitwise(tensor[:0], tensor[:0])
    assert_bitwise(tensor[:, :0], tensor[:, :0])


def test_bitwise_report_names_the_first_bad_row_and_the_largest_error():
    expected = torch.arange(12.0).reshape(4, 3)
    actual = expected.clone()
    actual[1, 2] += 0.5
    actual[3] -= 2
    with pytest.raises(AssertionError) as error:
        assert_bitwise(actual, expected, "rows")
    text = str(error.value)
    assert "rows: not bitwise equal" in text
    assert "2 of 4 rows differ, first row 1: 1 of 3 columns" in text
    assert "[1, 2] got 5.5 (0x40b00000), expected 5.0 (0x40a00000)" in text
    assert "rows that differ: 1, 3; largest finite error 2" in text


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([float("nan")]), torch.tensor([1.0])),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.bfloat16)),
        (torch.zeros(1, 0), torch.zeros(0, 1)),
    ],
)
def test_bitwise_refuses(actual, expected):
    with pytest.raises(AssertionError):
        assert_bitwise(actual, expected)


def test_nan_is_bitwise_nan():
    assert_bitwise(torch.tensor([float("nan")]), torch.tensor([float("nan")]))


@pytest.mark.parametrize("fmt", ["bf16", "fp32"])
def test_ulp_is_the_distance_to_the_next_number(fmt):
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[fmt]
    values = torch.tensor([1.0, 1.5, 2.0, 1e-3, 3e4, 0.0], dtype=dtype)
    following = torch.nextafter(values, torch.full_like(values, float("inf")))
    assert_bitwise(ulp(values.double(), fmt), following.double() - values.double())


def test_ulps_bound_each_row_by_its_own_magnitude():
    expected = torch.tensor([[1000.0, 0.0], [1.0, 0.0]])
    off_in_the_large_row = expected + torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    off_in_the_small_row = expected + torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    assert_within_ulps(off_in_the_large_row, expected, ulps=1, fmt="bf16")
    with pytest.raises(AssertionError, match="first row 1"):
        assert_within_ulps(off_in_the_small_row, expected, ulps=1, fmt="bf16")
    with pytest.raises(AssertionError, match="first row 0"):
        assert_within_ulps(off_in_the_large_row, expected, ulps=0.99, fmt="bf16")


def test_ulps_do_not_forgive_nan_or_infinity():
    expected = torch.tensor([[1.0, float("inf"), float("nan")]])
    assert_within_ulps(expected.clone(), expected, ulps=0, fmt="fp32")
    for column in range(3):
        actual = expected.clone()
        actual[0, column] = float("nan") if column < 2 else 1.0
        with pytest.raises(AssertionError):
            assert_within_ulps(actual, expected, ulps=1e9, fmt="fp32")


# Routing


@pytest.mark.parametrize("num_tokens", [0, 1, 50])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_routings_are_seeded_and_in_range(pattern, num_tokens):
    routing = PATTERNS[pattern](num_tokens, 16, 4, seed=3, drop_fraction=0.3)
    again = PATTERNS[pattern](num_tokens, 16, 4, seed=3, drop_fraction=0.3)
    assert_bitwise(routing.topk_idx, again.topk_idx)
    assert_bitwise(routing.topk_weights, again.topk_weights)
    assert routing.topk_idx.shape == routing.topk_weights.shape == (num_tokens, 4)
    assert routing.topk_idx.dtype == torch.int64
    assert routing.topk_weights.dtype == torch.float32
    assert torch.all((routing.topk_idx >= -1) & (routing.topk_idx < 16))
    assert torch.equal(routing.topk_weights.isnan(), routing.topk_idx == -1)


def test_patterns_are_what_they_say():
    for generate in (uniform, skewed):
        idx = generate(200, 16, 4, seed=0).topk_idx.sort(1).values
        assert torch.all(idx[:, 1:] != idx[:, :-1])
    counts = skewed(2000, 16, 2, seed=0).topk_idx.flatten().bincount(minlength=16)
    assert counts[0] > 3 * counts[8]
    assert uniform(2000, 16, 2, seed=0).topk_idx.flatten().bincount(minlength=16).min() > 150
    one = one_expert(50, 16, 4, seed=0, expert_idx=5).topk_idx
    assert torch.equal((one == 5).sum(1), torch.ones(50, dtype=torch.int64))
    assert (one == -1).sum() == 150
    several = PATTERNS["duplicates"](50, 16, 4, seed=0).topk_idx.sort(1).values
    assert torch.all((several[:, 1:] == several[:, :-1]).any(1))
    assert torch.all(PATTERNS["nothing"](5, 16, 4, seed=0).topk_idx == -1)
    dropped = (uniform(500, 16, 4, seed=0, drop_fraction=0.25).topk_idx == -1).float().mean()
    assert 0.2 < dropped < 0.3


def test_uneven_token_counts_have_a_full_and_an_empty_rank():
    assert uneven_token_counts(1, 9, seed=0) == [9]
    for seed in range(10):
        counts = uneven_token_counts(4, 9, seed=seed)
        assert max(counts) == 9
        assert min(counts) == 0


# Ranks in processes


def add_ranks(rank, group, offset):
    total = torch.tensor([rank])
    dist.all_reduce(total, group=group)
    return {"rank": rank, "total": total + offset, "pid": os.getpid()}


def test_spawn_returns_results_in_rank_order():
    results = spawn(add_ranks, 3, 10)
    assert [result["rank"] for result in results] == [0, 1, 2]
    assert [int(result["total"]) for result in results] == [13, 13, 13]
    assert all(not is_alive(result["pid"]) for result in results)


def variable_of_rank(rank, group):
    return os.environ.get("MOE_EFA_TEST_VARIABLE")


def test_fresh_ranks_have_the_environment_of_the_call(monkeypatch):
    spawn(variable_of_rank, 1)  # the server of the others runs
    monkeypatch.setenv("MOE_EFA_TEST_VARIABLE", "set")
    assert spawn(variable_of_rank, 2, fresh=True) == ["set", "set"]


class TwoArgumentError(Exception):
    """Cannot be unpickled: its constructor wants two arguments, pickling keeps one."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def fail_on_one(rank, group, kind):
    if rank == 1:
        raise ValueError("bad number") if kind == "builtin" else TwoArgumentError("this", "that")
    dist.barrier(group)


def test_spawn_raises_the_first_failure_with_its_rank_and_traceback():
    with pytest.raises(RankError) as error:
        spawn(fail_on_one, 2, "builtin")
    assert error.value.rank == 1
    assert isinstance(error.value.__cause__, ValueError)
    assert "rank 1 failed first" in str(error.value)
    assert "in fail_on_one" in str(error.value)
    assert "bad number" in str(error.value)


def test_spawn_shows_exceptions_that_cannot_be_pickled():
    with pytest.raises(RankError, match="this and that") as error:
        spawn(fail_on_one, 2, "special")
    assert error.value.__cause__ is None


def hang(rank, group, folder):
    (folder / str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        time.sleep(1000)


@pytest.mark.alone
def test_spawn_kills_and_shows_ranks_that_hang(tmp_path):
    start = time.monotonic()
    with pytest.raises(TimeoutError) as error:
        spawn(hang, 2, tmp_path, timeout=4.0)
    assert time.monotonic() - start < 20
    assert "ranks [1] did not finish within 4 s" in str(error.value)
    assert "in hang" in str(error.value)
    assert not is_alive(int((tmp_path / "1").read_text()))


def die(rank, group):
    dist.barrier(group)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return rank


def test_spawn_reports_a_rank_that_dies_unless_it_may():
    with pytest.raises(RankError, match="exit code -9") as error:
        spawn(die, 2)
    assert error.value.rank == 1
    assert spawn(die, 2, may_die=(1,)) == [0, None]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
