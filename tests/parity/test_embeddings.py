"""Learned tokens that we write, in diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from latentgen.formats.embeddings import Embedding, write_embedding
from latentgen.models.text import Tower, encode_text
from latentgen.models.words import add_embedding


@pytest.mark.parametrize("count", [1, 3])
def test_our_tokens_in_diffusers(count: int, tmp_path: Path) -> None:
    vectors = torch.randn(count, 32, generator=torch.Generator().manual_seed(2))
    write_embedding(Embedding("<cat>", {"text_encoder": vectors}), tmp_path / "a.safetensors")
    theirs, ours = tiny.make("sd1"), tiny.make("sd1")
    theirs.load_textual_inversion(tmp_path, weight_name="a.safetensors")
    add_embedding(ours.tokenizer, ours.text_encoder, "<cat>", vectors)
    prompt = "a red <cat> circle"
    wanted, _ = theirs.encode_prompt(prompt, "cpu", 1, False)
    made = encode_text([Tower("text_encoder", ours.text_encoder, ours.tokenizer)], [prompt]).states
    assert torch.equal(made, wanted)
