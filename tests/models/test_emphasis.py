"""Brackets that say how much words count."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny as families
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model
from latentgen.models.chunks import words_of
from latentgen.models.emphasis import SQUARE, encode_prompts, parse, plain, prompt_chunks, tokenize_prompts
from latentgen.models.text import encode_text, tokenize
from latentgen.models.words import add_token


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    made = families.tokenizer()
    add_token(made, "<thing>", 2)
    add_token(made, "[odd]")
    return made


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a red circle", [("a red circle", 1)]),
        ("a (red) circle", [("a ", 1), ("red", 1.1), (" circle", 1)]),
        ("a (red:1.3) circle", [("a ", 1), ("red", 1.3), (" circle", 1)]),
        ("(a: .5 )", [("a", 0.5)]),
        ("(a:-1)", [("a", -1)]),
        ("(a:0)", [("a", 0)]),
        ("[a]", [("a", SQUARE)]),
        ("((a))", [("a", 1.21)]),
        ("(a [b] (c:2):2)", [("a ", 2), ("b", 2 * SQUARE), (" ", 2), ("c", 4)]),
        ("(a)(b)", [("a", 1.1), ("b", 1.1)]),
        (r"\(a\) \[b\] \\", [(r"(a) [b] " + "\\", 1)]),
        (r"(a\))", [("a)", 1.1)]),
        ("a smile :) and (", [("a smile :) and (", 1)]),
        ("(a", [("(a", 1)]),
        ("(a]", [("(a]", 1)]),
        ("([a)]", [("[a", 1.1), ("]", 1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("[a:1.3]", [("a:1.3", SQUARE)]),
        ("a:1.3) 3:4", [("a:1.3) 3:4", 1)]),
        ("()", []),
    ],
)
def test_what_brackets_mean(prompt: str, expected: list[tuple[str, float]]) -> None:
    runs = parse(prompt)
    assert [run.text for run in runs] == [text for text, _ in expected]
    assert [run.weight for run in runs] == pytest.approx([weight for _, weight in expected])


@given(st.text("ab ()[]:\\.1", max_size=20))
def test_nothing_but_brackets_and_numbers_is_taken_out(prompt: str) -> None:
    assert all(run.text for run in parse(prompt))
    letters = [sign for sign in prompt if sign in "ab"]
    assert [sign for sign in plain(prompt) if sign in "ab"] == letters


@given(st.text(st.characters(exclude_characters="()[]\\", exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_text_without_brackets_is_itself(prompt: str) -> None:
    assert [(run.text, run.weight) for run in parse(prompt)] == [(prompt, 1.0)]


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["red", "a blue star", "x-ray, don't", "<thing>", "7up"]),
            st.sampled_from([None, "1.3", "0.5", "round", "square"]),
        ),
        max_size=8,
    ),
    st.integers(1, 3),
)
def test_weighted_words_are_the_tokens_of_plain_ones(
    tokenizer: CLIPTokenizer, words: list[tuple[str, str | None]], chunks: int
) -> None:
    forms = {None: "{}", "round": "({})", "square": "[{}]"}
    marked = " ".join(forms.get(weight, f"({{}}:{weight})").format(word) for word, weight in words)
    text = " ".join(word for word, _ in words)
    assert plain(marked) == text
    ids, weights = tokenize_prompts(tokenizer, [marked], chunks)
    assert torch.equal(ids, tokenize(tokenizer, [text], chunks))
    values = {None: 1.0, "round": 1.1, "square": SQUARE}
    each = [
        values.get(weight, 0.0) or float(weight or 1)
        for word, weight in words
        for tokens in words_of(tokenizer, word)
        for _ in tokens
    ]
    room = tokenizer.model_max_length - 2
    if len(each) <= room:
        torch.testing.assert_close(weights[0, 1 : len(each) + 1], torch.tensor(each))
    marks = (ids == tokenizer.bos_token_id) | (ids == tokenizer.eos_token_id)
    assert (weights[marks] == 1).all()


def test_learned_words(tokenizer: CLIPTokenizer) -> None:
    ids, weights = tokenize_prompts(tokenizer, ["a (<thing>:2) [odd]"])
    known = [tokenizer.convert_tokens_to_ids(name) for name in ("<thing>", "<thing>_1", "[odd]")]
    assert ids[0, 2:5].tolist() == known
    assert weights[0, 2:5].tolist() == [2, 2, 1]
    assert prompt_chunks(tokenizer, "(<thing>) " * 6) == 2


@pytest.mark.parametrize("chunks", [1, 2])
@torch.no_grad()
def test_states_go_from_those_of_nothing(chunks: int, tiny: Model) -> None:
    prompts = ["a (red:1.5) [circle]", "a blue star"]
    states = tiny.encode(prompts, chunks, emphasis=True).states
    before = tiny.encode(["a red circle", "a blue star"], chunks).states
    nothing = tiny.encode([""], chunks).states[0]
    for place, weight in ((2, 1.5), (3, SQUARE)):
        torch.testing.assert_close(states[0, place], nothing[place] + weight * (before[0, place] - nothing[place]))
    others = [place for place in range(states.shape[1]) if place not in (2, 3)]
    assert torch.equal(states[0, others], before[0, others])
    assert torch.equal(states[1], before[1])
    torch.testing.assert_close(tiny.encode(["(a red circle:0)"], emphasis=True).states[0, 1:4], nothing[1:4])


@torch.no_grad()
def test_plain_prompts_have_the_states_of_captions(tiny: Model) -> None:
    prompts = ["a red circle", "", "a :) star", "three, two; one. " * 9, "(a:1.0) red"]
    captions = [*prompts[:4], "a red"]
    assert torch.equal(encode_prompts(tiny.towers, prompts, 2).states, encode_text(tiny.towers, captions, 2).states)


@torch.no_grad()
def test_brackets_of_captions_are_signs(tiny: Model) -> None:
    assert torch.equal(
        tiny.encode(["a (red:1.5) circle"]).states, encode_text(tiny.towers, ["a (red:1.5) circle"]).states
    )
    assert not torch.equal(tiny.encode(["a (red) circle"]).states, tiny.encode(["a red circle"]).states)


@torch.no_grad()
def test_two_towers(tmp_path: Path) -> None:
    model = load_model(families.saved("sdxl", tmp_path / "model"))
    weighed, before = model.encode(["a (red:2) circle", "()"], emphasis=True), model.encode(["a red circle", ""])
    nothing = encode_text(model.towers, [""]).states[0]
    torch.testing.assert_close(weighed.states[0, 2], 2 * before.states[0, 2] - nothing[2])
    assert weighed.pooled is not None
    assert before.pooled is not None
    assert torch.equal(weighed.pooled[0], before.pooled[0])
    assert not weighed.states[1].any(), "no text is zeros to this model"
