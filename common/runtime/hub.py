"""Reports look-ups on the Hugging Face hub, and its errors, to the user."""

from __future__ import annotations

import functools
import sys

from common.runtime.distributed import is_main


@functools.cache
def announce_lookup(name: str) -> None:
    """Say, once, that a name is looked up on the hub, which may take a while.

    From here on huggingface_hub tries again without a line per attempt. If all attempts fail, this project's own error
    says so.
    """
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    if is_main():  # on stderr: the responses of inference/generate.py go to stdout
        print(f"{name} is no local path: looking it up on the Hugging Face hub", file=sys.stderr, flush=True)
