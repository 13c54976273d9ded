"""How the operations run: each backend registers itself with :mod:`peftkern.backends.registry`."""
