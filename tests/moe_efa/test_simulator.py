"""The Python face of the simulator; the protocol itself is simulated by tests/csrc/simulator."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moe_efa import simulator


@pytest.mark.parametrize("profile", simulator.PROFILES)
def test_seeds_of_every_profile_are_clean(profile: str) -> None:
    results = simulator.check(profile, range(5), progress=False)
    assert [result.seed for result in results] == list(range(5))
    assert all(result.ok for result in results), [result.message for result in results if not result.ok]
    assert all(result.inbound_high_water <= result.inbound_limit for result in results)


def test_a_seed_is_a_whole_run() -> None:
    first, again, other = simulator.check("srd_harsh", [7, 7, 8], progress=False)
    assert first == again
    assert first != replace(other, seed=7)


def test_num_ranks_overrides_the_seed() -> None:
    (result,) = simulator.check("srd", [3], num_ranks=5, progress=False)
    assert result.num_ranks == 5
    assert result.ok


def test_wrong_arguments_name_themselves() -> None:
    with pytest.raises(ValueError, match=r"unknown profile 'calm'.*ordered"):
        simulator.check("calm")
    with pytest.raises(ValueError, match="num_ranks is 1"):
        simulator.check(num_ranks=1)
    with pytest.raises(ValueError, match="from 2 to 64"):
        simulator.check(num_ranks=1000)
    with pytest.raises(ValueError, match="seed"):
        simulator.check(seeds=[-1])


def test_the_command_reports_and_fails_with_a_replay_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert simulator.main(["--seeds", "2", "--json"]) == 0
    (summary,) = json.loads(capsys.readouterr().out)["profiles"]
    assert summary["seeds"] == 2
    assert summary["failures"] == []

    (good,) = simulator.check("srd", [5], progress=False)
    bad = replace(good, ok=False, message="I2: a slot is overwritten")
    monkeypatch.setattr(simulator, "check", lambda *args, **kwargs: [bad])
    assert simulator.main(["--seeds", "1", "--first-seed", "5"]) == 1
    printed = capsys.readouterr().out
    assert "I2: a slot is overwritten" in printed
    assert "python -m moe_efa.simulator --profile srd --first-seed 5 --seeds 1" in printed
