"""Environment variables: the table, the getters, and that nobody else reads them."""

import ast
import os
from pathlib import Path

import pytest

import moe_efa
from moe_efa import ConfigError, env

GETTERS = {
    "MOE_EFA_LIBFABRIC": env.libfabric_path,
    "MOE_EFA_SOCKET_ADDR": env.socket_address,
    "MOE_EFA_HOST_ID": env.host_id,
    "MOE_EFA_NUM_THREADS": lambda: env.num_threads(1),
    "MOE_EFA_OUTPUT_CACHE_BYTES": env.output_cache_bytes,
    "MOE_EFA_DEVICE": env.device,
    "MOE_EFA_DEVICE_LIBRARY": env.device_library,
    "MOE_EFA_GDRCOPY": env.gdrcopy,
    "MOE_EFA_REORDER": env.reorder,
}
VALUES = {
    "MOE_EFA_LIBFABRIC": ("/opt/lib/libfabric.so", "/opt/lib/libfabric.so"),
    "MOE_EFA_SOCKET_ADDR": ("10.0.0.7", "10.0.0.7"),
    "MOE_EFA_HOST_ID": ("a", "a"),
    "MOE_EFA_NUM_THREADS": ("3", 3),
    "MOE_EFA_OUTPUT_CACHE_BYTES": ("1048576", 1 << 20),
    "MOE_EFA_DEVICE": ("cuda", "cuda"),
    "MOE_EFA_DEVICE_LIBRARY": ("/tmp/libdevice.so", "/tmp/libdevice.so"),
    "MOE_EFA_GDRCOPY": ("/opt/lib/libgdrapi.so", "/opt/lib/libgdrapi.so"),
    "MOE_EFA_REORDER": ("7,drop=1@100", env.Reorder(seed=7, drop_node=1, drop_after=100)),
}


def test_every_variable_of_the_table_has_a_getter():
    assert {variable.name for variable in env.VARIABLES} == set(GETTERS)


@pytest.mark.parametrize("name", GETTERS)
def test_getters_read_their_variable(monkeypatch, name):
    text, expected = VALUES[name]
    monkeypatch.setenv(name, text)
    assert GETTERS[name]() == expected


@pytest.mark.parametrize("name", GETTERS)
@pytest.mark.parametrize("unset", ["absent", "empty"])
def test_getters_have_defaults(monkeypatch, name, unset):
    if unset == "absent":
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, "")
    defaults = {"MOE_EFA_NUM_THREADS": max(1, len(os.sched_getaffinity(0))), "MOE_EFA_OUTPUT_CACHE_BYTES": 512 << 20}
    assert GETTERS[name]() == defaults.get(name)


def test_threads_are_shared_by_the_ranks_of_a_host(monkeypatch):
    monkeypatch.delenv("MOE_EFA_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert [env.num_threads(ranks) for ranks in (1, 5, 12, 64)] == [12, 2, 1, 1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("MOE_EFA_SOCKET_ADDR", "node7"),
        ("MOE_EFA_SOCKET_ADDR", "::1"),
        ("MOE_EFA_NUM_THREADS", "0"),
        ("MOE_EFA_OUTPUT_CACHE_BYTES", "-1"),
        ("MOE_EFA_OUTPUT_CACHE_BYTES", "512M"),
        ("MOE_EFA_REORDER", "on"),
        ("MOE_EFA_REORDER", "7,drop=1"),
        ("MOE_EFA_REORDER", "7,drop=-1@2"),
        ("MOE_EFA_REORDER", "7,nic=1"),
        ("MOE_EFA_NUM_THREADS", "-2"),
        ("MOE_EFA_NUM_THREADS", "two"),
    ],
)
def test_bad_values_name_the_variable(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=f"{name}='{text}'"):
        GETTERS[name]()


def test_markdown_has_one_row_per_variable_and_equal_columns():
    lines = env.as_markdown().splitlines()
    assert [line.split("|")[1].strip(" `") for line in lines[2:]] == [variable.name for variable in env.VARIABLES]
    assert {line.count("|") for line in lines} == {5}


def test_env_is_the_only_reader_of_the_environment():
    package = Path(moe_efa.__file__).parent
    readers = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"):
                readers.add(path.relative_to(package).as_posix())
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                readers |= {
                    path.relative_to(package).as_posix() for name in node.names if name.name in ("environ", "getenv")
                }
    assert "env.py" in readers
    assert {name for name in readers if not name.startswith("testing/")} == {"env.py"}
