"""Trains a small MoE language model on bytes: data parallel, with every layer's experts spread over the ranks.

torchrun --nproc-per-node 4 examples/03_train_language_model.py                     # Python's own library, 2-3 minutes
torchrun --nproc-per-node 4 examples/03_train_language_model.py --compare-one-rank  # and the same on one rank
python examples/03_train_language_model.py --data ~/notes --plot curve.png          # one rank, your text

The training loop is language_model/training.py, the model language_model/model.py.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from language_model.comparison import compare, plot, require_matplotlib
from language_model.text import Text
from language_model.training import TrainConfig, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = TrainConfig()
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--data", type=Path, help="folder of text; default: the sources of Python's standard library")
    parser.add_argument(
        "--wire-dtype",
        default=defaults.wire_dtype,
        help="what crosses between ranks: fp32, bf16 or fp8 (rows only: results then cross in bf16)",
    )
    parser.add_argument("--node-size", type=int, help="ranks per node; default: found from the hosts")
    parser.add_argument("--compare-one-rank", action="store_true", help="train on one rank too, and compare")
    parser.add_argument(
        "--pin-routing", action="store_true", help="of the comparison, the part with pinned routing only"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write losses and what was compared")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write the curve")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    if args.data is not None and not args.data.is_dir():
        parser.error(f"--data {args.data} is not a folder")
    if args.plot:
        require_matplotlib()
    config = TrainConfig(steps=args.steps, wire_dtype=args.wire_dtype, node_size=args.node_size)

    group = None
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    rank, num_ranks = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
    text = Text(args.data)
    if rank == 0:
        print(f"{num_ranks} ranks, {len(text.train) / 1e6:.1f} MB of text in {text.num_files} files", flush=True)
    if args.compare_one_rank or args.pin_routing:
        if group is None:
            raise SystemExit("a comparison with one rank needs several: torchrun --nproc-per-node 4 ...")
        runs = compare(config, text, group, free=not args.pin_routing)
        report = runs.pop("report")
    else:
        runs, report = {"loss": train(config, text, group)}, {}
    if rank == 0:
        for name, run in runs.items():
            print(
                f"{name}: loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f} nats per byte, held-out text "
                f"{run.held_out_loss:.3f}; busiest expert at {run.imbalance:.2f} of the mean; {run.seconds:.0f} s"
            )
        for name, value in report.items():
            print(f"{name.replace('_', ' ')}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")
        if args.json:
            results = {
                name: {key: value for key, value in vars(run).items() if key != "routes"} for name, run in runs.items()
            }
            args.json.write_text(json.dumps({"config": asdict(config), "runs": results, "report": report}, indent=1))
        if args.plot:
            plot(runs, args.plot, f"{num_ranks} ranks, {config.model.num_experts} experts in each of 4 layers")


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()  # main's references to the group are gone
