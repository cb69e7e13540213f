"""Benchmarks: modules that measure, each of which runs alone, and ``wasi-nn bench``, which runs them as scenarios."""
