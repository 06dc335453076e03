"""Adapter folders: every word and every LoRA has a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from made import assert_same_file

from latentgen.formats.adapter_folder import read_adapter, write_adapter
from latentgen.formats.embeddings import read_embedding
from latentgen.formats.lora.file import read_lora, trained_lora
from latentgen.formats.model import Model
from latentgen.models.adapters import AdapterSpec, add_adapters

WORDS = ("<rex>", "<Rex>", "<rex-kohya>", "<*>", "<+>")


def test_words_and_matrices_of_one_name_do_not_share_a_file(tiny_builder: Callable[..., Model], tmp_path: Path) -> None:
    model, plain = tiny_builder(), tiny_builder()
    networks = {"unet": model.unet}
    add_adapters(networks, AdapterSpec(rank=2))
    lora = trained_lora(networks)
    words = {word: {"text_encoder": torch.full((1, 16), float(n))} for n, word in enumerate(WORDS)}
    write_adapter(
        tmp_path / "adapter",
        "rex",
        plain,
        lora,
        words,
        layouts=("diffusers", "kohya"),
        base="model",
        unet_sha256="",
        metadata={},
    )
    again = read_adapter(tmp_path / "adapter")
    assert again.lora is not None
    assert_same_file(read_lora(again.lora, {"unet": plain.unet}), lora)
    assert set(again.embeddings) == set(WORDS)
    names = [file.name.lower() for file in (tmp_path / "adapter").iterdir()]
    assert len(set(names)) == len(names) == 1 + 2 + len(WORDS), "also where upper and lower case are one"
    for word, file in again.embeddings.items():
        assert torch.equal(read_embedding(file, word).vectors["text_encoder"], words[word]["text_encoder"])
