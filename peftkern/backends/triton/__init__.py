"""The Triton backend: NVIDIA GPUs of sm_80 and newer. One file per kernel; ``register`` enters them in the table.

Nothing here imports Triton before a tensor on a GPU arrives.
"""
