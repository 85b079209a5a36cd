"""Fused kernels of the reference implementation, each with a plain torch path of the same contract."""
