"""The experts of one rank: SwiGLU on rows grouped by expert, with the routing weights applied before down_proj.

    gate, up = rows @ gate_up_proj[e].T       hidden = silu(gate) * up * weight       y = hidden @ down_proj[e].T

y is linear in hidden, so the weight may act there: y need not be saved for the weights' gradient, which comes from
hidden. What backward keeps is rows and [gate, up], or with ``recompute`` rows alone. Nothing here communicates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_efa.late_gradients import LateGradients, Queue
from moe_efa.nn.autocast import autocast_dtype
from moe_efa.nn.grouped_mm import grouped_mm, grouped_outer
from moe_efa.nn.initialization import draw_seed, normal_

_BLOCK_ELEMENTS = 1 << 22  # bounds the fp32 temporaries of the activation


class SwiGLUExperts(nn.Module):
    """The experts ``[first_expert, first_expert + num_local_experts)`` of a layer.

    Args:
        num_experts: experts of the layer, on all ranks.
        num_local_experts: experts here; None takes all.
        first_expert: global id of the first expert here.
        recompute: keep the rows only and compute gate and up again in backward.
        initializer_range: standard deviation of the initial values.
        seed: expert i's initial values depend on (seed, i) alone, so that any number of ranks starts from the same
            layer. None draws it from torch's default generator: seed every rank alike.

    Attributes:
        gate_up_proj: [E_local, 2 * I, H], the gate's rows first.
        down_proj: [E_local, H, I].
    """

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        num_local_experts: int | None = None,
        first_expert: int = 0,
        recompute: bool = False,
        initializer_range: float = 0.02,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_local_experts = num_experts if num_local_experts is None else num_local_experts
        self.first_expert = first_expert
        if not 0 <= first_expert <= first_expert + self.num_local_experts <= num_experts:
            raise ValueError(
                f"experts [{first_expert}, {first_expert + self.num_local_experts}) are not among {num_experts}"
            )
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.recompute = recompute
        self.initializer_range = initializer_range
        self.seed = draw_seed(seed)
        local = self.num_local_experts
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate_up_proj = nn.Parameter(torch.empty(local, 2 * intermediate_size, hidden_size, **options))
        self.down_proj = nn.Parameter(torch.empty(local, hidden_size, intermediate_size, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values again, the same ones. Does nothing on the meta device."""
        for local in range(self.num_local_experts):
            for name in ("gate_up_proj", "down_proj"):
                expert = getattr(self, name).detach()[local]
                label = f"expert {self.first_expert + local} {name}"
                normal_(expert, std=self.initializer_range, seed=self.seed, name=label)

    def late_gradients(self) -> LateGradients | None:
        """For several calls of one forward pass; None where the parameters are not at hand, or need no gradients.

        Those of a sharded module show up while it is called, and their hooks count its calls; a compiled module cannot
        hold the queue.
        """
        if not torch.is_grad_enabled() or self._compiled_call_impl is not None:
            return None
        local, hidden, size = self.num_local_experts, self.hidden_size, self.intermediate_size
        shapes = ((local, 2 * size, hidden), (local, hidden, size))
        parameters = (self.gate_up_proj, self.down_proj)
        if not any(parameter.requires_grad for parameter in parameters):
            return None
        for parameter, shape in zip(parameters, shapes, strict=True):
            if type(parameter) not in (Tensor, nn.Parameter) or parameter.shape != shape:
                return None
        return LateGradients(*parameters)

    def forward(
        self,
        rows: Tensor,
        offsets: Tensor,
        weights: Tensor | None = None,
        late: LateGradients | None = None,
        *,
        static: bool = False,
    ) -> Tensor:
        """The experts' results, row by row.

        Args:
            rows: [R, H]; parameters of another dtype are cast to that of the rows. Under autocast both are cast to its
                dtype, as those of a linear layer are, and the results back to that of the rows.
            offsets: [E_local + 1] int32, where each expert's rows begin; ``offsets[-1] == R``.
            weights: [R] fp32 factors of the results, differentiable; None is 1.
            late: of :meth:`late_gradients`: backward queues the parameters' gradients there.
            static: ``offsets[-1] <= R``, as with a capacity; what is behind means nothing, in the results as well.

        Returns:
            [R, H] in the rows' dtype. Experts without rows get zero gradients.

        Raises:
            ValueError: for shapes that do not fit.
        """
        if rows.dim() != 2 or rows.shape[1] != self.hidden_size:
            raise ValueError(f"rows must be [R, {self.hidden_size}], not {list(rows.shape)}")
        if offsets.shape != (self.num_local_experts + 1,):
            raise ValueError(f"offsets must be [{self.num_local_experts + 1}], not {list(offsets.shape)}")
        if offsets.is_cpu and not torch.compiler.is_compiling():
            end = int(offsets[-1])
            if end > rows.shape[0] or (end < rows.shape[0] and not static):
                raise ValueError(f"offsets end at {end}, but there are {rows.shape[0]} rows")
        if weights is not None and weights.shape != rows.shape[:1]:
            raise ValueError(f"weights must be [{rows.shape[0]}], not {list(weights.shape)}")
        dtype = autocast_dtype(rows) or rows.dtype
        if late is not None:
            inputs = (*late.weights, rows.to(dtype), weights, offsets)
            y: Tensor = _LateExperts.apply(*inputs, self.recompute, late.queue)  # type: ignore[no-untyped-call]
            return y.to(rows.dtype)
        gate_up_proj, down_proj = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        y, _ = _experts(rows.to(dtype), weights, gate_up_proj, down_proj, offsets, self.recompute)
        return y.to(rows.dtype)

    def extra_repr(self) -> str:
        """For print(module)."""
        last = self.first_expert + self.num_local_experts
        return (
            f"experts [{self.first_expert}, {last}) of {self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, recompute={self.recompute}"
        )


# Custom ops, so that torch.compile sees neither the loop over experts nor a shape that depends on the routing. The
# schema of an op is flat: its functions take every tensor that backward needs as a parameter of its own, in order.
_OP = "moe_efa::swiglu_experts"


@torch.library.custom_op(
    _OP,
    mutates_args=(),
    schema="(Tensor rows, Tensor? weights, Tensor gate_up_proj, Tensor down_proj, Tensor offsets, bool recompute)"
    " -> (Tensor, Tensor)",
)
def _experts(
    rows: Tensor, weights: Tensor | None, gate_up_proj: Tensor, down_proj: Tensor, offsets: Tensor, recompute: bool
) -> tuple[Tensor, Tensor]:
    """-> results [R, H], gate and up [R, 2 * I]; whether the latter are kept is up to autograd."""
    gate_up = grouped_mm(rows, gate_up_proj.transpose(1, 2), offsets)
    return grouped_mm(weighted_swiglu(gate_up, weights), down_proj.transpose(1, 2), offsets), gate_up


@torch.library.custom_op(
    f"{_OP}_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor rows, Tensor? weights, Tensor? gate_up, Tensor gate_up_proj, Tensor down_proj,"
    " Tensor offsets, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _experts_backward(
    grad_y: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    gate_up: Tensor | None,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    offsets: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of rows, weights, gate_up_proj, down_proj; without elements where they are not needed."""
    needs_rows, needs_weights, needs_gate_up, needs_down = needed
    grad_rows, grad_weights, grad_gate_up_proj, grad_down_proj = (rows.new_empty(0) for _ in range(4))
    if gate_up is None:
        gate_up = grouped_mm(rows, gate_up_proj.transpose(1, 2), offsets)
    if needs_down:
        grad_down_proj = grouped_outer(grad_y, weighted_swiglu(gate_up, weights), offsets)
    if needs_rows or needs_weights or needs_gate_up:
        grad_gate_up, of_weights = _activation_backward(grad_y, gate_up, weights, down_proj, offsets)
        if needs_weights and of_weights is not None:
            grad_weights = of_weights
        if needs_gate_up:
            grad_gate_up_proj = grouped_outer(grad_gate_up, rows, offsets)
        if needs_rows:
            grad_rows = grouped_mm(grad_gate_up, gate_up_proj, offsets)
    return grad_rows, grad_weights, grad_gate_up_proj, grad_down_proj


def _activation_backward(
    grad_y: Tensor, gate_up: Tensor, weights: Tensor | None, down_proj: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor | None]:
    """-> gradients of gate_up and of the weights."""
    return weighted_swiglu_backward(grouped_mm(grad_y, down_proj, offsets), gate_up, weights)


@_experts.register_fake
def _(
    rows: Tensor, weights: Tensor | None, gate_up_proj: Tensor, down_proj: Tensor, offsets: Tensor, recompute: bool
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), rows.new_empty(rows.shape[0], gate_up_proj.shape[1])


@_experts_backward.register_fake
def _(
    grad_y: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    gate_up: Tensor | None,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    offsets: Tensor,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    inputs = (rows, weights, gate_up_proj, down_proj)
    return tuple(
        rows.new_empty(0) if tensor is None or not needs else tensor.new_empty(tensor.shape)
        for tensor, needs in zip(inputs, needed, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, recompute = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, None if recompute else output[1])


def _backward(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    rows, weights, gate_up_proj, down_proj, offsets, gate_up = ctx.saved_tensors
    if grad_y is None:
        return (None,) * 6
    needed = list(ctx.needs_input_grad[:4])
    grads = _experts_backward(grad_y, rows, weights, gate_up, gate_up_proj, down_proj, offsets, needed)
    return *(grad if needs else None for grad, needs in zip(grads, needed, strict=True)), None, None


_experts.register_autograd(_backward, setup_context=_setup_context)


class _LateExperts(torch.autograd.Function):
    """The same, in the rows' dtype, but backward leaves the gradients of the parameters to whoever runs the queue."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        rows: Tensor,
        weights: Tensor | None,
        offsets: Tensor,
        recompute: bool,
        queue: Queue,
    ) -> Tensor:
        dtype = rows.dtype
        y, gate_up = _experts(rows, weights, gate_up_proj.to(dtype), down_proj.to(dtype), offsets, recompute)
        ctx.queue = queue
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate_up_proj, down_proj, rows, weights, offsets, None if recompute else gate_up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        gate_up_proj, down_proj, rows, weights, offsets, gate_up = ctx.saved_tensors
        if grad_y is None:
            return (None,) * 7
        gate_up_proj, down_proj = gate_up_proj.to(rows.dtype), down_proj.to(rows.dtype)
        if gate_up is None:
            gate_up = grouped_mm(rows, gate_up_proj.transpose(1, 2), offsets)
        grad_gate_up, grad_weights = _activation_backward(grad_y, gate_up, weights, down_proj, offsets)
        needs_gate_up, needs_down = ctx.queue.needed

        def parts() -> tuple[Tensor | None, Tensor | None]:
            hidden = weighted_swiglu(gate_up, weights) if needs_down else None
            return (
                grouped_outer(grad_gate_up, rows, offsets) if needs_gate_up else None,
                None if hidden is None else grouped_outer(grad_y, hidden, offsets),
            )

        if torch._C._will_engine_execute_node(ctx.next_functions[0][0]):  # not where only others' gradients are wanted
            ctx.queue.add(parts)
        grad_rows = grouped_mm(grad_gate_up, gate_up_proj, offsets) if ctx.needs_input_grad[2] else None
        return None, None, grad_rows, grad_weights, None, None, None


def weighted_swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """[R, 2 * I], [R] fp32 or None -> [R, I]: ``silu(gate) * up * weight`` in fp32, rounded once to gate_up's dtype."""
    size = gate_up.shape[1] // 2
    out = gate_up.new_empty(gate_up.shape[0], size)
    for block in _blocks(gate_up):
        gate, up = gate_up[block].float().chunk(2, dim=1)
        product = torch.nn.functional.silu(gate) * up
        out[block] = product if weights is None else product.mul_(weights[block, None])
    return out


def weighted_swiglu_backward(
    grad_hidden: Tensor, gate_up: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """[R, I], [R, 2 * I], [R] -> gradients of gate_up [R, 2 * I] in its dtype and of the weights [R] fp32."""
    size = gate_up.shape[1] // 2
    grad_gate_up = torch.empty_like(gate_up)
    grad_weights = None if weights is None else weights.new_empty(gate_up.shape[0])
    for block in _blocks(gate_up):
        gate, up = gate_up[block].float().chunk(2, dim=1)
        grad, silu = grad_hidden[block].float(), torch.nn.functional.silu(gate)
        if weights is not None and grad_weights is not None:
            grad_weights[block] = (grad * (silu * up)).sum(1)
            grad = grad * weights[block, None]
        grad_gate_up[block, :size] = torch.ops.aten.silu_backward(grad * up, gate)
        grad_gate_up[block, size:] = grad * silu
    return grad_gate_up, grad_weights


def _blocks(gate_up: Tensor) -> list[slice]:
    step = max(1, _BLOCK_ELEMENTS // max(1, gate_up.shape[1]))
    return [slice(start, start + step) for start in range(0, gate_up.shape[0], step)]
