"""``python -m peftkern``: the same as the command ``peftkern``."""

from peftkern.cli.main import app

app(prog_name="peftkern")
