"""Kernels of the reference: experts with LoRA, linear cross-entropy, gated delta rule."""
