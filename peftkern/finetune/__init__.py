"""Fine-tune a language model with quantized LoRA: what ``peftkern finetune`` and ``peftkern demo`` do.

Importing this package imports neither transformers, peft, datasets nor matplotlib.
"""
