"""The parts of ``bench/gpu_check.py``: what one machine with one GPU can tell of the kernels.

It runs on a machine that has never seen the project: Python with torch and Triton, nvcc, g++; nothing of moe_efa is
installed there and nothing can be fetched. So nothing here imports the native extension.
"""
