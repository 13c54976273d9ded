"""Optimizers whose updates can be masked and indexed."""
