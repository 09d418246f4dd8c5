"""Benchmarks: scripts that print ratios from one run together with their noise."""
