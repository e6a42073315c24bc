"""What the README shows is what the package does: its example runs, its tables are generated."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from moe_efa import env

README = Path(__file__).resolve().parents[1] / "README.md"


def test_settings_table_is_generated() -> None:
    assert env.as_markdown().strip() in README.read_text()


def test_the_example_runs_as_the_readme_says(tmp_path: Path) -> None:
    text = README.read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    (tmp_path / "thirty.py").write_text(code.group(1))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "thirty.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = re.findall(r"rank (\d): (\d+) rows came, 8 results, \|grad\| [\d.]+", done.stdout)
    assert sorted(rank for rank, _ in told) == ["0", "1", "2", "3"]
    assert sum(int(rows) for _, rows in told) == 4 * 8 * 2  # every (token, expert) arrived somewhere


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
