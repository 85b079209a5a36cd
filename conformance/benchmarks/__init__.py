"""Benchmarks: what is slow or large, measured, never asserted."""
