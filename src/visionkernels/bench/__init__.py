"""Benchmarks: the operators beside their peers, checked against float64 first, then timed in the same run."""
