"""The command ``peftkern``."""
