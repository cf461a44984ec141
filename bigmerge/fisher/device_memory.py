"""Too little memory on a device, as one of our errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bigmerge.errors import ResourceError


@contextmanager
def device_memory(what: str) -> Iterator[None]:
    """Within the block, too little memory on the device is one clear error about `what`.

    Raises:
        ResourceError: there is too little.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"the device's memory does not hold {what}",
            hint="use a smaller --batch-size, --memory or --max-length, or --cpu",
        ) from error
