"""Fused kernels of the reference, each with a plain torch path of the same contract."""
