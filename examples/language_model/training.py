"""The training loop of example 03.

The batch of a step depends on the step alone and is cut into equal parts for the ranks, and the initial values depend
on the seed alone: any number of ranks trains the same model. The loss is the mean over the whole batch, so

    dense parameters     the gradient is the sum of the ranks' gradients: one all-reduce
    expert parameters    the gradient is a sum over the tokens of all ranks already: nothing to do
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

import moe_efa
from language_model.model import ByteModel, ModelConfig
from language_model.text import Text

HELD_OUT_BATCHES = 8


@dataclass(frozen=True)
class TrainConfig:
    """How to train."""

    steps: int = 400
    batch_size: int = 16  # sequences of all ranks together
    learning_rate: float = 3e-3
    warmup_steps: int = 30
    clip_norm: float = 1.0
    bias_rate: float = 1e-2
    wire_dtype: str = "fp32"
    node_size: int | None = None
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass
class Run:
    """What a training gave. Routes are this rank's: for each step a [layers, B, S, K] uint8 tensor."""

    losses: list[float]
    grad_norms: list[float]
    held_out_loss: float
    imbalance: float  # busiest expert / mean, over the last step
    seconds: float
    routes: list[Tensor]


def train(
    config: TrainConfig,
    text: Text,
    group: dist.ProcessGroup | None,
    *,
    routes: Sequence[Tensor] | None = None,
    stop_after: int | None = None,
    label: str = "training",
) -> Run:
    """Train from the start on the ranks of the group, or on this rank alone.

    Args:
        routes: pin the routing, step by step.
        stop_after: steps to do; the learning rate's schedule remains that of config.steps.
    """
    rank, num_ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    if config.batch_size % num_ranks or config.model.num_experts % num_ranks:
        raise SystemExit(f"{config.batch_size} sequences and {config.model.num_experts} experts for {num_ranks} ranks")
    local_batch = config.batch_size // num_ranks
    mine = slice(rank * local_batch, (rank + 1) * local_batch)
    length = config.model.sequence_length
    torch.manual_seed(config.seed)
    with moe_efa.ExpertParallel(
        group,
        num_experts=config.model.num_experts,
        hidden_size=config.model.hidden_size,
        top_k=config.model.top_k,
        max_tokens_per_rank=local_batch * length,
        node_size=None if group is None else config.node_size,
        device="cpu",
        **wire_dtypes(config.wire_dtype),
    ) as ep:
        model = ByteModel(config.model, ep)
        dense, experts = model.split_parameters()
        optimizer = torch.optim.AdamW([*dense, *experts], betas=(0.9, 0.95), weight_decay=0.01)
        run = Run([], [], 0.0, 0.0, 0.0, [])
        start = time.perf_counter()
        for step in progress(stop_after or config.steps, label, run, silent=rank != 0):
            for parameters in optimizer.param_groups:
                parameters["lr"] = config.learning_rate * schedule(step, config)
            tokens, targets = text.batch(step, config.batch_size, length)
            pinned = None if routes is None else list(routes[step].long())
            loss = cross_entropy(model(tokens[mine], pinned), targets[mine]) / targets.numel()
            loss.backward()
            norm = reduce_and_clip(dense, experts, config.clip_norm, group)
            optimizer.step()
            optimizer.zero_grad()
            for layer in model.moe_layers() if routes is None else []:
                layer.update_bias(config.bias_rate, group)
            run.losses.append(float(all_sum(loss.detach(), group)))
            run.grad_norms.append(norm)
            run.routes.append(torch.stack([layer.topk_idx.to(torch.uint8) for layer in model.moe_layers()]))
        run.seconds = time.perf_counter() - start
        counts = torch.stack([layer.selections_per_expert() for layer in model.moe_layers()])
        counts = all_sum(counts.double(), group)
        run.imbalance = float((counts.amax(1) / counts.mean(1)).max())
        with torch.no_grad():
            for number in range(HELD_OUT_BATCHES):
                tokens, targets = text.batch(number, config.batch_size, length, held_out=True)
                loss = cross_entropy(model(tokens[mine]), targets[mine]) / targets.numel()
                run.held_out_loss += float(all_sum(loss, group)) / HELD_OUT_BATCHES
    return run


def wire_dtypes(name: str) -> dict[str, str]:
    """fp8 is for dispatch; results come back in bf16."""
    return {"wire_dtype": name, "combine_dtype": "bf16" if name == "fp8" else name}


def schedule(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over this rank's tokens, in nats."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def reduce_and_clip(
    dense: list[torch.nn.Parameter], experts: list[torch.nn.Parameter], most: float, group: dist.ProcessGroup | None
) -> float:
    """Sum the dense gradients over the ranks, then scale all gradients to a norm of at most ``most``.

    Returns:
        the norm before, of the gradients of all parameters of all ranks.
    """
    flat = all_sum(torch.cat([parameter.grad.flatten() for parameter in dense]), group)
    for parameter, grad in zip(dense, flat.split([parameter.numel() for parameter in dense]), strict=True):
        parameter.grad = grad.view_as(parameter)
    # Every rank has all dense parameters, but its own experts only.
    squares = sum(parameter.grad.double().square().sum() for parameter in experts)
    norm = float((flat.double().square().sum() + all_sum(squares, group)).sqrt())
    for parameter in [*dense, *experts] if norm > most else []:
        parameter.grad.mul_(most / norm)
    return norm


def all_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def progress(steps: int, label: str, run: Run, *, silent: bool) -> Iterator[int]:
    """range(steps) behind a progress bar with the loss."""
    if silent:
        yield from range(steps)
        return
    try:
        from tqdm import tqdm
    except ImportError:
        print("no progress bar without tqdm: pip install 'moe_efa[examples]'", flush=True)
        for step in range(steps):
            yield step
            if (step + 1) % 20 == 0:
                print(f"{label}: step {step + 1} of {steps}, loss {run.losses[-1]:.3f}", flush=True)
        return
    with tqdm(total=steps, desc=label, unit="step", dynamic_ncols=True) as bar:
        for step in range(steps):
            yield step
            bar.set_postfix_str(f"loss {run.losses[-1]:.3f}", refresh=False)
            bar.update()
