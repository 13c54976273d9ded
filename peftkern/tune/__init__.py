"""Measures on the GPU at hand what :mod:`peftkern.backends.triton.crossover` otherwise estimates."""
