"""Keep the libraries underneath from writing between our own lines."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Turn off progress bars and notes of transformers, peft and bitsandbytes; errors are still raised.

    For commands only: it changes settings of the whole process.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # imported by peft where it is installed, it speaks of kernels for inference that nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
