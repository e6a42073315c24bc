"""The cost of the engine by itself: that it runs and counts, not how long it takes."""

import pytest

from moe_efa import _C
from moe_efa.bench import main


@pytest.mark.parametrize("copying", [False, True], ids=["alone", "between-copies"])
@pytest.mark.parametrize("num_nodes", [2, 5])
def test_a_chunk_is_posted_completed_received_released_and_credited(num_nodes, copying):
    cost = _C.engine_cost(640, num_nodes=num_nodes, copying=copying)
    assert cost["us_per_chunk"] > 0
    # descriptor, post, completion; arrival and its action; release; and shares of credits both ways
    assert 7 < cost["events_per_chunk"] < 9.5


def test_arguments_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="chunks"):
        _C.engine_cost(0)
    with pytest.raises(ValueError, match="nodes"):
        _C.engine_cost(10, num_nodes=1)


def test_the_command_prints_the_bar(monkeypatch, capsys):
    monkeypatch.setattr("moe_efa.bench.engine._CHUNKS", 1000)
    monkeypatch.setattr("moe_efa.bench.engine.measure_engine.__defaults__", (1000,))
    assert main(["--engine"]) == 0
    assert "bar: at most 1 us" in capsys.readouterr().out
