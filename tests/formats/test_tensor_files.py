"""Files that people have: safetensors and pickles, whole, half and hostile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentgen.core.errors import UserError
from latentgen.formats.headers import file_hashes, read_header
from latentgen.formats.tensor_files import convert_pickle, header_of, read_tensors

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


class Hostile:
    """A pickle that would run a command when it is opened."""

    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth"])
@pytest.mark.parametrize("wrap", [None, "state_dict"])
def test_pickles_are_refused_with_the_command_and_opened_when_allowed(suffix, wrap, tmp_path: Path) -> None:
    path = tmp_path / f"old{suffix}"
    torch.save({wrap: TENSORS, "epoch": 3} if wrap else TENSORS, path)
    with pytest.raises(UserError, match="--allow-pickle") as caught:
        read_tensors(path)
    command = str(caught.value).split("with: ")[1]
    assert command == f"latentgen import {path} {path.with_suffix('.safetensors')} --allow-pickle"
    header, tensors = read_tensors(path, allow_pickle=True)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], value) for key, value in TENSORS.items())
    assert header.tensors == header_of(TENSORS).tensors
    assert convert_pickle(path, tmp_path / "new.safetensors", allow_pickle=True) == 2
    assert all(torch.equal(value, TENSORS[key]) for key, value in load_file(tmp_path / "new.safetensors").items())


def test_a_pickle_with_more_than_tensors_runs_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": TENSORS, "hook": Hostile()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="refused") as caught:
        read_tensors(tmp_path / "evil.ckpt", allow_pickle=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hostile-was-here").exists()


def test_learned_words_of_old_pickles_become_their_tensor(tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": torch.ones(2, 768)}, "name": "cat"}, tmp_path / "cat.pt")
    _, tensors = read_tensors(tmp_path / "cat.pt", allow_pickle=True)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {"emb_params": (2, 768)}


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    (tmp_path / "short.ckpt").write_bytes(b"\x80\x02")
    (tmp_path / "photo.jpg").write_bytes(b"x")
    (tmp_path / "model.safetensors.incomplete").write_bytes(b"x")
    for name, said in (
        ("none.pt", "no tensors"),
        ("short.ckpt", "cut off"),
        ("photo.jpg", "no model file"),
        ("model.safetensors", "half download model.safetensors.incomplete"),
        ("model.safetensors.incomplete", "half a download"),
        ("nowhere.safetensors", "there is no file"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            read_tensors(tmp_path / name, allow_pickle=True)
        assert "\n" not in str(caught.value)


def test_converting_what_is_converted_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="already"):
        convert_pickle(tmp_path / "a.safetensors", tmp_path / "b.safetensors", allow_pickle=True)


def test_the_header_says_names_shapes_types_and_text(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors", {"ss_steps": "9"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.tensors == {"a.weight": ((2, 3), "F32"), "b": ((4,), "F16")}
    assert header.metadata == {"ss_steps": "9"}


def test_hashes_of_the_tensors_do_not_change_with_the_text(tmp_path: Path) -> None:
    """Known to sites: SHA-256 of the file, of its tensors, and of 64 KiB from the second MiB on."""
    import hashlib

    tensors = {"a": torch.arange(400_000, dtype=torch.float32)}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors", {"words": "more"})
    one, other = file_hashes(tmp_path / "a.safetensors"), file_hashes(tmp_path / "b.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    assert one.sha256 == hashlib.sha256(content).hexdigest() != other.sha256
    assert one.tensors == other.tensors == hashlib.sha256(tensors["a"].numpy().tobytes()).hexdigest()
    assert one.autov1 == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert (one.autov2, one.autov3) == (one.sha256[:10], one.tensors[:12])
