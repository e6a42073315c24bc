"""From options to what is measured: presets, single options over them, memory before anything is allocated."""

import argparse
import shlex

import pytest

from moe_efa import ConfigError
from moe_efa.bench import PRESETS, BenchConfig, add_arguments, command, main, memory, plot, sweep
from moe_efa.bench.inputs import make_inputs
from moe_efa.bench.options import SWEEP, config_from


def parse(text):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(shlex.split(text))


def config(text, ranks=4, node_size=2):
    return config_from(parse(text), ranks=ranks, node_size=node_size)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("decode", (128, 7168, 8, 256)), ("prefill", (4096, 7168, 8, 256)), ("kimi-k2", (4096, 7168, 8, 384))],
)
def test_a_preset_is_a_shape_and_single_options_override_it(name, shape):
    assert name in PRESETS
    c = config(f"--preset {name}")
    assert (c.tokens, c.hidden, c.topk, c.experts) == shape
    c = config(f"--preset {name} --tokens 16 --topk 2 --dtype fp32")
    assert (c.tokens, c.hidden, c.topk, c.experts, c.dtype) == (16, 7168, 2, shape[3], "fp32")


def test_without_options_the_defaults_hold():
    assert config("") == BenchConfig(node_size=2)


def test_words_for_the_wire_reach_the_group():
    c = config("--wire-dtype bf16 --combine-dtype fp32").expert_parallel()
    assert (c.wire_dtype, c.combine_dtype, c.fp8_scale) == ("bf16", "fp32", "fp32")


def test_routing_parameters_are_read():
    routing = config("--routing node-limited --topk-nodes 2 --zipf-exponent 0.5").routing
    assert (routing.name, routing.topk_nodes, routing.zipf_exponent) == ("node-limited", 2, 0.5)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("--routing node-limited --topk-nodes 1 --topk 5 --experts 8", "4 of the 8 experts"),
        ("--routing zipf --zipf-exponent -1", "zipf-exponent"),
        ("--mpi --no-baseline", "--mpi is a baseline"),
        ("--plot picture.doc", ".png"),
        ("--plot nowhere/picture.png", "no folder"),
        ("--idle --plot picture.png", "not together"),
        ("--sweep-tokens 64", "needs --sweep"),
        ("--sweep --tokens 64", "--sweep-tokens"),
        ("--node-size 0", "node_size"),
        ("--sweep --node-size 0", "node_size"),
        ("--sweep --iters 0", "--iters must be at least 1"),
        ("--ranks 0", "--ranks must be at least 1"),
        ("--sweep --ranks 0", "--ranks must be at least 1"),
        ("--seed 18446744073709551616", "--seed must be from 0"),
        ("--seed -1", "--seed must be from 0"),
        ("--json .", "cannot be written"),
        ("--json ''", "cannot be written"),
        ("--json /proc/result.json", "cannot be written"),
        ("--plot /proc/result.png", "cannot be written"),
        ("--plot ''", "cannot be written"),
        ("--sweep --sweep-ranks 3", "num_experts=32"),
        ("--tokens 60000000", "GiB are available"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_rank_starts(arguments, word, monkeypatch, capsys):
    monkeypatch.setattr(command, "run_on_ranks", None)
    assert main(shlex.split(f"--transport shm {arguments}")) == 1
    assert word in capsys.readouterr().err


def test_looking_at_a_file_to_write_leaves_it_as_it_was(tmp_path):
    there, absent = tmp_path / "there.json", tmp_path / "absent.json"
    there.write_text("old")
    for target in (there, absent):
        command._check_files(parse(f"--json {target}"))
    assert there.read_text() == "old"
    assert list(tmp_path.iterdir()) == [there]


def test_the_largest_seed_makes_inputs():
    inputs = make_inputs(config(f"--seed {2**32 - 1} --tokens 2 --routing zipf"), 3, node_size=2)
    assert inputs.x.isfinite().all()


def test_without_matplotlib_a_picture_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert main(shlex.split("--transport shm --plot picture.png")) == 1
    assert "moe_efa[plot]" in capsys.readouterr().err


def test_a_preset_that_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_bytes", lambda: 8 << 30)
    assert main(shlex.split("--preset kimi-k2 --transport shm")) == 1
    text = capsys.readouterr().err
    for word in ("T=4096, H=7168", "8.0 GiB are available", "fewer --tokens", "--no-baseline, which needs"):
        assert word in text


def test_fewer_tokens_that_the_message_names_do_fit(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 8 << 30)
    with pytest.raises(ConfigError) as raised:
        memory.check_memory(config("--preset prefill"), ranks_on_host=4, node_size=2)
    tokens = int(str(raised.value).split("(about ")[1].split()[0])
    memory.check_memory(config(f"--preset prefill --tokens {tokens}"), ranks_on_host=4, node_size=2)


def test_a_sweep_has_every_shape_on_every_number_of_ranks():
    found = sweep.grid(parse("--sweep --warmup 0"), None)
    shapes = [(hidden, tokens) for hidden, of_hidden in SWEEP for tokens in of_hidden]
    assert [ranks for ranks, _ in found] == [2, 4]
    assert all([(point["hidden"], point["tokens"]) for point in points] == shapes for _, points in found)
    assert found[0][1][0] == {"hidden": 2048, "tokens": 256, "iters": 5, "warmup": 0}
    iters = [point["iters"] for point in found[0][1]]
    assert iters == [5, 5, 5, 5, 3, 5, 5, 3, 3]
    assert {point["iters"] for point in sweep.grid(parse("--sweep --iters 7"), None)[0][1]} == {7}
    found = sweep.grid(parse("--sweep --sweep-ranks 4,8,16 --sweep-hidden 7168 --sweep-tokens 64"), None)
    assert [(ranks, len(points)) for ranks, points in found] == [(4, 1), (8, 1), (16, 1)]
    with pytest.raises(ConfigError, match="launcher"):
        sweep.grid(parse("--sweep --sweep-ranks 2,4"), 8)


def test_the_whole_sweep_fits_into_twelve_minutes_of_two_cores():
    options = parse("--sweep --mpi")
    groups = [
        [config_from(options, ranks=ranks, node_size=ranks // 2, **point) for point in points]
        for ranks, points in sweep.grid(options, None)
    ]
    whole = sweep.estimate_s(groups, cores=2)
    assert 120 < whole < 720
    assert sweep.estimate_s(groups[:1], cores=2) < whole < sweep.estimate_s(groups, cores=1)
