"""Triton kernels of the matching ops: the GPU path where nothing was compiled, and on AMD.

Importing this package imports neither Triton nor PyTorch's CUDA state; the modules inside do, when first used.
"""
