"""Four ranks as two nodes, one expert each: tokens go to their experts and come back, and so do gradients.

torchrun --nproc-per-node 4 examples/01_dispatch_combine.py
"""

import torch
import torch.distributed as dist

import moe_efa


def say(text: str) -> None:
    """Print the ranks' texts in rank order."""
    texts = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    if dist.get_rank() == 0:
        print("\n".join(texts), flush=True)


def main() -> None:
    try:
        dist.init_process_group("gloo")
    except ValueError as error:  # no launcher has said which rank this is
        raise SystemExit(f"{error}\nrun it as: torchrun --nproc-per-node 4 examples/01_dispatch_combine.py") from None
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    if num_ranks < 2:
        raise SystemExit("two experts per token need two ranks: torchrun --nproc-per-node 4 ...")
    ep = moe_efa.ExpertParallel(
        dist.group.WORLD,
        num_experts=num_ranks,  # rank r owns expert r
        hidden_size=8,
        top_k=2,
        max_tokens_per_rank=2,
        node_size=max(1, num_ranks // 2),
        transport="shm",  # "auto" on a cluster: EFA
        device="cpu",  # or "cuda", with tensors there
    )
    # Two tokens per rank: rank r's hold 10 r and 10 r + 1. Token t selects experts r + t and r + t + 1.
    x = (10.0 * rank + torch.arange(2.0))[:, None].repeat(1, 8).requires_grad_()
    topk_idx = (rank + torch.arange(2)[:, None] + torch.arange(2)) % num_ranks
    topk_weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]], requires_grad=True)

    d = ep.dispatch(x, topk_idx, topk_weights)
    say(f"rank {rank}: expert {rank} received tokens {d.x[:, 0].tolist()} with weights {d.weights.tolist()}")
    y = d.x * (rank + 1)  # the expert: multiplies by its number plus one
    out = ep.combine(y, d.handle)
    say(f"rank {rank}: tokens {x[:, 0].tolist()} chose {topk_idx.tolist()} and became {out[:, 0].tolist()}")
    out.sum().backward()  # collective, as the forward pass
    say(f"rank {rank}: gradients of x {x.grad[:, 0].tolist()}, of the weights {topk_weights.grad.tolist()}")
    ep.close()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()  # main's references to the group are gone
