"""One command for the first minutes on a GPU: build, check every number, time every kernel, write a report.

    python -m peftkern.gpu_check [--dry-run] [--output FOLDER] [--seconds N]

It runs from a checkout, on what such a machine has: PyTorch with Triton, pytest, rich and typer; nothing is installed.
"""
