"""Enters the Triton kernels in the table of backends; imports PyTorch alone until a tensor on a GPU arrives."""
