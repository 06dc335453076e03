"""The tokenizer: deterministic, in CLIP's layout, and the same after saving."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentgen.core.errors import UserError
from latentgen.models import text

CAPTIONS = [
    f"a {size} {colour} {shape}, {place} the Square"
    for size, colour, shape, place in itertools.product(
        ("large", "small"), ("red", "blue", "grün"), ("circle", "star"), ("above", "left of")
    )
]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return text.train_tokenizer(CAPTIONS, 560, 12)


def test_words_of_the_captions_become_single_tokens(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.tokenize("a large Grün circle") == ["a</w>", "large</w>", "grÃ¼n</w>", "circle</w>"]


def test_layout_is_that_of_clip(tokenizer: CLIPTokenizer) -> None:
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(len(tokenizer)))
    assert vocab["!"] == 0
    assert vocab["!</w>"] == 256
    assert tokenizer.bos_token_id == len(tokenizer) - 2
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 12


@settings(max_examples=15)
@given(st.randoms(use_true_random=False))
def test_order_of_captions_does_not_matter(random) -> None:
    shuffled = CAPTIONS.copy()
    random.shuffle(shuffled)
    first, second = text.train_tokenizer(CAPTIONS, 540, 12), text.train_tokenizer(iter(shuffled), 540, 12)
    assert first.get_vocab() == second.get_vocab()
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_ties_are_pinned() -> None:
    # Every pair of these words occurs twice; the order must not depend on the process or the version.
    made = text.train_tokenizer(["dc ba", "dc ba"], 600, 8)
    learned = sorted(made.get_vocab().items(), key=lambda item: item[1])[512:-2]
    assert [token for token, _ in learned] == ["ba</w>", "dc</w>"]


def test_frequency_counts() -> None:
    made = text.train_tokenizer(["zz", "zz", "zz", "ab", "ab"], 515, 8)
    assert "zz</w>" in made.get_vocab()
    assert "ab</w>" not in made.get_vocab()


@settings(max_examples=60)
@given(st.text(max_size=40))
def test_any_text_survives_as_bytes(caption: str) -> None:
    made = _module_tokenizer()
    if any(special in caption.lower() for special in (text.START, text.END)):
        return
    ids = made(caption).input_ids
    assert ids[0] == made.bos_token_id
    assert ids[-1] == made.eos_token_id
    assert all(0 <= token < len(made) for token in ids)
    normal = made.backend_tokenizer.normalizer.normalize_str(caption)
    decoded = made.decode(ids, skip_special_tokens=True)
    assert "".join(decoded.split()) == "".join(normal.split())


_CACHE: list[CLIPTokenizer] = []


def _module_tokenizer() -> CLIPTokenizer:
    if not _CACHE:
        _CACHE.append(text.train_tokenizer(CAPTIONS, 560, 12))
    return _CACHE[0]


def test_saving_and_loading_offline_keeps_every_id(tokenizer: CLIPTokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    unseen = ["", "Ωmega ☃ it's 42!", " ".join(["blue"] * 40), *CAPTIONS]
    assert again.model_max_length == 12
    assert len(again) == len(tokenizer)
    assert torch.equal(text.tokenize(again, unseen), text.tokenize(tokenizer, unseen))


def test_tokenize_gives_what_the_pipeline_gives(tokenizer: CLIPTokenizer) -> None:
    captions = ["", "a red star", " ".join(["blue"] * 40), "a red star, left of the square " * 3]
    expected = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    ours = text.tokenize(tokenizer, captions)
    assert ours.dtype == torch.int64
    assert torch.equal(ours, expected)
    assert text.tokenize(tokenizer, []).shape == (0, 12)


def test_cut_tokens_are_counted_and_shown(tokenizer: CLIPTokenizer) -> None:
    long = " ".join(["blue"] * 14 + ["star"])
    assert text.tokens_cut(tokenizer, ["blue", long]) == [0, 5]
    assert text.shown(tokenizer, text.cut_tokens(tokenizer, [long])[0]) == "blue blue blue blue star"
    assert text.shown(tokenizer, text.cut_tokens(tokenizer, [long])[0], 12) == "blue blue..."


def test_encode_text_is_the_normalised_last_hidden_state(tokenizer: CLIPTokenizer) -> None:
    torch.manual_seed(0)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()
    with torch.no_grad():
        context = text.encode_text([text.Tower("text_encoder", encoder, tokenizer)], ["a red star", "blue"]).states
        hidden = encoder(text.tokenize(tokenizer, ["a red star", "blue"]), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(context, encoder.final_layer_norm(hidden))
    assert context.shape == (2, 12, 16)


def test_wrong_numbers_are_named() -> None:
    with pytest.raises(UserError, match="514"):
        text.train_tokenizer(CAPTIONS, 300, 12)
    with pytest.raises(UserError, match="max_length"):
        text.train_tokenizer(CAPTIONS, 600, 2)
    with pytest.raises(UserError, match="no captions"):
        text.train_tokenizer([], 600, 12)
