"""The libraries' own progress bars and advice are not for artists."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Errors only, from diffusers and transformers; imports them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
