"""Our safetensors are the library's, both ways; what is no such file is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save
from torch import Tensor

from latentgen.core.files import read_file, write_file
from latentgen.core.tensors import TYPES, decoded, encoded

names = st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 3), max_size=3)


def content(parts) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def filled(shape: list[int], kind: str) -> Tensor:
    raw = torch.randint(0, 2, (torch.Size(shape).numel() * TYPES[kind].itemsize,), dtype=torch.uint8)
    return raw.view(TYPES[kind]).view(shape)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype
        and value.shape == second[name].shape
        and torch.equal(value.reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8))
        for name, value in first.items()
    )


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, st.tuples(shapes, st.sampled_from(sorted(TYPES))), max_size=5))
def test_each_reads_what_the_other_writes(layout: dict[str, tuple[list[int], str]]) -> None:
    tensors = {name: filled(*form) for name, form in layout.items()}
    ours = b"".join(encoded(tensors, {"rows": "{}"}))
    assert same(load(ours), tensors)
    found, metadata = decoded(content([ours]))
    assert same(found, tensors)
    assert metadata == {"rows": "{}"}
    theirs, metadata = decoded(content([save(tensors)]))
    assert same(theirs, tensors)
    assert metadata == {}


def test_a_file_and_no_copy(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(True)}
    write_file(tmp_path / "x.safetensors", encoded(tensors))
    assert same(load_file(tmp_path / "x.safetensors"), tensors)
    read = read_file(tmp_path / "x.safetensors")
    found, _ = decoded(read)
    first, last = read.data_ptr(), read.data_ptr() + read.numel()
    assert all(first < value.data_ptr() < last for value in found.values()), "the bytes that were hashed, no others"


WHOLE = b"".join(encoded({"a": torch.ones(2)}))


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        WHOLE[:5],
        WHOLE[:-1],
        WHOLE[:20],
        b"\xff" * 8 + WHOLE[8:],
        WHOLE.replace(b'"F32"', b'"F99"'),
        WHOLE.replace(b'"shape":[2]', b'"shape":[9]'),
        WHOLE.replace(b'"data_offsets"', b'"data_offzets"'),
        WHOLE.replace(b"[0,8]", b"[9,8]"),
        WHOLE.replace(b"{", b"[", 1),
    ],
)
def test_what_is_no_such_file_is_refused(bad: bytes) -> None:
    assert bad != WHOLE
    with pytest.raises(ValueError, match="not a safetensors file"):
        decoded(torch.frombuffer(bytearray(bad), dtype=torch.uint8) if bad else torch.empty(0, dtype=torch.uint8))
