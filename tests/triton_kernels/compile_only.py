"""Compiles kernels for GPUs that need not be there. Run in a process of its own, without TRITON_INTERPRET.

Reads a JSON list of variants on stdin, each {"kernel": "module:function", "arch", "num_warps", "signature",
"constants"} and, optionally, "options" of the compiler and "sass": true; prints one JSON object for each: {"registers",
"stack", "ptx", "sass"} ("stack" is where spills show).
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_variant(variant: dict[str, Any]) -> dict[str, Any]:
    module, name = variant["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), name)
    kinds = {**variant["signature"], **dict.fromkeys(variant["constants"], "constexpr")}
    signature = {argument: kinds[argument] for argument in kernel.arg_names}
    # As at a launch with tensors, whose addresses are multiples of 16; without it loads are not vectorized.
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=variant["constants"], attrs=aligned),
        target=GPUTarget("cuda", variant["arch"], 32),
        options={"num_warps": variant["num_warps"], "enable_fp_fusion": False, **variant.get("options", {})},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "-res-usage", cubin.name)
        sass = _run("nvdisasm", "-c", cubin.name) if variant.get("sass") else ""  # takes longer than all else
    registers, stack = (re.search(rf"\b{key}:(\d+)", usage) for key in ("REG", "STACK"))
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage}")
    return {"registers": int(registers[1]), "stack": int(stack[1]), "ptx": compiled.asm["ptx"], "sass": sass}


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], check=True, capture_output=True, text=True).stdout


@triton.jit
def spilling_kernel(a_ptr, b_ptr, c_ptr, size: triton.language.constexpr):
    """Needs more registers than 4 warps have: shows that a spill is seen."""
    index = triton.language.arange(0, size)
    tile = index[:, None] * size + index[None, :]
    product = triton.language.dot(triton.language.load(a_ptr + tile), triton.language.load(b_ptr + tile))
    triton.language.store(c_ptr + tile, product)


if __name__ == "__main__":
    json.dump([compile_variant(variant) for variant in json.load(sys.stdin)], sys.stdout)
