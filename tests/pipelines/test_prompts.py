"""Long prompts and weighed words, from a request to the U-Net."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.formats.model import Model
from latentgen.pipelines.generate import Request, check, generate, parameters_line, prepare, remarks
from latentgen.pipelines.prompts import chunks_of

LONG = "a red circle, a blue star, one two three, a red star, a blue circle, one"


def ask(prompt: str = "a red circle", **changes: Any) -> Request:
    return Request(prompt, **{"num_inference_steps": 2, "height": 16, "width": 16, **changes})


@pytest.fixture
def seen(tiny_builder: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> tuple[Model, list[torch.Tensor]]:
    """A model, and the text states that its U-Net is shown."""
    model, contexts = tiny_builder(), []
    forward = model.unet.forward

    def spy(sample: torch.Tensor, time: torch.Tensor, encoder_hidden_states: torch.Tensor, **rest: Any) -> Any:
        contexts.append(encoder_hidden_states)
        return forward(sample, time, encoder_hidden_states=encoder_hidden_states, **rest)

    monkeypatch.setattr(model.unet, "forward", spy)
    return model, contexts


def drawn(model: Model, *requests: Request) -> list[Any]:
    return [np.asarray(picture) for picture in generate(model, requests)]


def test_texts_take_the_pieces_that_the_longest_needs(tiny: Model) -> None:
    assert chunks_of(ask(), tiny) == 1
    assert chunks_of(ask(LONG), tiny) == 3
    assert chunks_of(ask(negative_prompt=LONG), tiny) == 3
    assert chunks_of(ask(LONG, chunks=2), tiny) == 2
    assert chunks_of(ask("word " * 200), tiny) == 8
    assert chunks_of(ask(f"a star AND {LONG}:0.5", guidance=("compose",)), tiny) == 3
    assert chunks_of(ask("((((red))))"), tiny) == 1
    assert chunks_of(ask("(a) (b) (c) (d)", emphasis=False), tiny) > 1
    trained = dataclasses.replace(tiny, chunks=3)
    assert chunks_of(ask(), trained) == 3
    assert chunks_of(ask(chunks=1), trained) == 1


def test_a_picture_does_not_depend_on_its_neighbours_words(seen: tuple[Model, list[torch.Tensor]]) -> None:
    model, contexts = seen
    requests = [ask(), ask(LONG), ask("a star", negative_prompt=LONG), ask(seed=1)]
    together = drawn(model, *requests)
    assert [len(c[0]) for c in contexts] == [10] * 2 + [30] * 2 + [10] * 2
    for picture, own in zip(together, requests, strict=True):
        (alone,) = drawn(model, own)
        assert np.abs(picture.astype(int) - alone).max() <= 1


def test_short_prompts_are_read_as_captions(seen: tuple[Model, list[torch.Tensor]]) -> None:
    model, contexts = seen
    drawn(model, ask())
    with torch.no_grad():
        assert torch.equal(contexts[0], model.encode(["a red circle", ""]).states)


def test_all_of_a_long_prompt_counts_unless_it_is_cut(tiny: Model) -> None:
    (whole,), (other,) = drawn(tiny, ask(LONG)), drawn(tiny, ask(LONG[:-3] + "two"))
    assert not np.array_equal(whole, other)
    (cut,), (same,) = drawn(tiny, ask(LONG, chunks=1)), drawn(tiny, ask(LONG[:-3] + "two", chunks=1))
    assert np.array_equal(cut, same)


def test_what_is_cut_is_said(tiny: Model) -> None:
    assert not remarks(ask(LONG), tiny)
    (line,) = remarks(ask(LONG, chunks=2), tiny)
    assert "last 5 tokens" in line
    assert line.endswith("--chunks 3 reads them")
    (line,) = remarks(ask(negative_prompt="star " * 100), tiny)
    assert "make it shorter" in line
    (line,) = remarks(ask(f"({LONG}:0.5)", chunks=1), tiny)
    assert "0.5" not in line
    for chunks in (0, 9):
        with pytest.raises(UserError, match="--chunks"):
            check(ask(chunks=chunks), tiny)


def test_brackets_weigh_unless_they_are_told_not_to(seen: tuple[Model, list[torch.Tensor]]) -> None:
    model, contexts = seen
    (weighed,), (plain,) = drawn(model, ask("a (red:3) circle")), drawn(model, ask())
    assert not np.array_equal(weighed, plain)
    assert np.array_equal(drawn(model, ask("a (red:1) circle"))[0], plain)
    (signs,) = drawn(model, ask("a (red) circle", emphasis=False))
    with torch.no_grad():
        assert torch.equal(contexts[-1], model.encode(["a (red) circle", ""]).states[:, : contexts[-1].shape[1]])
    assert np.array_equal(drawn(model, ask(r"a \(red\) circle"))[0], signs)


def test_weights_of_words_and_of_prompts(tiny: Model) -> None:
    compose = ("compose",)
    with torch.no_grad():
        ready = prepare(tiny, [ask("a (red:2) circle AND a star:0.5", guidance=compose)])
        plain = prepare(tiny, [ask("a red circle AND a star:0.5", guidance=compose)])
        sigma = torch.tensor([1.0])
        assert not torch.equal(ready.denoise(ready.x, sigma), plain.denoise(plain.x, sigma))


def test_the_prompt_is_written_down_as_typed() -> None:
    assert parameters_line(ask("a (red:1.3) [circle]"), "m", "0" * 64).startswith("a (red:1.3) [circle]\nSteps")
