"""An MoE layer whose experts are spread over the ranks, and proof that its gradients are those of a dense layer.

torchrun --nproc-per-node 4 examples/02_moe_layer.py
"""

import torch
import torch.distributed as dist

import moe_efa

NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, TOKENS = 8, 2, 32, 64, 6


def say(text: str) -> None:
    """Print the ranks' texts in rank order."""
    texts = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    if dist.get_rank() == 0:
        print("\n".join(texts), flush=True)


def tokens_of(rank: int) -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(rank)).requires_grad_()


def dense_layer(router: moe_efa.nn.Router, experts: moe_efa.nn.SwiGLUExperts, x: torch.Tensor) -> torch.Tensor:
    """The same layer in plain PyTorch: every expert on every token, times the routing weight or zero."""
    topk_idx, topk_weights, _ = router(x)
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        y = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T
        out = out + (topk_weights * (topk_idx == expert)).sum(-1, keepdim=True) * y
    return out


def main() -> None:
    try:
        dist.init_process_group("gloo")
    except ValueError as error:  # no launcher has said which rank this is
        raise SystemExit(f"{error}\nrun it as: torchrun --nproc-per-node 4 examples/02_moe_layer.py") from None
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    layer = moe_efa.MoELayer(
        dist.group.WORLD,
        num_experts=NUM_EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        top_k=TOP_K,
        max_tokens_per_rank=TOKENS,
        recompute=True,  # gate and up are computed again in backward; nothing is sent again
        initializer_range=0.2,
        seed=0,  # an expert's initial values depend on the seed and its number, not on the number of ranks
    )
    x = tokens_of(rank)
    out = layer(x)  # [tokens, hidden] -> [tokens, hidden]
    out.square().sum().backward()  # collective, as the forward pass
    first = layer.experts.first_expert
    mine = slice(first, first + layer.experts.num_local_experts)
    say(f"rank {rank}: experts {first} to {mine.stop - 1} got {layer.tokens_per_expert.tolist()} rows")

    # Experts belong to one rank: their gradients are complete. Everything else is replicated: add it up.
    dist.all_reduce(layer.router.weight.grad)

    # The dense layer sees the tokens of all ranks.
    sizes = {"num_experts": NUM_EXPERTS, "hidden_size": HIDDEN, "initializer_range": 0.2, "seed": 0}
    router = moe_efa.nn.Router(top_k=TOP_K, **sizes)
    experts = moe_efa.nn.SwiGLUExperts(intermediate_size=INTERMEDIATE, **sizes)
    everything = [tokens_of(other) for other in range(num_ranks)]
    dense = [dense_layer(router, experts, tokens) for tokens in everything]
    sum(part.square().sum() for part in dense).backward()
    pairs = {
        "result": (out, dense[rank]),
        "x.grad": (x.grad, everything[rank].grad),
        "router.weight.grad": (layer.router.weight.grad, router.weight.grad),
        "experts.gate_up_proj.grad": (layer.experts.gate_up_proj.grad, experts.gate_up_proj.grad[mine]),
        "experts.down_proj.grad": (layer.experts.down_proj.grad, experts.down_proj.grad[mine]),
    }
    for name, (got, want) in pairs.items():
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.detach().abs().max()))
        error = torch.tensor(float((got - want).detach().abs().max() / want.detach().abs().max()))
        dist.all_reduce(error, op=dist.ReduceOp.MAX)
        if rank == 0:
            print(f"{name:26} equals the dense layer's: largest difference {error:.0e} of its largest value")
    layer.close()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()  # main's references to the group are gone
