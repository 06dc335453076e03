"""Captions longer than the text encoder reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny as families
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from latentgen.core.errors import UserError
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model, save_model
from latentgen.models.chunks import fitted, pieces_of, words_of
from latentgen.models.text import chunks_needed, encode_text, tokenize, tokens_cut
from latentgen.models.words import add_token

WORDS = ["a", "red", "circle", "xyzzy", "don't", "blue,star", "<thing>", "é"]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    """12 tokens a piece, start and end included."""
    made = families.tokenizer()
    add_token(made, "<thing>", 3)
    return made


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(families.saved("sdxl", tmp_path_factory.mktemp("sdxl") / "model"))


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=9), max_size=12), st.integers(1, 8), st.integers(1, 4))
def test_pieces_are_whole_words_in_order(words: list[list[int]], room: int, chunks: int) -> None:
    flat = [token for word in words for token in word]
    pieces = pieces_of(words, room)
    assert [token for piece in pieces for token in piece] == flat
    assert all(len(piece) <= room for piece in pieces)
    borders = {sum(map(len, words[:n])) for n in range(len(words) + 1)}
    if all(len(word) <= room for word in words):
        assert {sum(map(len, pieces[:n])) for n in range(len(pieces) + 1)} <= borders
    kept, cut = fitted(words, room, chunks)
    assert [token for piece in kept for token in piece] + cut == flat
    assert len(kept) <= chunks
    assert not cut or len(kept[-1]) == room
    assert bool(cut) == (len(pieces) > chunks and sum(map(len, pieces[chunks - 1 :])) > room)


@settings(max_examples=50)
@given(st.lists(st.sampled_from(WORDS), max_size=30))
def test_chunks_read_every_token(tokenizer: CLIPTokenizer, picked: list[str]) -> None:
    caption = " ".join(picked)
    words = words_of(tokenizer, caption)
    needed = chunks_needed(tokenizer, caption)
    rows = tokenize(tokenizer, [caption], needed)[0].view(needed, 12)
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    inside = [token for row in rows.tolist() for token in row if token not in marks]
    assert inside == [token for word in words for token in word]
    assert tokens_cut(tokenizer, [caption], needed) == [0]
    if needed > 1:
        assert tokens_cut(tokenizer, [caption], needed - 1)[0] > 0
    more = tokenize(tokenizer, [caption], needed + 1)[0]
    assert torch.equal(more[: needed * 12], rows.flatten())
    assert torch.equal(more[needed * 12 :], tokenize(tokenizer, [""])[0]), "what is not needed is the empty caption"


def test_words_are_not_broken(tokenizer: CLIPTokenizer) -> None:
    assert [len(word) for word in words_of(tokenizer, "a <thing> xyzzy")] == [1, 3, 5]
    rows = tokenize(tokenizer, ["a a a a a a a a <thing> red"], 2)[0].view(2, 12)
    first = tokenizer.convert_tokens_to_ids("<thing>")
    assert (rows[0] == tokenizer.eos_token_id).nonzero()[0] == 9
    assert rows[1, 1] == first
    long = "x" * 60
    assert chunks_needed(tokenizer, long) == 6, "but one that fits nowhere"


def test_states_stand_side_by_side(tiny: Model) -> None:
    long = "a red circle picture a blue star picture one two three a red star"
    towers = tiny.towers
    assert chunks_needed(towers[0].tokenizer, long) == 2
    pieces = ["a red circle picture a blue star picture", "one two three a red star"]
    with torch.no_grad():
        whole = tiny.encode([long, "a red circle"], 2).states
        apart = encode_text(towers, pieces).states
        assert whole.shape == (2, 20, 16)
        torch.testing.assert_close(whole[0], apart.flatten(0, 1))
        torch.testing.assert_close(whole[1], encode_text(towers, ["a red circle", ""]).states.flatten(0, 1))


def test_two_towers_and_the_pooled_text(xl: Model) -> None:
    long = "a red circle a blue star a green heart blurry a red circle"
    with torch.no_grad():
        whole = xl.encode([long, ""], 2)
        apart = encode_text(xl.towers, ["a red circle a blue star a green heart blurry", "a red circle"])
    length = apart.states.shape[1]
    torch.testing.assert_close(whole.states[0, :length], apart.states[0])
    torch.testing.assert_close(whole.states[0, length:], apart.states[1])
    assert whole.pooled is not None
    assert apart.pooled is not None
    torch.testing.assert_close(whole.pooled[0], apart.pooled[0])
    assert xl.zero_empty
    assert not whole.states[1].any()


def test_a_model_reads_as_many_pieces_as_in_training(tiny_builder: Callable[..., Model], tmp_path: Path) -> None:
    model = replace(tiny_builder(), chunks=3)
    assert model.encode(["a"]).states.shape[1] == 30
    save_model(model, tmp_path / "model")
    assert load_model(tmp_path / "model").chunks == 3
    about = tmp_path / "model/latentgen.json"
    about.write_text(about.read_text().replace('"chunks": 3', '"chunks": 0'))
    with pytest.raises(UserError, match="chunks is 0"):
        load_model(tmp_path / "model")
