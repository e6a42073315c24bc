"""Runs our Triton kernels on the CPU: imports them for the interpreter, and repairs what it computes wrongly.

As shipped (3.6 to 3.9) the interpreter truncates fp32 -> bf16, loses the carry of fp32 -> e4m3 and truncates its
subnormals, and reads an e4m3 NaN as 480. test_interpreter.py proves the repair. Its exp becomes torch's, so that
kernels which use it can be compared bitwise with their twins.
"""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _import_kernels() -> None:
    import triton
    from triton.runtime.jit import JITFunction

    import moe_efa.triton_kernels as package

    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    if any(isinstance(value, JITFunction) for module in modules for value in vars(module).values()):
        raise pytest.UsageError(f"Triton {triton.__version__} or a kernel was imported before TRITON_INTERPRET was set")


def _repair_interpreter() -> None:
    import numpy as np
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    torch_dtypes = {
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
        tl.bfloat16: torch.bfloat16,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
        tl.float64: torch.float64,
    }
    shipped = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source not in torch_dtypes or target not in torch_dtypes or rounding_mode == ir.ROUNDING_MODE.RTZ:
            return shipped(values, source, target, rounding_mode)
        as_bytes = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).reshape(-1).copy())
        numbers = as_bytes.view(torch_dtypes[source])
        if target.primitive_bitwidth == 8:  # as the hardware does
            largest = torch.finfo(torch_dtypes[target]).max
            numbers = numbers.to(torch.float32).clamp(-largest, largest)
        bits = numbers.to(torch_dtypes[target]).view(torch.uint8).numpy()
        return bits.view(getattr(np, f"uint{target.primitive_bitwidth}")).reshape(np.shape(values))

    interpreter._convert_float = convert

    def exp(builder: Any, argument: Any) -> Any:  # numpy's differs from torch's in the last bit
        values = torch.from_numpy(np.ascontiguousarray(argument.data))
        return interpreter.TensorHandle(torch.exp(values).numpy(), argument.dtype.scalar)

    interpreter.InterpreterBuilder.create_exp = exp

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, *scope: Any) -> None:  # 3.6 makes integers in a way that numpy 2.4 refuses
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index


if DEVICE == "cpu":
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        _import_kernels()
    _repair_interpreter()


def pytest_report_header() -> str:
    """Which Triton it is."""
    import triton

    return f"Triton {triton.__version__}, kernels on the {DEVICE}"


@pytest.fixture(autouse=True)
def interpreter_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that a test defines are interpreted too."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU under the interpreter."""
    return torch.device(DEVICE)


@pytest.fixture
def guarded_outputs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    """What a wrapper allocates is poisoned and lies between guard bytes, which must be as they were in the end."""
    guarded: list[tuple[torch.Tensor, int]] = []

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        memory = torch.full((size + 512,), 0xA5, dtype=torch.uint8, device=device)
        guarded.append((memory, size))
        return memory[256 : 256 + size].view(dtype).view(shape)

    def empty(*size: Any, dtype: torch.dtype, device: Any = None) -> torch.Tensor:
        return allocate(tuple(size) if isinstance(size[0], int) else tuple(size[0]), dtype)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda x, dtype=None: allocate(tuple(x.shape), dtype or x.dtype))
    yield
    monkeypatch.undo()
    assert guarded
    for memory, size in guarded:
        assert (memory[:256] == 0xA5).all() and (memory[256 + size :] == 0xA5).all()


@pytest.fixture
def run_docstring_example(device: torch.device) -> Callable[..., None]:
    """Runs a function's example with the function itself and with its twin."""

    def run(function: Callable[..., Any], twin: Callable[..., Any], **names: Any) -> None:
        example = next(test for test in doctest.DocTestFinder().find(function, globs={}) if test.examples)
        for implementation in (function, twin):
            example.globs = {"torch": torch, **names, function.__name__: implementation}
            with device:
                result = doctest.DocTestRunner().run(example, clear_globs=False)
            assert result.attempted >= 2 and result.failed == 0

    return run
