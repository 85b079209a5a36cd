"""The checks: one function a claim."""
