"""Modules of an MoE layer: router, experts, shared experts, and MoELayer, which puts them together."""

from moe_efa.nn.experts import SwiGLUExperts
from moe_efa.nn.moe_layer import MoELayer
from moe_efa.nn.router import Router
from moe_efa.nn.shared import SharedExperts

__all__ = ["MoELayer", "Router", "SharedExperts", "SwiGLUExperts"]
