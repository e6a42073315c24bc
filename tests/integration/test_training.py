"""Example 03 on 4 ranks trains what one rank trains: losses, gradient norms, and what free routing changes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moe_efa.testing.spawn import spawn

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from language_model import training
from language_model.comparison import FIRST_STEPS, compare, count_flips
from language_model.model import ModelConfig
from language_model.text import Text

MODEL = ModelConfig(num_layers=2, hidden_size=64, sequence_length=64, num_experts=8, intermediate_size=64)


def config_of(steps, **others):
    return training.TrainConfig(steps=steps, batch_size=8, node_size=2, model=MODEL, **others)


def compare_everything(rank, group, folder):
    runs = compare(config_of(120), Text(folder), group)
    return runs["report"], {name: run for name, run in runs.items() if name != "report"}


def test_four_ranks_train_as_one(tmp_path):
    sources = sorted((Path(training.__file__).parents[2] / "moe_efa").rglob("*.py"))
    (tmp_path / "text").write_text("".join(path.read_text() for path in sources))
    results = spawn(compare_everything, 4, tmp_path, timeout=300)
    report, runs = results[0]
    print(report)
    one_rank, pinned, parallel = runs["one_rank"], runs["pinned"], runs["parallel"]
    assert len(pinned.losses) == report["first_losses"] == FIRST_STEPS == 20
    assert report["pinned_max_relative_difference"] < 1e-5
    # The optimizer hides factors in gradients, their norm does not.
    assert report["pinned_max_relative_difference_of_gradient_norms"] < 1e-4
    assert report["free_final_relative_difference"] < 0.02
    assert report["selections"] == 120 * 2 * 8 * 64 * 2  # steps, layers, sequences, bytes, top-k
    assert 0 <= report["routing_flips"] < report["selections"]
    assert len(one_rank.losses) == len(parallel.losses) == 120
    for run in (one_rank, parallel):  # it learns
        assert run.losses[0] > 5
        assert max(run.losses[-1], run.held_out_loss) < 3.4
    for _, others in results[1:]:  # losses are of all ranks
        assert others["parallel"].losses == parallel.losses


def compare_wrong(rank, group, folder):
    """Each mistake that people make with expert gradients, for a few steps with pinned routing."""
    config, text = config_of(4), Text(folder)
    right = training.reduce_and_clip
    num_ranks = dist.get_world_size(group)

    def scaled(dense, experts, most, group):
        """As if the trainer averaged over the ranks, and forgot the experts."""
        if group is not None:
            for parameter in experts:
                parameter.grad.mul_(num_ranks)
        return right(dense, experts, most, group)

    def reduced(dense, experts, most, group):
        """Expert gradients summed over ranks that hold different experts."""
        if group is not None:
            for parameter in experts:
                dist.all_reduce(parameter.grad, group=group)
        return right(dense, experts, most, group)

    def not_reduced(dense, experts, most, group):
        """Dense gradients of this rank's tokens only."""
        return right(dense, experts, most, None)

    reports = {}
    for wrong in (scaled, reduced, not_reduced):
        training.reduce_and_clip = wrong
        reports[wrong.__name__] = compare(config, text, group, free=False)["report"]
    training.reduce_and_clip = right
    return reports


def test_wrong_gradients_are_seen(tmp_path):
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "text").write_bytes(bytes(torch.randint(32, 127, (20000,), generator=generator).tolist()))
    for name, report in spawn(compare_wrong, 4, tmp_path, timeout=300)[0].items():
        assert report["pinned_max_relative_difference_of_gradient_norms"] > 1e-3, name


def test_flips_are_selections_that_the_other_run_did_not_make():
    mine = torch.tensor([[[1, 2], [3, 4], [5, 6]]], dtype=torch.uint8)
    other = torch.tensor([[[2, 1], [3, 7], [0, 1]]], dtype=torch.uint8)
    assert count_flips(mine, mine) == 0
    assert count_flips(mine, other) == 3


def test_text_is_cut_and_drawn_alike(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two").write_bytes(b"B" * 600)
    (tmp_path / "a").write_bytes(b"A" * 400)
    text = Text(tmp_path)
    assert text.num_files == 2
    assert bytes(text.train.tolist()) == b"A" * 400 + b"B" * 550
    assert bytes(text.held_out.tolist()) == b"B" * 50
    tokens, targets = text.batch(7, 3, 20)
    assert tokens.shape == targets.shape == (3, 20)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(text.batch(7, 3, 20)[0], tokens)
