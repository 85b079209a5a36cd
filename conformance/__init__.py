"""Conformance and benchmark suite for fine-tuning stacks (no torch is imported here)."""

__version__ = "2026.11.0"
