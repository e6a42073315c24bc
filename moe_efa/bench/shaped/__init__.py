"""Dispatch and combine between network namespaces whose links are shaped to a rate: `bench/shaped_link.py`.

A node is a namespace, its ranks are started by torchrun in it, and the link between nodes is a veth pair behind a token
bucket. Needs root and Linux. What is counted and how is in bench/README.md.
"""

from moe_efa.bench.shaped.command import main
from moe_efa.bench.shaped.network import Network, missing

__all__ = ["Network", "main", "missing"]
