"""Words that text encoders learn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny as families
import torch

from latentgen.core.errors import UserError
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model
from latentgen.models.text import encode_text, tokenize
from latentgen.models.tokens import LearnedTokens, grow, put, rows_of, settled
from latentgen.models.words import add_embedding

WORDS = {"<thing>": ("circle", 2), "<other>": ("", 1)}


@pytest.fixture
def grown(tiny_builder: Callable[..., Model]) -> tuple[Model, LearnedTokens]:
    model = tiny_builder()
    learned = grow(model.towers, WORDS)
    return replace(model, tokens=learned), learned


def test_words_begin_as_what_they_start_from(grown: tuple[Model, LearnedTokens]) -> None:
    model, learned = grown
    tower = model.towers[0]
    rows = learned()["text_encoder"]
    known = tower.encoder.get_input_embeddings().known
    ids = tower.tokenizer("circle", add_special_tokens=False).input_ids
    assert torch.equal(rows[0], known.weight[ids[0]])
    torch.testing.assert_close(rows[2], known.weight.mean(dim=0))
    assert rows.shape == (3, 16)
    assert rows.requires_grad


def test_known_words_are_read_as_before(grown: tuple[Model, LearnedTokens], tiny_builder: Callable[..., Model]) -> None:
    captions = ["a red circle", ""]
    with torch.no_grad():
        before, after = tiny_builder().encode(captions), grown[0].encode(captions)
    assert torch.equal(before.states, after.states)


def test_a_word_takes_as_many_places_as_it_has_vectors(grown: tuple[Model, LearnedTokens]) -> None:
    tokenizer = grown[0].towers[0].tokenizer
    ids = tokenize(tokenizer, ["a <thing>", "a <other>"])
    first, rest, other = (tokenizer.convert_tokens_to_ids(word) for word in ("<thing>", "<thing>_1", "<other>"))
    assert ids[0, 2:4].tolist() == [first, rest]
    assert ids[1, 2].item() == other


def test_gradients_reach_the_words_and_nothing_else(grown: tuple[Model, LearnedTokens]) -> None:
    model, learned = grown
    assert not any(
        parameter is row for parameter in model.towers[0].encoder.parameters() for row in learned.parameters()
    )
    for parameter in model.towers[0].encoder.parameters():
        parameter.requires_grad_(False)
    model.encode(["a red <thing>"]).states.square().sum().backward()
    grad = learned.rows["text_encoder"].grad
    assert grad is not None
    assert bool((grad[:2] != 0).any(dim=1).all())
    assert not grad[2].any(), "this word was not said"
    assert all(parameter.grad is None for parameter in model.towers[0].encoder.parameters())


def test_finished_words_are_rows_like_all_others(grown: tuple[Model, LearnedTokens]) -> None:
    """In a copy with more rows, and in a model to which the vectors are added from a file: the same states."""
    model, learned = grown
    with torch.no_grad():
        learned.rows["text_encoder"].normal_(generator=torch.Generator().manual_seed(0))
        expected = model.encode(["a red <thing>", "a blue <other> <thing>"]).states
        words = rows_of({word: count for word, (_, count) in WORDS.items()}, learned()["text_encoder"])
        tower = settled(model.towers[0], words)
        assert torch.equal(encode_text([tower], ["a red <thing>", "a blue <other> <thing>"]).states, expected)
    assert tower.encoder.config.vocab_size == len(tower.tokenizer)


def test_words_added_from_vectors_are_the_learned_ones(
    grown: tuple[Model, LearnedTokens], tiny_builder: Callable[..., Model]
) -> None:
    model, learned = grown
    words = rows_of({word: count for word, (_, count) in WORDS.items()}, learned()["text_encoder"])
    other = tiny_builder()
    for word, vectors in words.items():
        add_embedding(other.towers[0].tokenizer, other.towers[0].encoder, word, vectors)
    with torch.no_grad():
        prompts = ["a red <thing>", "a <other>"]
        assert torch.equal(other.encode(prompts).states, model.encode(prompts).states)


def test_the_whole_text_is_pooled_at_its_end(tmp_path) -> None:
    """Configurations of old look for the highest id, which a new word has."""
    model = load_model(families.saved("sdxl", tmp_path / "model"))
    for tower in model.towers:
        tower.encoder.config.eos_token_id = 2
        for module in tower.encoder.modules():
            if "eos_token_id" in vars(module):
                module.eos_token_id = 2
    with torch.no_grad():
        before = model.encode(["a blue star"]).pooled
        learned = grow(model.towers, {"<thing>": ("star", 1)})
        whole = replace(model, tokens=learned)
        assert before is not None
        after, said = whole.encode(["a blue star"]).pooled, whole.encode(["a blue <thing>"]).pooled
    assert after is not None
    assert said is not None
    assert torch.equal(before, after)
    torch.testing.assert_close(said, before)  # it begins as the word it starts from


@pytest.mark.parametrize(
    ("word", "start", "message"),
    [
        ("circle", "star", "token circle is taken; choose another, such as <circle-2>"),
        ("two words", "star", "cannot be one: use a word without spaces"),
        ("", "star", "cannot be one"),
    ],
)
def test_refused(word: str, start: str, message: str, tiny_builder: Callable[..., Model]) -> None:
    model = tiny_builder()
    known = copy.deepcopy(model.towers[0].tokenizer.get_vocab())
    with pytest.raises(UserError, match=message):
        grow(model.towers, {word: (start, 1)})
    assert model.towers[0].tokenizer.get_vocab() == known


def test_rows_are_put_into_grown_encoders_only(tiny_builder: Callable[..., Model]) -> None:
    model = tiny_builder()
    with pytest.raises(AssertionError):
        put({"text_encoder": torch.zeros(1, 16)}, {"text_encoder": model.towers[0].encoder})
