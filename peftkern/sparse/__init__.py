"""Sparse deltas and masks: index sets, layers, files and the methods that train them."""
