"""Optimizers whose updates can be masked, scaled and indexed."""

from peftkern.optim.adamw import AdamW, AdamW8bit, seeded_moments

__all__ = ["AdamW", "AdamW8bit", "seeded_moments"]
