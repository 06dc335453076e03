"""The types that weights are stored in, by the names that people say."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from latentgen.core.errors import UserError

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_of(name: str | None) -> torch.dtype | None:
    """The type of that name; None stays None.

    Raises:
        UserError: no type of that name.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise UserError(f"--dtype {name} is unknown; it is one of {', '.join(DTYPES)}")
    return DTYPES[name]
