"""What others take for the same work, on the same tensors: torch eager, torch.compile, and kernels of packages that
happen to be importable. Nothing is installed for this; what is not there is named."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import shapes, torch_versions
from .results import COMPILED, EAGER, UNFUSED_PAIR, Peer
from .setting import Setting
from .shapes import Shape
from .triton_speed import Operands, operands

PACKAGES = (
    "deep_gemm",
    "torchao",
    "transformer_engine",
    "vllm",
    "liger_kernel",
    "tile_kernels",
    "sonicmoe",
    "flashinfer",
)
Function = Callable[..., object]


def run(setting: Setting) -> None:
    """Eager and packages for all shapes first, then torch.compile, which takes seconds for each function."""
    setting.out.facts(packages={name: _version(name) for name in PACKAGES})
    all_shapes = shapes.timed_shapes(dry_run=setting.dry_run)
    for shape in all_shapes:
        if setting.has_time_for(f"torch eager at {shape.name}", 0 if setting.dry_run else 5):
            of = operands(shape, setting.device)
            for kernel, name, function, arguments in _eager(shape, of):
                _time(setting, kernel, shape, name, function, arguments)
            for kernel, name, find, arguments in _packages(of):
                _time_package(setting, kernel, shape, name, find, arguments)
            del of
            setting.release_memory()
    if setting.dry_run:
        for kernel in {kernel for kernel, *_ in _eager(all_shapes[0], operands(all_shapes[0], "cpu"))}:
            setting.out.peer(kernel, all_shapes[0].name, COMPILED, Peer(note="not compiled in a dry run"))
        return
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, 64)
    compiled: dict[Function, Function] = {}
    for shape in [shape for shape in all_shapes if shape.tokens >= shapes.LARGE_TOKENS]:
        of = operands(shape, setting.device)
        for kernel, name, function, arguments in _eager(shape, of):
            if name != EAGER:
                continue
            if not setting.has_time_for(f"torch.compile of {kernel} at {shape.name}", 10):
                continue
            if function not in compiled:
                compiled[function] = torch.compile(function, dynamic=False)
            _time(setting, kernel, shape, COMPILED, compiled[function], arguments)
        del of
        setting.release_memory()


def _eager(shape: Shape, of: Operands) -> Iterator[tuple[str, str, Function, tuple[Any, ...]]]:
    """(our kernel, name of the peer, function, arguments)."""
    t = torch_versions
    q, scales = t.quantize(of.x)
    weights, positions = of.row_weights, of.plan.positions
    yield "triton-quantize", EAGER, t.quantize, (of.x,)
    yield "triton-permute", EAGER, t.permute, (of.x, of.source)
    yield "triton-permute-quantize", UNFUSED_PAIR, t.permute_then_quantize, (of.x, of.source)
    yield "triton-permute-quantize", EAGER, t.quantize_then_permute, (of.x, of.source)
    for kernel in ("triton-unpermute", "cuda-combine-bf16"):
        yield kernel, EAGER, t.unpermute, (of.y, positions, weights)
        yield kernel, "torch index_add", t.unpermute_index_add, (of.y, of.source, weights, shape.tokens)
    yield "triton-unpermute-backward", EAGER, t.unpermute_backward, (of.x, of.y, of.source, weights)
    yield "triton-swiglu", EAGER, t.swiglu, (of.gate_up, weights)
    yield "triton-swiglu-quantize", EAGER, t.swiglu_quantize, (of.gate_up, weights)
    yield "triton-swiglu-backward", EAGER, t.swiglu_backward, (of.grad_hidden, of.gate_up, weights)
    yield "triton-plan-rows", EAGER, t.plan_rows, (of.topk_idx, shape.experts)
    yield "cuda-plan", EAGER, t.plan_rows, (of.topk_idx, shape.experts)
    yield "cuda-pull-fp8-to-bf16", EAGER, t.dequantize_rows, (q, scales, of.source)
    yield "cuda-pull-fp8", EAGER, t.gather_fp8, (q, scales, of.source)
    sent = sent_tokens(shape, of)
    yield "cuda-pack-fp8", EAGER, t.quantize_then_permute, (of.x, sent)
    yield "cuda-pack-bf16", EAGER, t.permute, (of.x, sent)
    yield "triton-router", EAGER, t.router, (of.logits, shape.topk, shape.groups, shape.topk_groups)


def sent_tokens(shape: Shape, of: Operands) -> torch.Tensor:
    """The token of each row that pack writes: distinct (node, token), by node."""
    nodes = shape.ranks // shape.node_size
    per_node = shape.experts // nodes
    goes = torch.zeros(shape.tokens, nodes, dtype=torch.bool, device=of.x.device)
    goes.scatter_(1, of.topk_idx.clamp(min=0) // per_node, True)
    return goes.T.nonzero()[:, 1].contiguous()


def _packages(of: Operands) -> Iterator[tuple[str, str, Callable[[], Function], tuple[Any, ...]]]:
    """Kernels of packages, each with how to find it."""
    yield "triton-quantize", "torchao", _torchao_quantize, (of.x,)


def _torchao_quantize() -> Function:
    module = importlib.import_module("torchao.prototype.blockwise_fp8_training.kernels")
    function = module.triton_fp8_blockwise_act_quant_lhs
    return lambda x: function(x, 128)


def _time(
    setting: Setting, kernel: str, shape: Shape, name: str, function: Function, arguments: tuple[Any, ...]
) -> None:
    try:
        peer = Peer(us=setting.timer(lambda: function(*arguments)).us)
    except Exception as error:  # somebody else's code: whatever it says
        peer = Peer(note=f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200])
    setting.out.peer(kernel, shape.name, name, peer)


def _time_package(
    setting: Setting, kernel: str, shape: Shape, name: str, find: Callable[[], Function], arguments: tuple[Any, ...]
) -> None:
    try:
        function = find()
    except Exception:
        setting.out.peer(kernel, shape.name, name, Peer(note="not available"))
        return
    _time(setting, kernel, shape, name, function, arguments)


def _version(package: str) -> str:
    try:
        module = importlib.import_module(package)
    except Exception:
        return "not available"
    return str(getattr(module, "__version__", "present"))
