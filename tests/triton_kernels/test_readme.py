"""What triton_kernels/README.md shows runs, on one rank, and both examples give the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from moe_efa.testing import assert_bitwise


def test_the_examples_are_each_other(repo_root: Path, device: torch.device) -> None:
    text = (repo_root / "triton_kernels" / "README.md").read_text()
    one_rank, one_node = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    generator = torch.Generator().manual_seed(0)
    names: dict[str, Any] = {"group": None, "num_experts": 4, "hidden_size": 16, "top_k": 2}
    names["x"] = torch.randn(5, 16, generator=generator).to(device).requires_grad_()
    names["logits"] = torch.randn(5, 4, generator=generator).to(device)
    names["experts"] = lambda rows, offsets: torch.relu(rows) + offsets[-1]
    exec(one_rank, names)
    (expected,) = torch.autograd.grad(names["out"].sum(), names["x"])
    out = names.pop("out").detach()
    exec(one_node, names)
    assert_bitwise(names["out"].detach(), out, "out")
    assert_bitwise(names["x"].grad, expected, "grad_x")


def test_every_module_is_in_the_table(repo_root: Path) -> None:
    folder = repo_root / "triton_kernels"
    named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\|[^|]*\|", (folder / "README.md").read_text(), re.M))))
    modules = {path.stem for path in (folder / "src").glob("*.py")}
    assert modules - {"__init__", "checks", "numerics", "reference", "rows"} <= named
