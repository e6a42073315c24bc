"""The kernels, and both ways to dispatch and combine by them, in a process that has no native extension."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import importlib, pkgutil, sys
sys.modules["moe_efa._C"] = None  # as if it had not been built

import torch
import torch.distributed as dist
import moe_efa, moe_efa.testing, moe_efa.triton_kernels as package
for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"{package.__name__}.{module.name}")
from moe_efa.triton_kernels.autograd import permute, plan_rows, router_topk, unpermute
from moe_efa.triton_kernels.intra_node import IntraNode

x = torch.arange(24.0).view(3, 8).requires_grad_()
topk_idx, topk_weights, _ = router_topk(x.detach() % 5, 2)
plan = plan_rows(topk_idx, num_experts=8, expert_alignment=2)
rows, weights = permute(x, topk_weights, plan)
out = unpermute(rows, plan, weights)
torch.testing.assert_close(out, x)
out.sum().backward()
torch.testing.assert_close(x.grad, torch.ones_like(x))

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
node = IntraNode(dist.group.WORLD, num_experts=8, hidden_size=8, top_k=2)
d = node.dispatch(x, topk_idx, topk_weights, expert_alignment=2)
assert torch.equal(d.x, rows) and torch.equal(d.weights, weights)
assert torch.equal(node.combine(d.x, d.handle), out)
dist.destroy_process_group()

try:
    moe_efa.ExpertParallel
except ImportError as error:
    assert "moe_efa.ExpertParallel needs the native extension" in str(error)
else:
    raise AssertionError("there is an ExpertParallel")
assert not hasattr(moe_efa, "no_such_name")
assert not [name for name, module in sys.modules.items() if name == "moe_efa._C" and module is not None]
print("served")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo does not exchange tensors of a GPU")
def test_kernels_serve_without_the_native_extension(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, str(tmp_path / "store")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "served"
