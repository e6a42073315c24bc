"""What the README shows is what the package does: its example runs, its tables are generated."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

import moe_efa
from moe_efa import env

README = Path(__file__).resolve().parents[1] / "README.md"


def test_settings_table_is_generated() -> None:
    assert env.as_markdown().strip() in README.read_text()


def test_the_example_runs_as_the_readme_says(tmp_path: Path) -> None:
    text = README.read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    (tmp_path / "quick.py").write_text(code.group(1))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "quick.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = re.findall(r"rank (\d): (\d+) rows came, 8 results, \|grad\| [\d.]+", done.stdout)
    assert sorted(rank for rank, _ in told) == ["0", "1", "2", "3"]
    assert sum(int(rows) for _, rows in told) == 4 * 8 * 2  # every (token, expert) arrived somewhere


def test_the_experts_of_the_readme_are_the_dense_layer() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    definition, call = blocks[1].split("\nout = ")
    torch.manual_seed(0)
    tokens, hidden, num_experts = 7, 12, 4
    x, probabilities = torch.randn(tokens, hidden), torch.rand(tokens, num_experts).softmax(-1)
    topk_weights, topk_idx = probabilities.topk(2)
    with moe_efa.ExpertParallel(None, num_experts=4, hidden_size=hidden, top_k=2, max_tokens_per_rank=8) as ep:
        names: dict[str, Any] = {"torch": torch, "ep": ep, "hidden": hidden}
        names |= {"x": x, "topk_idx": topk_idx, "topk_weights": topk_weights}
        exec(definition, names)
        exec("out = " + call, names)
        experts = names["experts"]
        dense = torch.zeros(tokens, hidden)
        for expert in range(num_experts):
            gate, up = (x @ experts.gate_up[expert]).chunk(2, dim=-1)
            weight = (topk_weights * (topk_idx == expert)).sum(-1, keepdim=True)
            dense = dense + weight * ((torch.nn.functional.silu(gate) * up) @ experts.down[expert])
        torch.testing.assert_close(names["out"], dense)


def test_the_layer_of_the_readme_trains() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "moe_efa": moe_efa, "group": None}
    exec(blocks[2], names)
    layer = names["layer"]
    assert names["out"].shape == (2, 64, 64)
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert set(layer.router.e_score_correction_bias.abs().tolist()) <= {0.0, float(torch.tensor(1e-3))}
    layer.close()


def test_the_compiled_checkpoint_of_the_readme_is_the_layer() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    definition, code = blocks[1].split("\nout = ")[0], blocks[3]
    torch.manual_seed(0)
    options = {"num_experts": 4, "hidden_size": 16, "top_k": 2, "max_tokens_per_rank": 8}
    with moe_efa.ExpertParallel(None, **options) as ep, torch._inductor.config.patch(compile_threads=1):
        names = {"torch": torch, "moe_efa": moe_efa, "ep": ep, "hidden": 16, "inner": 24}
        names["x"] = torch.randn(7, 16, dtype=torch.bfloat16, requires_grad=True)
        names["topk_weights"], names["topk_idx"] = torch.rand(7, 4).softmax(-1).topk(2)
        exec(compile(definition, "blocks[1]", "exec"), names)
        exec(compile(code, "blocks[3]", "exec"), names)
        before = ep.stats()
        names["out"].float().sum().backward()
        after = ep.stats()
        assert [after[phase]["calls"] - before[phase]["calls"] for phase in ("dispatch", "combine")] == [1, 1]
        grad, names["x"].grad = names["x"].grad, None
        dense = names["layer"](names["x"], names["topk_idx"], names["topk_weights"])
        dense.float().sum().backward()
        torch.testing.assert_close(names["out"], dense, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(grad, names["x"].grad, rtol=2e-2, atol=2e-2)
    torch._dynamo.reset()


def test_a_step_with_a_capacity_is_repeated_as_the_readme_says() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    definition, grouped, code = blocks[1].split("\nout = ")[0], blocks[3].split("\ndef layer")[0], blocks[4]
    torch.manual_seed(0)
    maxima: list[int] = []  # what the all-reduce of one rank sees
    with moe_efa.ExpertParallel(None, num_experts=4, hidden_size=16, top_k=2, max_tokens_per_rank=8) as ep:
        names: dict[str, Any] = {"torch": torch, "moe_efa": moe_efa, "ep": ep, "hidden": 16, "inner": 24}
        names["dist"] = SimpleNamespace(all_reduce=lambda t, op: maxima.append(int(t)), ReduceOp=dist.ReduceOp)
        names["x"] = torch.randn(7, 16, dtype=torch.bfloat16)
        names["topk_weights"], names["topk_idx"] = torch.rand(7, 4).softmax(-1).topk(2)
        for block in (definition, grouped, code):
            exec(compile(block, "README.md", "exec"), names)
        assert maxima == [14, 0]
        assert names["d"].x.shape == (14, 16)
        exact = ep.moe(names["x"], names["topk_idx"], names["topk_weights"], names["experts"])
        assert torch.equal(names["out"], exact)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
