"""The CUDA kernels through the shim (kernels_shim.h): one rank's world in memory that torch allocates."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .setting import Setting

BF16, FP8 = 0, 2  # proto::DType
OPS = {"plan": 0, "pack": 1, "pull": 2, "combine": 3}
_ALIGN = 256
_POISON = 0xEE


class KernelError(RuntimeError):
    """A launch failed, a kernel reported a fault, or its results are not those of the CPU kernels."""


def _struct(name: str, fields: str, kind: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": [(field, kind) for field in fields.split()]})


ShimShape = _struct(
    "ShimShape",
    "num_nodes node_size experts_per_rank top_k hidden_size num_tokens chunk_rows num_nics wire_dtype out_dtype "
    "combine_dtype expert_alignment",
    ctypes.c_uint32,
)
ShimFacts = _struct(
    "ShimFacts",
    "device_bytes host_bytes rows remote_rows entries chunks chunk_bytes remote_bytes tokens output_rows",
    ctypes.c_uint64,
)
ShimTensors = _struct("ShimTensors", "x topk_idx topk_weights rows row_weights row_scales y out", ctypes.c_void_p)


class Shim:
    """The library."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_uint32
        self._library.shim_error.restype = ctypes.c_char_p
        self._library.shim_create.restype = pointer
        for name, kinds in {
            "shim_sizes": [pointer] * 3,
            "shim_create": [pointer] * 4,
            "shim_destroy": [pointer],
            "shim_place": [pointer] * 4,
            "shim_prepare": [pointer, number, pointer],
            "shim_launch": [pointer, number, number, number, pointer],
            "shim_finish": [pointer, pointer],
            "shim_check": [pointer, number, pointer],
            "shim_pause": [ctypes.c_uint64, pointer],
            "shim_flag_latency": [pointer, ctypes.c_uint64, pointer, pointer],
        }.items():
            getattr(self._library, name).argtypes = kinds
        sizes = [ctypes.c_uint64() for _ in range(3)]
        self("shim_sizes", *map(ctypes.byref, sizes))
        expected = [ctypes.sizeof(struct) for struct in (ShimShape, ShimFacts, ShimTensors)]
        if [size.value for size in sizes] != expected:
            raise KernelError(f"the shim's structs have {[size.value for size in sizes]} bytes, not {expected}")

    def __call__(self, name: str, *arguments: object) -> None:
        """A function that returns a status.

        Raises:
            KernelError: with the shim's text.
        """
        if getattr(self._library, name)(*arguments) != 0:
            raise self.error()

    def error(self) -> KernelError:
        """The last one."""
        return KernelError(self._library.shim_error().decode())

    def create(self, shape: ctypes.Structure, topk_idx: Tensor, topk_weights: Tensor, facts: ctypes.Structure) -> int:
        """A world.

        Raises:
            KernelError: the shape cannot be.
        """
        world = self._library.shim_create(
            ctypes.byref(shape), topk_idx.data_ptr(), topk_weights.data_ptr(), ctypes.byref(facts)
        )
        if not world:
            raise self.error()
        return int(world)

    def destroy(self, world: int) -> None:
        """Frees what the shim holds of it."""
        self._library.shim_destroy(world)

    def flag_latency_us(self, setting: Setting, rounds: int) -> float:
        """From the GPU to a thread of the host and back, mean of the rounds."""
        words = host_memory(setting, 384)
        found = ctypes.c_double()
        self("shim_flag_latency", words.data_ptr(), rounds, setting.stream, ctypes.byref(found))
        return found.value

    def pause(self, microseconds: float, stream: int) -> None:
        """Queues a pause."""
        self("shim_pause", int(1e3 * microseconds), stream)


def host_memory(setting: Setting, size: int) -> Tensor:
    """Zeros in memory of the host that kernels reach."""
    memory = torch.zeros(size + _ALIGN, dtype=torch.uint8, pin_memory=not setting.dry_run)
    return _aligned(memory)


def _aligned(memory: Tensor) -> Tensor:
    return memory[-memory.data_ptr() % _ALIGN :]


class World:
    """One rank's tokens, plan and region. With one node it is the only rank, and all experts are its own; with several
    it plans and packs for all of them.

    Args:
        topk_idx, topk_weights: [T, K] on the CPU.
        x: [T, H] bf16 on the device.
        y: [output_rows, H] bf16 on the device, for combine.
    """

    def __init__(
        self,
        shim: Shim,
        setting: Setting,
        *,
        topk_idx: Tensor,
        topk_weights: Tensor,
        x: Tensor,
        num_experts: int,
        num_nodes: int = 1,
        node_size: int = 1,
        wire_dtype: int = FP8,
        out_dtype: int = BF16,
        chunk_rows: int = 64,
    ) -> None:
        self._shim, self._setting, self._x, self._world = shim, setting, x, 0
        num_tokens, top_k = topk_idx.shape
        hidden = x.shape[1]
        shape = ShimShape(
            num_nodes=num_nodes,
            node_size=node_size,
            experts_per_rank=num_experts // (num_nodes * node_size),
            top_k=top_k,
            hidden_size=hidden,
            num_tokens=num_tokens,
            chunk_rows=chunk_rows,
            num_nics=1,
            wire_dtype=wire_dtype,
            out_dtype=out_dtype,
            combine_dtype=BF16 if num_nodes == 1 else wire_dtype,
            expert_alignment=1,
        )
        self.facts = ShimFacts()
        self._world = shim.create(shape, topk_idx.contiguous(), topk_weights.contiguous(), self.facts)
        device = setting.device
        rows = self.facts.output_rows
        self._arena = torch.full((self.facts.device_bytes + _ALIGN,), _POISON, dtype=torch.uint8, device=device)
        self._host = host_memory(setting, self.facts.host_bytes)
        self._topk_idx, self._topk_weights = topk_idx.to(device), topk_weights.to(device)
        kind = torch.bfloat16 if out_dtype == BF16 else torch.float8_e4m3fn
        self.rows = torch.full((rows * hidden * kind.itemsize,), _POISON, dtype=torch.uint8, device=device)
        self.rows = self.rows.view(kind).view(rows, hidden)
        self.row_weights = torch.full((rows,), torch.nan, device=device)
        self.row_scales = torch.full((rows, -(-hidden // 128)), torch.nan, device=device)
        self.y = torch.empty(rows, hidden, dtype=torch.bfloat16, device=device)
        self.out = torch.full((num_tokens, hidden), torch.nan, dtype=torch.bfloat16, device=device)
        tensors = ShimTensors(
            x=x.data_ptr(),
            topk_idx=self._topk_idx.data_ptr(),
            topk_weights=self._topk_weights.data_ptr(),
            rows=self.rows.data_ptr(),
            row_weights=self.row_weights.data_ptr(),
            row_scales=self.row_scales.data_ptr(),
            y=self.y.data_ptr(),
            out=self.out.data_ptr(),
        )
        setting.synchronize()
        memory = _aligned(self._arena).data_ptr(), self._host.data_ptr()
        shim("shim_place", self._world, *memory, ctypes.byref(tensors))

    def close(self) -> None:
        """Frees everything."""
        if self._world:
            self._setting.synchronize()
            self._shim.destroy(self._world)
            self._world = 0

    def prepare(self, op: str) -> None:
        """Before each launch."""
        self._shim("shim_prepare", self._world, OPS[op], self._setting.stream)

    def launch(self, op: str, blocks: int = 0, more: int = 0) -> None:
        """Queues it."""
        self._shim("shim_launch", self._world, OPS[op], blocks, more, self._setting.stream)

    def run(self, op: str, blocks: int = 0, more: int = 0) -> None:
        """To its end.

        Raises:
            KernelError: it failed, or reported a fault.
        """
        self.prepare(op)
        self.launch(op, blocks, more)
        self._shim("shim_finish", self._world, self._setting.stream)

    def check(self, op: str) -> str | None:
        """What plan or pack has just written against the CPU kernels: None, or what differs."""
        x = self._x.cpu()
        try:
            self._shim("shim_check", self._world, OPS[op], x.data_ptr())
        except KernelError as error:
            return str(error)
        return None
