"""The benchmark's checks: the bound holds for what rounds as it says, for fp8 too, and sees what does not."""

import dataclasses

import pytest
import torch

from moe_efa.bench import BenchConfig
from moe_efa.bench.check import _rows_agree, digest_of, sum_bound, sums_agree
from moe_efa.bench.inputs import Inputs

E4M3 = torch.float8_e4m3fn


def config(**changes):
    """Without the group's own checks: this build may not offer fp8 yet."""
    made = BenchConfig(tokens=50, hidden=200, topk=2, experts=8, ranks=2)
    for name, value in changes.items():
        object.__setattr__(made, name, value)
    return made


def through_fp8(x, scale_kind):
    """x as an fp8 wire leaves it: blocks of 128, the last of them short."""
    pieces = []
    for block in x.float().split(128, 1):
        scale = block.abs().amax(1, keepdim=True) / 448
        scale = torch.where(scale == 0, 1.0, scale)
        if scale_kind == "ue8m0":
            scale = 2.0 ** scale.log2().ceil()
        pieces.append((block / scale).to(E4M3).float() * scale)
    return torch.cat(pieces, 1).to(x.dtype)


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_fp8_rounding_stays_within_the_bound_and_an_error_does_not(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(50, 200, generator=generator) * torch.logspace(-4, 3, 200)).to(dtype)
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    c = config(dtype=name, wire_dtype="fp8", combine_dtype="fp8", fp8_scale=scale)
    weights = torch.rand(50, 2, generator=generator) + 0.05
    factor = weights.double().sum(1)
    received = through_fp8(x, scale)
    out = through_fp8((received.double() * factor[:, None]).to(dtype), scale)
    error = (out.double() - x.double() * factor[:, None]).abs()
    bound = sum_bound(c, x, factor)
    assert bool((error <= bound).all())
    assert float((error / bound).max()) > 0.4  # not a bound that lets everything pass
    assert _rows_agree(c, received, x)
    inputs = Inputs(x, torch.zeros(50, 2, dtype=torch.int64), weights)
    exact = (x.double() * factor[:, None]).to(dtype)
    assert sums_agree(c, inputs, out, exact)
    out[7, 127] *= 1.3  # the largest of its block: no value below the normal ones
    assert not sums_agree(c, inputs, out, exact)
    received[9] = received[10]
    assert not _rows_agree(c, received, x)


def test_a_wire_that_keeps_all_bits_must_keep_them():
    x = torch.randn(5, 200).to(torch.bfloat16)
    off = x.clone()
    off[2, 2] += off[2, 2].abs() * 2.0**-7
    for wire in ("auto", "bf16", "fp32"):
        assert _rows_agree(config(wire_dtype=wire), x.clone(), x)
        assert not _rows_agree(config(wire_dtype=wire), off, x)
    single = torch.randn(5, 200)
    assert _rows_agree(config(dtype="fp32", wire_dtype="bf16"), single.bfloat16().float(), single)
    assert not _rows_agree(config(dtype="fp32"), single.bfloat16().float(), single)


def test_a_digest_is_of_the_bytes():
    x = torch.zeros(3, 4)
    assert digest_of(x) == digest_of(x.clone())
    assert digest_of(x) != digest_of(-x)


def test_configurations_survive_the_way_to_the_mpi_ranks():
    mpi_version = pytest.importorskip("moe_efa.bench.mpi_version")
    import json

    c = BenchConfig(tokens=7, mpi=True, mpi_args=("--verbose",), node_size=2)
    assert mpi_version._config(json.loads(json.dumps(dataclasses.asdict(c)))) == c
