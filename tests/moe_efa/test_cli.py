"""The command `moe-efa`: doctor and plan, their JSON and exit status, and how a launch is recognised."""

import json
from pathlib import Path

import pytest

from moe_efa import _C, ConfigError, ExpertParallelConfig, cli, device, doctor, env, libfabric, plan
from moe_efa.presets import PRESETS

LAUNCH_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_ID",
)
SEES_GPUS = {"version": "2.13.0", "gloo": True, "cuda_devices": 2}
REFUSES = {"built": True, "device": None, "error": "the driver is too old"}
GPU = {"name": "NVIDIA A", "kind": "cuda", "num_sms": 132, "shares_memory": True, "dma_buf": True}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def healthy_facts():
    return {
        "build": {"libfabric_built": True},
        "libfabric": {"found": True, "path": "/opt/lib/libfabric.so.1", "version": "2.3", "error": ""},
        "providers": ["efa", "tcp"],
        "efa_devices": ["rdmap0s6"],
        "wrong_settings": [],
        "shm": {"bytes": 64 << 30, "free_bytes": 64 << 30},
        "memlock_bytes": None,
        "cuda": {"built": False, "device": None, "error": "not built"},
        "torch": {"version": "2.13.0+cpu", "gloo": True, "cuda_devices": 0},
    }


def test_doctor_json_has_facts_problems_and_a_matching_exit_status(capsys):
    status = cli.main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) >= {"build", "libfabric", "providers", "efa_devices", "shm", "memlock_bytes", "cores", "torch"}
    assert (facts["auto_provider"] != "") == facts["libfabric"]["found"]
    assert facts["auto_provider"] in ("", *facts["providers"])
    assert facts["libfabric"]["found"] == _C.build_info(**libfabric.search_path())["libfabric_found"]
    assert status == (0 if facts["ok"] else 1)
    assert facts["ok"] == all(problem["severity"] != "error" for problem in facts["problems"])


def test_doctor_names_settings_that_would_be_refused(monkeypatch):
    monkeypatch.setenv("MOE_EFA_NUM_THREADS", "many")
    monkeypatch.setenv("MOE_EFA_DEVICE", "gpu")
    facts = doctor.examine()
    texts = [problem["text"] for problem in facts["problems"] if problem["severity"] == "error"]
    assert any("MOE_EFA_NUM_THREADS" in text for text in texts)
    assert any("MOE_EFA_DEVICE" in text for text in texts)
    assert not facts["ok"]


def test_doctor_table_ends_with_a_verdict(capsys):
    status = cli.main(["doctor"])
    text = capsys.readouterr().out
    assert "libfabric" in text
    assert ", unless a provider is named" in text
    assert "missing for EFA" in text
    assert ("standalone use works here" in text) == (status == 0)


@pytest.mark.parametrize(
    ("cuda", "text"),
    [
        ({"built": False, "device": None, "error": "was built without"}, "not built"),
        (REFUSES, "built, but no GPU can be used: the driver is too old"),
        (
            {"built": True, "device": GPU, "error": ""},
            "built, opens GPU 0: NVIDIA A, 132 SMs, NICs can reach its memory",
        ),
        ({"built": True, "device": {**GPU, "dma_buf": False}, "error": ""}, "132 SMs, no NIC can reach its memory"),
    ],
    ids=["absent", "refuses", "opens", "without-dma-buf"],
)
def test_doctor_says_what_became_of_the_cuda_library(cuda, text, monkeypatch):
    monkeypatch.setattr(doctor, "_cuda_facts", lambda: cuda)
    (line,) = [line for line in doctor.format_table(doctor.examine()).splitlines() if line.startswith("CUDA library")]
    assert text in line


@pytest.mark.parametrize(
    ("library", "text"),
    [
        (
            "/nonexistent/libgdrapi.so",
            "not used, arrivals are polled in host memory: GDRCopy's library is not found: /non",
        ),
        ("off", "not used, arrivals are polled in host memory: MOE_EFA_GDRCOPY is off"),
        (_C.__file__, f"{_C.__file__} has no gdr_runtime_get_version"),
    ],
    ids=["absent", "off", "another-library"],
)
def test_doctor_says_what_became_of_gdrcopy(library, text, monkeypatch):
    monkeypatch.setenv("MOE_EFA_GDRCOPY", library)
    facts = doctor.examine()
    (line,) = [line for line in doctor.format_table(facts).splitlines() if line.startswith("GDRCopy")]
    assert text in line
    assert doctor.find_problems(facts) == doctor.find_problems({**facts, "gdrcopy": None})  # it is never needed
    found = {"usable": True, "path": "/opt/lib/libgdrapi.so.2", "version": "2.5", "error": ""}
    assert "2.5 at /opt/lib/libgdrapi.so.2" in doctor.format_table({**facts, "gdrcopy": found})


def test_cuda_library_that_is_none_is_refused_with_its_path(tmp_path):
    with pytest.raises(ConfigError, match=r"built without its CUDA library .*absent\.so.*MOE_EFA_CUDA=1"):
        device.facts(library=tmp_path / "absent.so")
    with pytest.raises(ConfigError, match=rf"{_C.__file__}: it has no moe_efa_open_device"):
        device.facts(library=Path(_C.__file__))


def test_a_healthy_host_has_no_problems():
    assert doctor.find_problems(healthy_facts()) == []


@pytest.mark.parametrize(
    ("change", "severity", "word", "cure"),
    [
        ({"build": {"libfabric_built": False}}, "error", "headers", "libfabric-dev"),
        ({"libfabric": {"found": False, "error": "", "path": ""}}, "error", "not found", "MOE_EFA_LIBFABRIC"),
        ({"providers": []}, "error", "no provider", "tcp"),
        ({"providers": ["tcp"]}, "error", "no efa provider", "/opt/amazon/efa"),
        ({"shm": None}, "error", "/dev/shm", "mount"),
        ({"shm": {"bytes": 64 << 20, "free_bytes": 64 << 20}}, "warning", "64 MiB", "--shm-size"),
        ({"memlock_bytes": 8 << 20}, "error", "ulimit -l", "memlock"),
        ({"torch": {"version": "2.6.0", "gloo": True, "cuda_devices": 0}}, "warning", "older", "upgrade"),
        ({"torch": {"version": "2.13.0", "gloo": False, "cuda_devices": 0}}, "error", "gloo", "install torch"),
        ({"torch": SEES_GPUS}, "warning", "2 GPU(s), but moe_efa was built without", "MOE_EFA_CUDA=1"),
        ({"torch": SEES_GPUS, "cuda": REFUSES}, "warning", "too old", "driver"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_every_problem_comes_with_its_cure(change, severity, word, cure):
    problem = doctor.find_problems(healthy_facts() | change)[0]
    assert problem.severity == severity
    assert word in problem.text
    assert cure in problem.cure


def test_locked_memory_matters_only_with_efa():
    assert doctor.find_problems(healthy_facts() | {"efa_devices": [], "memlock_bytes": 8 << 20}) == []


def test_what_is_missing_for_efa_is_named(tmp_path):
    def missing(
        devices=("rdmap0s6",), providers=("efa-direct",), verbs=tmp_path, memlock=None, libraries="ibverbs efa"
    ):
        return doctor.find_missing_for_efa(
            list(devices), list(providers), verbs, memlock, lambda name: name if name in libraries.split() else None
        )

    assert missing() == []
    assert missing(devices=()) == ["an EFA device"]
    assert missing(libraries="ibverbs") == ["rdma-core (libefa)"]
    assert missing(libraries="") == ["rdma-core (libibverbs, libefa)"]
    assert missing(verbs=tmp_path / "absent") == [str(tmp_path / "absent")]
    assert missing(providers=["tcp"])[0].startswith("libfabric's efa provider")
    assert missing(memlock=8 << 20) == ["locked memory (0.01 GiB by ulimit -l, 1 GiB per rank)"]


@pytest.mark.parametrize("max_tokens", [[], ["--max-tokens", "8192"]], ids=["4096", "8192"])
@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp8"])
@pytest.mark.parametrize("preset", ["deepseek-v3", "kimi-k2"])
def test_prefill_among_64_ranks_stays_within_one_gibibyte(preset, dtype, max_tokens, capsys):
    wire = ["--wire-dtype", dtype, "--combine-dtype", dtype]
    assert (
        cli.main(["plan", "--json", "--preset", preset, "--ranks", "64", "--node-size", "8", *wire, *max_tokens]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["experts"] == PRESETS[preset]["experts"]
    assert found["max_tokens"] == int((max_tokens or ["", "4096"])[1])
    assert found["registered_bytes"] <= 1 << 30
    assert sum(found["parts"].values()) == found["registered_bytes"]
    assert 1 << 16 <= found["device_words_bytes"] <= found["parts"]["flags"] + (1 << 17)  # whole pages of 64 KiB
    assert found["chunk_rows"] == 64
    assert found["slots"] >= 2


def test_plan_table_has_the_parts_and_queues(capsys):
    assert cli.main(["plan", "--preset", "kimi-k2", "--ranks", "64", "--node-size", "8", "--max-tokens", "8192"]) == 0
    text = capsys.readouterr().out
    for word in ("registered per rank", "dispatch rings", "combine send slots", "publish", "counts", "flags"):
        assert word in text
    assert "events towards each NIC" in text
    assert "E=384" in text
    assert "preset kimi-k2 with other tokens" in text


def test_single_options_override_the_preset_of_a_plan(capsys):
    assert (
        cli.main(
            [
                "plan",
                "--json",
                "--preset",
                "kimi-k2",
                "--ranks",
                "4",
                "--node-size",
                "2",
                "--hidden",
                "512",
                "--experts",
                "8",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["hidden"], found["topk"], found["experts"], found["max_tokens"]) == (512, 8, 8, 4096)
    assert found["shape"] == "preset kimi-k2 with other hidden, experts"
    assert cli.main(["plan", "--max-tokens", "0"]) == 1


def test_plan_json_holds_what_the_native_extension_chooses(capsys):
    arguments = "plan --json --ranks 4 --node-size 2 --hidden 2048 --topk 8 --experts 32 --max-tokens 1024"
    assert cli.main(arguments.split()) == 0
    found = json.loads(capsys.readouterr().out)
    expected = _C.plan_memory(
        _C.GroupConfig(
            rank=0, num_ranks=4, node_size=2, num_experts=32, hidden_size=2048, top_k=8, max_tokens_per_rank=1024
        )
    )
    assert {name: found[name] for name in expected} == expected
    assert (found["nodes"], found["ranks"], found["memory_budget_bytes"]) == (2, 4, 1 << 30)


def test_plan_stays_within_the_budget(capsys):
    assert cli.main(["plan", "--json", "--memory-budget", "64MiB"]) == 0
    assert json.loads(capsys.readouterr().out)["registered_bytes"] <= 64 << 20


def test_plan_makes_room_for_the_longest_rows_that_values_or_gradients_have():
    def registered(wire, grad):
        config = ExpertParallelConfig(
            num_experts=32,
            hidden_size=2048,
            top_k=8,
            max_tokens_per_rank=1024,
            node_size=2,
            wire_dtype=wire,
            combine_dtype=wire,
            grad_wire_dtype=grad,
            chunk_rows=64,
            slots=4,
        )
        return plan.plan_memory(4, config).registered_bytes

    assert registered("fp8", "fp8") < registered("fp8", "bf16") == registered("bf16", "auto")
    assert registered("fp8", "bf16") < registered("fp8", "auto") == registered("auto", "auto")


def test_plan_knows_fp8(capsys):
    words = "plan --json --wire-dtype fp8 --combine-dtype fp8 --grad-wire-dtype bf16"
    assert cli.main(words.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["wire_dtype"], found["combine_dtype"], found["grad_wire_dtype"]) == ("fp8", "fp8", "bf16")
    assert cli.main(["plan", "--wire-dtype", "fp8"]) == 0
    assert "fp8, auto" in capsys.readouterr().out


def test_plan_table_names_every_size(capsys):
    assert cli.main(["plan"]) == 0
    text = capsys.readouterr().out
    for word in ("registered per rank", "with rings on a GPU", "chunk rows", "slots per ring", "completion queue"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("--memory-budget 1MiB", "need at least"),
        ("--experts 100", "not a multiple"),
        ("--ranks 12 --experts 240", "node_size=8"),
        ("--topk 0", "top_k"),
    ],
)
def test_plan_says_why_a_configuration_cannot_work(arguments, word, capsys):
    assert cli.main(["plan", *arguments.split()]) == 1
    assert word in capsys.readouterr().err


def test_plan_of_one_node_needs_no_node_size():
    config = ExpertParallelConfig(num_experts=8, hidden_size=64, top_k=2, max_tokens_per_rank=16)
    assert plan.plan_memory(4, config).as_dict()["nodes"] == 1


def test_bench_names_what_to_install_without_libfabric(monkeypatch, capsys):
    absent = {"libfabric_found": False, "libfabric_built": True, "libfabric_error": "no such file"}
    monkeypatch.setattr(_C, "build_info", lambda **_: absent)
    assert cli.main(["bench"]) == 1
    text = capsys.readouterr().err
    assert "libfabric1" in text
    assert "--transport shm" in text


def test_alone_means_no_launch():
    assert env.launch() is None


def test_torchrun_is_recognised(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert env.launch() == env.Launch(3, 8, "env://")


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[007-010,12],login", "gpu007"), ("a1,a2", "a1"), ("n[3,5]-ib", "n3-ib"), ("single", "single")],
)
def test_srun_is_recognised(monkeypatch, nodes, host):
    for name, value in (("PROCID", "5"), ("NTASKS", "16"), ("STEP_NODELIST", nodes), ("JOB_ID", "12042")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert env.launch() == env.Launch(5, 16, f"tcp://{host}:29542")


def test_srun_without_a_host_is_an_error(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST"):
        env.launch()


def test_one_srun_task_starts_its_own_ranks(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert env.launch() is None
