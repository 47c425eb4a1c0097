"""Shared by tests and benchmarks: case files, comparisons, measured roofs."""
