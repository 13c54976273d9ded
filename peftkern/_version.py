"""The version, alone in a file so that the build reads it without importing PyTorch."""

__version__ = "0.1.0"
