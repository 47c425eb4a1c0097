"""Triton kernels, one file per op: `run(*inputs, *outputs, *options)`, as every backend has it."""
