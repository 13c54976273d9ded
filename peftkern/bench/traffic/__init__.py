"""Counts launches, bytes, FLOPs and saved memory of a training step on tensors without memory, for both sides."""
