"""Triton kernels of moe_efa: one kernel and its wrapper per module; ``reference`` has their slow twins in plain torch.

The package itself imports neither torch nor Triton: ``from moe_efa.triton_kernels.quantize import quantize_1x128``.
"""
