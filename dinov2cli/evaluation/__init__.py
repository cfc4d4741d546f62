"""Benchmarks on frozen features: one file per benchmark, all fed by `features` (METHOD §6)."""
