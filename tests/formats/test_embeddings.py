from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from latentgen.core.errors import UserError
from latentgen.formats.embeddings import Embedding, read_embedding, write_embedding
from latentgen.models.text import tokenize
from latentgen.models.words import add_embedding, expand_prompt, learned_vectors


def make(kind: type = CLIPTextModel) -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    return tokenizer, kind(tiny.text_config(tokenizer, 16)).eval()


ONE = Embedding("<cat>", {"text_encoder": torch.randn(3, 16)})
TWO = Embedding("<cat>", {"text_encoder": torch.randn(2, 16), "text_encoder_2": torch.randn(2, 24)})


@pytest.mark.parametrize(
    ("embedding", "layout", "keys"),
    [
        (ONE, "diffusers", {"<cat>"}),
        (ONE, "a1111", {"emb_params"}),
        (TWO, "a1111", {"clip_l", "clip_g"}),
    ],
)
def test_what_is_written_is_read_bit_for_bit(embedding: Embedding, layout: str, keys: set[str], tmp_path: Path) -> None:
    write_embedding(embedding, tmp_path / "cat.safetensors", layout)
    assert load_file(tmp_path / "cat.safetensors").keys() == keys
    again = read_embedding(tmp_path / "cat.safetensors")
    assert again.token == "<cat>"
    assert again.vectors.keys() == embedding.vectors.keys()
    assert all(torch.equal(again.vectors[name], value) for name, value in embedding.vectors.items())
    assert read_embedding(tmp_path / "cat.safetensors", "<dog>").token == "<dog>"


def test_one_vector_without_a_row(tmp_path: Path) -> None:
    save_file({"<cat>": torch.ones(16)}, tmp_path / "a.safetensors")
    assert read_embedding(tmp_path / "a.safetensors").vectors["text_encoder"].shape == (1, 16)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for tensors, said in (
        ({"a": torch.ones(2), "b": torch.ones(2)}, "which has one tensor or clip_l and clip_g; it has a, b"),
        ({"a": torch.ones(2, 2, 2)}, r"a tensor of shape \[2, 2, 2\]"),
        ({"a": torch.ones(2, 2, dtype=torch.int64)}, "int64"),
    ):
        save_file(tensors, path)
        with pytest.raises(UserError, match=said):
            read_embedding(path)
    with pytest.raises(UserError, match="one text tower, <cat> is of two; use a1111"):
        write_embedding(TWO, path)
    with pytest.raises(UserError, match='layout "pt" is unknown; use diffusers or a1111'):
        write_embedding(ONE, path, "pt")
    with pytest.raises(FloatingPointError):
        write_embedding(Embedding("x", {"text_encoder": torch.full((1, 2), torch.nan)}), tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_token_takes_as_many_places_as_it_has_vectors(kind: type, dtype: torch.dtype) -> None:
    tokenizer, encoder = make(kind)
    encoder.to(dtype)
    before = tokenize(tokenizer, ["a red circle"])
    old = encoder.get_input_embeddings().weight.clone()
    state = torch.get_rng_state()
    add_embedding(tokenizer, encoder, "<cat>", ONE.vectors["text_encoder"])
    add_embedding(tokenizer, encoder, "<dog>", torch.ones(1, 16))
    assert torch.equal(torch.get_rng_state(), state)
    weight = encoder.get_input_embeddings().weight
    assert weight.dtype == dtype
    assert torch.equal(weight[: len(old)], old)
    assert len(weight) == len(tokenizer) == encoder.config.vocab_size
    assert torch.equal(tokenize(tokenizer, ["a red circle"]), before)
    assert expand_prompt(tokenizer, "a <cat>, a <dog>") == "a <cat> <cat>_1 <cat>_2, a <dog>"
    ids = tokenize(tokenizer, ["a <cat> star"])[0].tolist()
    places = [i for i in ids if i >= len(old)]
    assert places == [len(old), len(old) + 1, len(old) + 2]
    assert torch.equal(weight[places], ONE.vectors["text_encoder"].to(dtype))
    assert torch.equal(learned_vectors(tokenizer, encoder, "<cat>"), ONE.vectors["text_encoder"].to(dtype))
    assert encoder(input_ids=torch.tensor([ids])).last_hidden_state.isfinite().all()


def test_prompts_are_expanded_as_by_diffusers() -> None:
    tokenizer, encoder = make()
    add_embedding(tokenizer, encoder, "<cat>", torch.ones(3, 16))
    add_embedding(tokenizer, encoder, "<dog>", torch.ones(2, 16))
    for prompt in ("a red circle", "<cat>", "a <dog> and a <cat> and a <dog>", "a<cat>star", "a < cat >"):
        theirs = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
        assert expand_prompt(tokenizer, prompt) == theirs
    assert expand_prompt(tokenizer, "<cat>_1 alone") == "<cat>_1 alone"


def test_rows_that_a_network_had_to_spare_are_used() -> None:
    tokenizer = tiny.tokenizer()
    config = tiny.text_config(tokenizer, 16)
    config.vocab_size += 8
    encoder = CLIPTextModel(config)
    add_embedding(tokenizer, encoder, "<cat>", torch.ones(2, 16))
    assert len(encoder.get_input_embeddings().weight) == len(tokenizer) + 6
    assert torch.equal(learned_vectors(tokenizer, encoder, "<cat>"), torch.ones(2, 16))


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_old_configurations_pool_at_the_end_and_not_at_the_new_token(kind: type) -> None:
    tokenizer, encoder = make(kind)
    core = encoder.text_model if kind is CLIPTextModelWithProjection else encoder
    core.eos_token_id = encoder.config.eos_token_id = 2
    ids = tokenize(tokenizer, ["a red circle"])

    def pooled(ids: torch.Tensor) -> torch.Tensor:
        out = core(input_ids=ids)
        return out.pooler_output

    before = pooled(ids)
    add_embedding(tokenizer, encoder, "<cat>", torch.ones(1, 16))
    assert torch.equal(pooled(ids), before)
    ids = tokenize(tokenizer, ["a <cat> circle"])
    end = ids[0].tolist().index(tokenizer.eos_token_id)
    assert torch.equal(pooled(ids)[0], core(input_ids=ids).last_hidden_state[0, end])


def test_what_is_taken_or_does_not_fit_is_refused() -> None:
    tokenizer, encoder = make()
    add_embedding(tokenizer, encoder, "<cat>", torch.ones(2, 16))
    size = len(tokenizer)
    for token, vectors, said in (
        ("<cat>", torch.ones(1, 16), "token <cat> is taken; choose another, such as <cat-2>"),
        ("<|endoftext|>", torch.ones(1, 16), "is taken"),
        ("<dog>", torch.ones(1, 8), r"vectors \[1, 8\] for a text encoder of width 16; it is for another model"),
        ("<dog>", torch.ones(0, 16), "vectors"),
        ("a dog", torch.ones(1, 16), "without spaces"),
        ("", torch.ones(1, 16), "without spaces"),
    ):
        with pytest.raises(UserError, match=said):
            add_embedding(tokenizer, encoder, token, vectors)
    tokenizer.add_tokens(["<dog>_1"])
    with pytest.raises(UserError, match="token <dog>_1 is taken"):
        add_embedding(tokenizer, encoder, "<dog>", torch.ones(1, 16))
    with pytest.raises(UserError, match="was not added"):
        learned_vectors(tokenizer, encoder, "<mouse>")
    assert len(tokenizer) == size + 1
    assert len(encoder.get_input_embeddings().weight) == size
