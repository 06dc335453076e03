"""The safetensors format, streamed: written from memory without a copy, and read from bytes that were checked.

The library's own `save_file` copies every tensor and holds Python's lock meanwhile, which would stop the training that
a checkpoint is written beside; its readers open the file anew, so that what they return need not be what was hashed.
The format: eight bytes with the header's length, the header in JSON, the tensors' bytes in the order of their offsets
(github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

TYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def encoded(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[memoryview]:
    """The bytes of a safetensors file: its header, then each tensor's own memory.

    Args:
        tensors: contiguous and on the CPU.
        metadata: free text by name, for the header.
    """
    names = {dtype: name for name, dtype in TYPES.items()}
    # Large items first: with the header a multiple of 8 long, each tensor then begins at a multiple of its item.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        value = tensors[name]
        assert value.is_contiguous()
        assert value.device.type == "cpu"
        end = at + value.numel() * value.itemsize
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        if tensors[name].numel():
            yield tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data


def decoded(content: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in the bytes `[n]` uint8 of a safetensors file, sharing their memory; and the metadata.

    Raises:
        ValueError: these are not the bytes of such a file.
    """
    try:
        length = int.from_bytes(content[:8].numpy().tobytes(), "little")
        header = json.loads(content[8 : 8 + length].numpy().tobytes())
        metadata = header.pop("__metadata__", {})
        body = content[8 + length :]
        return {name: _tensor(body, **entry) for name, entry in header.items()}, metadata
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"not a safetensors file: {error}") from error


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a number that is not finite; waits for their devices, once each."""
    named = {name: value for name, value in tensors.items() if value.is_floating_point() and value.numel()}
    devices = {value.device for value in named.values()}
    found: set[str] = set()
    for device in devices:
        own = {name: value for name, value in named.items() if value.device == device}
        # The largest magnitude is not finite where one number is not: one number for each tensor, read together.
        fine = torch.stack([value.detach().abs().amax().isfinite() for value in own.values()]).tolist()
        found.update(name for name, good in zip(own, fine, strict=True) if not good)
    return [name for name in named if name in found]


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise `FloatingPointError` unless every number is finite; `what` is refused ("the model folder m")."""
    bad = not_finite(tensors)
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise FloatingPointError(f"{what} is refused: {', '.join(bad[:3])}{more} not finite")


def _tensor(body: Tensor, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    kind, (start, stop) = TYPES[dtype], data_offsets
    if not 0 <= start <= stop <= body.numel() or stop - start != math.prod(shape) * kind.itemsize:
        raise ValueError("a tensor's size is not that of its bytes")
    part = body[start:stop]
    if part.storage_offset() % kind.itemsize:  # other programs may leave tensors where they fall
        part = part.clone()
    return part.view(kind).view(shape)
