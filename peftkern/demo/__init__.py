"""The demonstration that `peftkern demo` runs: a fine-tuning run, samples, and a comparison with the peer.

It stands on both :mod:`peftkern.finetune` and :mod:`peftkern.bench`, which know nothing of it.
"""
