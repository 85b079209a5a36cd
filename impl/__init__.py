"""The reference implementation: how to train these model families correctly, usable on its own."""
