"""bench/gpu_check.py without a GPU: the whole flow as a dry run, and each of its parts where it decides something."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_efa.triton_kernels import reference

ROOT = Path(__file__).resolve().parents[1]
ENTRY = ROOT / "bench" / "gpu_check.py"


@pytest.fixture(scope="module", autouse=True)
def bench_on_path() -> Iterator[None]:
    """`gpu` is the package beside the entry."""
    sys.path.insert(0, str(ROOT / "bench"))
    yield
    sys.path.remove(str(ROOT / "bench"))


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of a dry run, its output and the picture."""
    folder = tmp_path_factory.mktemp("gpu_check")
    command = [sys.executable, ENTRY, "--dry-run", "--json", folder / "gpu.json", "--plot", folder / "gpu.png"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    document: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return document | {"output": result.stdout, "picture": folder / "gpu.png"}


# ---- the flow ----


@pytest.mark.timeout(300)
def test_a_dry_run_checks_and_times_everything(dry_run: dict[str, Any]) -> None:
    assert dry_run["dry_run"] and dry_run["exit_status"] == 0
    assert {section["status"] for section in dry_run["sections"]} == {"done"}
    names = [check["name"] for check in dry_run["checks"]]
    assert len(names) == len(set(names)) > 100 and all(check["ok"] for check in dry_run["checks"])
    for what in ("cuda plan", "cuda pack fp8", "cuda pull and combine", "triton router groups", "triton unpermute"):
        for routing in ("no-tokens", "nothing-selected", "one-expert-takes-all", "skewed-with-none", "one-token"):
            assert any(name.startswith(what) and routing in name for name in names), (what, routing)
    assert dry_run["measured"]["copy_gb_per_s"] > 0 and dry_run["measured"]["flag_round_trip_us"] > 0
    for key in ("date", "device", "driver", "torch", "triton", "nvcc", "commit", "verdict"):
        assert key in dry_run


KERNELS = {
    *("cuda-plan", "cuda-pack-fp8-6sm", "cuda-pack-fp8", "cuda-pack-bf16"),
    *("cuda-pull-fp8-to-bf16", "cuda-pull-fp8", "cuda-combine-bf16"),
    *("triton-router", "triton-plan-rows", "triton-quantize", "triton-permute", "triton-permute-quantize"),
    *("triton-unpermute", "triton-unpermute-backward", "triton-swiglu", "triton-swiglu-quantize"),
    *("triton-swiglu-backward", "grouped-mm-bf16", "grouped-mm-bf16-wgrad", "triton-grouped-gemm-fp8"),
    "layer-share-2-waves",
}


@pytest.mark.timeout(300)
def test_every_case_has_its_conditions_ceiling_and_peers(dry_run: dict[str, Any]) -> None:
    cases = {case["kernel"]: case for case in dry_run["cases"]}
    assert set(cases) == KERNELS
    for kernel, case in cases.items():
        assert (case["bytes"] or case["flops"]) > 0 and case["ceiling"] > 0 and case["conditions"], kernel
        assert case["us_p20"] <= case["us"] <= case["us_p80"], kernel
        assert math.isclose(case["fraction"], case["rate"] / case["ceiling"]), kernel
        if not kernel.startswith("layer-share") and kernel not in ("cuda-pack-fp8-6sm", "grouped-mm-bf16-wgrad"):
            assert any(peer["us"] for peer in case["peers"].values()), kernel
    bars = {kernel: [bar["what"] for bar in case["bars"]] for kernel, case in cases.items()}
    assert "fraction of copy" in bars["cuda-pull-fp8"] and "plan, us" in bars["cuda-plan"]
    assert "wire GB/s on 6 SMs" in bars["cuda-pack-fp8-6sm"]
    pair = [bar for bar in cases["triton-permute-quantize"]["bars"] if "unfused pair" in bar["what"]]
    assert [bar["least"] for bar in pair] == [3.0]
    share = cases["layer-share-2-waves"]["numbers"]
    assert share["compute_us"] > 0 and share["wire_us"] > 0 and "overlap_efficiency" in share


@pytest.mark.timeout(300)
def test_the_table_says_that_it_is_made_up_and_the_picture_is_drawn(dry_run: dict[str, Any]) -> None:
    assert "DRY RUN" in dry_run["output"] and "MISS cuda-pull-fp8" in dry_run["output"]
    for kernel in KERNELS:
        assert kernel in dry_run["output"]
    assert dry_run["picture"].read_bytes().startswith(b"\x89PNG")


def test_the_device_half_compiles(tmp_path: Path, dry_run: dict[str, Any]) -> None:
    """What a dry run has a stand-in for. The kernels themselves are compiled by test_cuda_compile.py."""
    from gpu import build, machine

    setup = machine.load_setup()
    nvcc = setup.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: test_cuda_compile.py says whether there should be one")
    include = ["-Icsrc", "-isystem", str(setup.cuda_toolkit(nvcc) / "include")]
    host = [*setup.compiler(), *build.HOST_FLAGS, "-Werror", "-Wall", "-DMOE_EFA_SHIM_ON_GPU=1", *include]
    subprocess.run([*host, "-fsyntax-only", "bench/gpu/kernels_shim.cc"], check=True, cwd=ROOT)
    tests = [*host, *build.TEST_FLAGS]
    for test in build.TESTS:
        subprocess.run([*tests, "-fsyntax-only", test], check=True, cwd=ROOT)
    subprocess.run([*tests, "-c", build.TESTS_MAIN, "-o", tmp_path / "main.o"], check=True, cwd=ROOT)
    assert " T main\n" in subprocess.run(["nm", tmp_path / "main.o"], check=True, capture_output=True, text=True).stdout
    arch = "-gencode=arch=compute_90a,code=sm_90a"
    command = [nvcc, "-std=c++20", arch, *include, "-c", "bench/gpu/waits.cu", "-o", tmp_path / "waits.o"]
    subprocess.run(command, check=True, cwd=ROOT)
    assert build.architecture([9, 0]) == build.architecture(None) == "sm_90a"
    assert build.architecture([8, 0]) == "sm_80" and build.architecture([10, 0]) == "sm_100a"


# ---- the shim ----


@pytest.fixture
def world(dry_run: dict[str, Any]) -> Iterator[Any]:
    """A rank among four on two nodes, with expert ids that tests may spoil."""
    from gpu import build, cuda_kernels

    setting = SimpleNamespace(dry_run=True, device="cpu", stream=0, synchronize=lambda: None)
    shim = cuda_kernels.Shim(build.shim_path(dry_run=True))
    topk_idx = torch.tensor([[0, 5], [7, -1], [3, 2], [6, 1]])
    made = cuda_kernels.World(
        shim,
        setting,
        topk_idx=topk_idx,
        topk_weights=torch.rand(4, 2),
        x=torch.randn(4, 256).to(torch.bfloat16),
        num_experts=8,
        num_nodes=2,
        node_size=2,
    )
    yield made
    made.close()


def test_a_byte_that_differs_is_seen(world: Any) -> None:
    world.run("pack", 2)
    assert world.check("pack") is None
    # Tokens 0 and 3 go to both nodes, 1 to the second, 2 to the first.
    assert (world.facts.rows, world.facts.remote_rows, world.facts.tokens, world.facts.entries) == (6, 3, 4, 7)
    byte = int((world._arena != 0xEE).nonzero()[-1])
    memory, x = world._arena.clone(), world._x.clone()
    world._x[3, 100] += 1.0
    assert "differs" in world.check("pack")
    world._x.copy_(x)
    world._arena.fill_(0xEE)
    assert world.check("pack") is not None
    world._arena.copy_(memory)
    assert byte > 0 and world.check("pack") is None


def test_a_fault_of_a_kernel_is_an_error_with_its_text(world: Any) -> None:
    from gpu.cuda_kernels import KernelError

    world._topk_idx[2, 1] = 8
    with pytest.raises(KernelError, match=r"is 8, outside \[-1, 8\)"):
        world.run("plan")


def test_shapes_that_the_shim_refuses(world: Any) -> None:
    from gpu.cuda_kernels import KernelError

    with pytest.raises(KernelError, match="only plans and packs"):
        world.run("pull", 1)


# ---- bytes ----


def test_floors_by_hand() -> None:
    from gpu import floors, layer_share

    assert floors.fp8_row(7168) == 7168 + 4 * 56 == 7392
    assert floors.quantize(4096, 7168) == 4096 * (14336 + 7392)
    # One token of 256, two rows: read once, written twice with a weight; a position and a weight are read for each.
    assert floors.permute(1, 2, 256) == 512 + 2 * 512 + 2 * (4 + 4) + 2 * 4
    assert floors.permute_quantize(1, 2, 256) == 512 + 2 * (256 + 8) + 2 * (4 + 4) + 2 * 4
    assert floors.pack(tokens=3, hidden=256, chunk_bytes=1000) == 3 * 512 + 1000
    assert floors.pull(chunk_bytes=1000, rows=5, hidden=256, fp8_out=True) == 1000 + 5 * (264 + 4)
    assert floors.pull(chunk_bytes=1000, rows=5, hidden=256, fp8_out=False) == 1000 + 5 * (512 + 4)
    assert floors.combine(tokens=2, rows=5, hidden=256) == 7 * 512 + 5 * (8 + 4)
    assert floors.unpermute(2, 5, 256) == 7 * 512 + 5 * 8
    assert floors.unpermute_backward(2, 5, 256) == (2 + 5 + 5) * 512 + 5 * (4 + 8)
    assert floors.swiglu(3, 128, quantized=False) == 3 * (512 + 256 + 4)
    assert floors.swiglu(3, 128, quantized=True) == 3 * (512 + 128 + 4 + 4)
    assert floors.swiglu_backward(3, 128, quantized=False) == 3 * (256 + 512 + 512 + 8)
    assert floors.swiglu_backward(3, 128, quantized=True) == 3 * (256 + 512 + 512 + 2 * 132 + 8)
    assert floors.plan(10, 2, 15) == 20 * (8 + 4 + 12) + 15 * 8
    assert floors.plan_rows(10, 2, 4) == 20 * 12 + 4 * 12
    assert floors.router(10, 4, 2) == 10 * (2 * 16 + 2 * 12)
    assert floors.grouped_gemm_flops(3, 5, 7) == 210
    assert layer_share.wire_us(5e6) == 100.0
    assert layer_share.overlap_efficiency(100.0, 50.0, 110.0) == 0.8


def test_bytes_of_the_wire_by_hand() -> None:
    from gpu import layer_share, shapes

    shape = shapes.Shape(model="m", tokens=3, hidden=128, intermediate=128, experts=8, topk=2, ranks=4, node_size=2)
    sent = layer_share.wire_bytes(shape, torch.tensor([[0, 1], [3, 4], [7, 5]]))  # two rows leave node 0
    assert (sent.dispatch, sent.combine) == (2 * 132, 2 * 256)
    assert sent.grad_dispatch == sent.grad_combine == 2 * 256


def test_constants_of_a_chunk_are_those_of_the_wire() -> None:
    from gpu import floors

    header = (ROOT / "csrc/proto/chunk.h").read_text()
    for name, size in (
        ("ChunkHeader", floors.CHUNK_HEADER),
        ("RowMeta", floors.ROW_META),
        ("RowEntry", floors.ROW_ENTRY),
    ):
        assert f"static_assert(sizeof({name}) == {size})" in header


# ---- comparisons ----


def test_comparisons_see_what_differs() -> None:
    from gpu import checks

    a = torch.tensor([[1.0, -0.0], [2.0, torch.nan]])
    assert checks.bitwise("x", a, a.clone()) is None
    assert "1 of 16 bytes differ" in str(checks.bitwise("x", a, a.abs()))
    assert "not torch.bfloat16" in str(checks.bitwise("x", a, a.bfloat16()))
    assert checks.bitwise("x", a[:0], a[:0]) is None
    assert "1 of 4 elements" in str(checks.bounded("x", a, a.nan_to_num(0.0), 0.5)), "NaN passes nothing"
    assert checks.bounded("x", a[:1], a[:1] + 0.25, 0.25) is None
    assert "beyond" in str(checks.bounded("x", a[:1], a[:1] + 0.26, 0.25))
    big, small = torch.full((1, 8), 1000.0), torch.ones(1, 8)
    wrong = torch.cat([big, small * 1.5])
    assert "1 of 2 elements" in str(checks.rows_within("x", wrong, torch.cat([big, small]), 0.01)), "one small row"
    assert checks.first_problem(None, "a", "b") == "a"


def test_sums_and_rows_are_those_of_the_reference() -> None:
    from gpu import checks
    from gpu.cuda_speed import source_rows

    generator = torch.Generator().manual_seed(0)
    topk_idx = torch.randint(-1, 5, (9, 3), generator=generator)
    plan = reference.plan_rows(topk_idx, num_experts=5)
    source, positions = source_rows(topk_idx, 5)
    assert torch.equal(positions, plan.positions)
    x = torch.randn(9, 33, generator=generator)
    assert torch.equal(reference.permute(x, plan)[0], x[source])
    y = torch.randn(len(source), 33, generator=generator).to(torch.bfloat16)
    weights = torch.rand(len(source), generator=generator)
    for row_weights in (weights, None):
        expected = reference.unpermute(y, plan, weights=row_weights)[0]
        assert checks.bitwise("out", checks.fixed_order_sum(y, positions, row_weights), expected) is None


def test_best_experts_are_those_of_the_reference() -> None:
    from gpu.triton_speed import best_experts

    logits = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)).mul(2).round()  # many ties
    bias = torch.linspace(0, 0.1, 16)
    options = {"score_function": "sigmoid", "n_group": 4, "topk_group": 2}
    expected = reference.router_topk(logits, 5, e_score_correction_bias=bias, **options)
    assert torch.equal(best_experts(expected.scores, 5, bias, 4, 2), expected.topk_idx)
    expected = reference.router_topk(logits, 5)
    assert torch.equal(best_experts(expected.scores, 5, None, 1, 1), expected.topk_idx)


def test_torch_versions_do_the_same_work() -> None:
    from gpu import torch_versions as t

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 256, generator=generator).to(torch.bfloat16)
    topk_idx = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(6)])
    plan = reference.plan_rows(topk_idx, num_experts=4)
    source = (plan.positions.flatten().argsort() // 2).long()
    weights = torch.rand(12, generator=generator)
    torch.testing.assert_close(t.quantize(x)[1], reference.quantize_1x128(x)[1])
    q, scales = t.quantize(x)
    values = reference.dequantize_1x128(q, scales, dtype=torch.bfloat16)
    assert torch.equal(t.dequantize_rows(q, scales, source), values[source])
    for pair in (t.permute_then_quantize(x, source), t.quantize_then_permute(x, source)):
        assert torch.equal(pair[0].view(torch.uint8), q.view(torch.uint8)[source]) and torch.equal(
            pair[1], scales[source]
        )
    y = t.permute(x, source)
    expected = reference.unpermute(y, plan, weights=weights)[0]
    torch.testing.assert_close(t.unpermute(y, plan.positions, weights), expected)
    torch.testing.assert_close(t.unpermute_index_add(y, source, weights, 6), expected)
    for got, want in zip(
        t.unpermute_backward(x, y, source, weights),
        reference.unpermute_backward(x, y, plan, weights=weights),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(t.swiglu(y, weights), reference.swiglu(y, weights=weights))
    got_grads = t.swiglu_backward(y[:, :128], y, weights)
    want_grads = reference.swiglu_backward(y[:, :128], y, weights=weights)
    torch.testing.assert_close(got_grads[0], want_grads.grad_gate_up)
    torch.testing.assert_close(got_grads[1], want_grads.grad_weights)
    counts, ends, positions = t.plan_rows(topk_idx, 4)
    assert torch.equal(counts, plan.tokens_per_expert) and torch.equal(positions.int(), plan.positions)
    assert torch.equal(ends.int(), plan.offsets[1:])
    logits = torch.randn(6, 16, generator=generator)
    want = reference.router_topk(logits, 4, score_function="sigmoid", n_group=4, topk_group=2)
    idx, found_weights, _ = t.router(logits, 4, 4, 2)
    assert torch.equal(idx, want.topk_idx)
    torch.testing.assert_close(found_weights, want.topk_weights)


def test_rows_of_a_grouped_product_are_cut_in_blocks() -> None:
    from gpu.grouped_gemm import Problem, offsets_of

    even = offsets_of(Problem(name="even", rows=1024, experts=3, n=1, k=1))
    assert even.tolist() == [0, 384, 768, 1024]
    skewed = offsets_of(Problem(name="skewed", rows=1024, experts=3, n=1, k=1, skewed=True))
    assert skewed.tolist() == [0, 512, 768, 1024]


# ---- time ----


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_job_that_overruns_is_cut_with_what_it_started(tmp_path: Path) -> None:
    from gpu.budget import Budget, Job

    code = (
        "import subprocess, sys, time; print('begun', flush=True);"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    )
    budget, start = Budget(30.0), time.monotonic()
    outcome = budget.run(Job(name="slow", command=python(code), limit_s=1.0), log=tmp_path / "log")
    assert outcome.status == "cut" and outcome.detail == "it had 1 s"
    assert time.monotonic() - start < 15
    assert (tmp_path / "log").read_text() == "begun\n"


def test_jobs_end_as_they_should(tmp_path: Path) -> None:
    from gpu.budget import Budget, Job

    budget = Budget(60.0)
    jobs = [
        Job(name="good", command=python("print('fine')"), limit_s=30.0),
        Job(name="bad", command=python("print('oh'); raise SystemExit(3)"), limit_s=30.0),
    ]
    good, bad = budget.run_together(jobs, log_of=lambda job: tmp_path / job.name)
    assert good.status == "done" and (tmp_path / "good").read_text() == "fine\n"
    assert bad.status == "failed" and bad.detail == "exit status 3: oh"


def test_the_budget_bounds_every_job_and_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    from gpu.budget import Budget, Job

    now = 0.0
    budget = Budget(100.0, clock=lambda: now)
    job = Job(name="a", command=python("pass"), limit_s=40.0, least_s=5.0)
    assert budget.limit_of(job) == 40.0
    now = 70.0
    assert budget.limit_of(job) == 30.0
    now = 96.0
    assert budget.limit_of(job) is None
    outcome = budget.run(job, log=tmp_path / "log")
    assert outcome.status == "left out" and outcome.detail == "4 s were left of the budget"
    now = 200.0
    assert budget.left_s() == 0.0


def test_a_job_ends_with_who_started_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = (
        "import os, time; from pathlib import Path; from gpu.budget import end_with_parent; end_with_parent();"
        f"Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = (
        "import sys; from pathlib import Path; from gpu.budget import Budget, Job;"
        f"job = Job(name='a', command=[sys.executable, '-c', {child!r}], limit_s=60.0);"
        f"Budget(60.0).run(job, log=Path({str(tmp_path / 'log')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": str(ROOT / "bench")})
    deadline = time.monotonic() + 30.0
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    status = Path("/proc", pid_file.read_text(), "stat")
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_section_says_what_it_leaves_out(tmp_path: Path) -> None:
    from gpu import results
    from gpu.setting import make_setting

    setting = make_setting("part", tmp_path, dry_run=True, deadline=time.monotonic() + 5.0, timed=True)
    assert setting.has_time_for("a little", 1.0)
    assert not setting.has_time_for("much", 50.0)
    records = list(results.read(tmp_path / "part.jsonl"))
    assert records == [{"kind": "note", "text": "left out for want of time: much"}]


def test_medians() -> None:
    from gpu.timing import Timing

    timing = Timing.of([5.0, 1.0, 3.0, 2.0, 100.0, 4.0])
    assert (timing.us, timing.us_p20, timing.us_p80, timing.runs) == (3.5, 2.0, 5.0, 6)


# ---- the document ----


def timed(name: str, us: float, **more: Any) -> Any:
    from gpu.results import Timed

    values = {"kernel": name.split("/")[0], "conditions": {}, "us_p20": us, "us_p80": us, "runs": 3, **more}
    return Timed(name=name, us=us, **values)


def test_peers_join_their_cases_and_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    from gpu import report, results
    from gpu.budget import Outcome

    writer = results.Writer(tmp_path / "speed.jsonl")
    bar = results.Bar(what="fraction", value=0.5, least=0.9)
    writer.timed(timed("k/s", 10.0, bytes=43_000_000, ceiling=4300.0, bars=[bar]))
    writer.peer("k", "s", "slow", results.Peer(us=20.0))
    writer.peer("k", "s", "fast", results.Peer(us=5.0))
    writer.peer("k", "s", results.UNFUSED_PAIR, results.Peer(us=29.0))
    writer.peer("k", "s", "absent", results.Peer(note="not available"))
    with (tmp_path / "speed.jsonl").open("a") as file:
        file.write('{"kind": "check", "na')
    outcomes = [
        Outcome(name="speed", status="cut", seconds=1.0),
        Outcome(name="nothing", status="left out", seconds=0.0),
    ]
    document = report.assemble(tmp_path, outcomes, {"device": "none"})
    (case,) = document["cases"]
    assert case["rate"] == 4300.0 and case["fraction"] == 1.0 and case["unit"] == "GB/s" and case["floor_us"] == 10.0
    passed = {bar["what"]: bar["passed"] for bar in case["bars"]}
    assert passed == {
        "fraction": False,
        "slow / ours": True,
        "fast / ours": False,
        f"{results.UNFUSED_PAIR} / ours": False,
    }
    assert case["peers"]["absent"] == {"us": None, "note": "not available", "peer_over_ours": None}
    table = report.format_table(document)
    assert "MISS k/s: fraction 0.50, wanted >= 0.9" in table and "section speed: cut" in table


@pytest.mark.parametrize(
    ("checks", "sections", "status"),
    [
        ([True, True], {"a": "done", "b": "done"}, 0),
        ([True, True], {"a": "done", "b": "cut"}, 0),
        ([True, False], {"a": "done", "b": "done"}, 1),
        ([True], {"a": "done", "b": "failed"}, 1),
        ([True], {"a": "cut", "b": "done"}, 2),
        ([True], {"a": "left out", "b": "done"}, 2),
        ([True], {"b": "done"}, 2),
        ([], {"a": "done", "b": "done"}, 2),
        ([False], {"a": "cut", "b": "done"}, 1),
        ([True], {"build": "failed", "a": "left out", "b": "done"}, 2),
    ],
    ids=[
        "good",
        "speed-cut",
        "wrong",
        "crash",
        "cut",
        "left-out",
        "not-run",
        "nothing-compared",
        "wrong-and-cut",
        "no-build",
    ],
)
def test_exit_status(checks: list[bool], sections: dict[str, str], status: int) -> None:
    """`a` is of correctness, `b` of speed."""
    from gpu import report

    document = {
        "checks": [{"name": f"c{i}", "ok": ok} for i, ok in enumerate(checks)],
        "sections": [{"name": name, "status": word} for name, word in sections.items()],
    }
    assert report.exit_status(document, ["a"])[0] == status


def test_bars_and_nan() -> None:
    from gpu.results import Bar

    assert Bar(what="x", value=1.0, least=1.0).passed and not Bar(what="x", value=0.99, least=1.0).passed
    assert Bar(what="x", value=10.0, most=10.0).passed and not Bar(what="x", value=10.1, most=10.0).passed
    assert not Bar(what="x", value=math.nan, least=1.0).passed


def test_what_the_sanitizer_says_is_judged() -> None:
    from gpu.sanitizer import judge

    assert judge(0, "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors") == (True, "0 errors")
    verdict, detail = judge(
        99, "========= COMPUTE-SANITIZER\n========= Invalid read\n========= ERROR SUMMARY: 2 errors"
    )
    assert verdict is False and "2 errors" in detail and "Invalid read" in detail
    summary = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    assert judge(99, summary)[0] is False
    assert judge(0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")[0] is True
    warned = "========= RACECHECK SUMMARY: 3 hazards displayed (0 errors, 3 warnings)"
    assert judge(0, warned) == (True, warned.lstrip("= "))
    assert judge(99, warned)[0] is None
    assert judge(1, "========= Error: Device not supported. Please refer to the documentation")[0] is None
    assert judge(1, "something else")[0] is None
    assert judge(1, "========= ERROR SUMMARY: 0 errors")[0] is None, "the program failed by itself"


def test_commands_pass_by_their_exit_status(tmp_path: Path) -> None:
    from gpu import commands, results
    from gpu.setting import make_setting

    setting = make_setting("commands", tmp_path, dry_run=True, deadline=time.monotonic() + 60.0, timed=False)
    good, bad, slow, more = (
        commands.Command(name=name, limit_s=5.0, words=("{python}", "-uc", code))
        for name, code in (
            ("good", "print('2 passed')"),
            ("bad", "raise SystemExit('1 failed')"),
            ("slow", "print('same 1.0 s  a'); print('WRONG 0.1 s  b  no'); import time; time.sleep(30)"),
            ("more", "print('never')"),
        )
    )
    commands.run(setting, [good, slow, more])
    commands.run(setting, [bad, more])
    records = list(results.read(tmp_path / "commands.jsonl"))
    assert [(record["name"], record["ok"], record["detail"]) for record in records if record["kind"] == "check"] == [
        ("good", True, "2 passed"),
        ("slow: a", True, ""),
        ("slow: b", False, "no"),
        ("bad", False, "1 failed"),
    ]
    notes = [record["text"] for record in records if record["kind"] == "note"]
    assert notes[0].startswith("slow: not done after 5 s")
    assert notes[1:] == ["left out, for what comes before did not pass: more"] * 2


def test_an_unknown_section_is_refused() -> None:
    result = subprocess.run([sys.executable, ENTRY, "--only", "nothing"], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "no such section: nothing" in result.stderr
