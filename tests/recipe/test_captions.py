"""From the recipe to captions: wording, draws, what is cut."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from latentgen.core.rand import Draw
from latentgen.data.captions import CachedWords, LiveWords, TagDraws
from latentgen.formats.model import Model
from latentgen.recipe import sources
from latentgen.recipe.captions import some_captions, tag_draws, warn_of_cuts, words_of
from latentgen.recipe.finetune import prepare, runs_text
from latentgen.recipe.prior import with_prior
from latentgen.recipe.schema import Recipe
from latentgen.tasks.caching import Share


def write(folder: Path, numbers: range) -> Path:
    folder.mkdir()
    for number in numbers:
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"picture {number}")
    return folder


def of_folder(recipe: Recipe, path: Path, **more: object) -> Recipe:
    values = recipe.model_dump(by_alias=True)
    values["data"] |= {"source": "folder", "path": str(path), "resolution": 16, "holdout": 10, **more}
    return Recipe(**values)


def test_wording_holds_for_all_but_class_pictures(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = of_folder(tiny_recipe, write(tmp_path / "own", range(120)), prefix="see", trigger="sks")
    found = sources.examples(recipe)
    plain = sources.examples(of_folder(tiny_recipe, tmp_path / "own"))
    for worded, own in ((found.training, plain.training), (found.held_out, plain.held_out)):
        assert worded.captions(3) == (f"sks see {own.captions(3)[0]}",)
        assert worded.key() != own.key()
    prior = {"prompt": "a thing", "path": str(write(tmp_path / "class", range(200, 210)))}
    values = {**recipe.model_dump(by_alias=True), "unet": {"from": "somewhere"}, "finetune": {"prior": prior}}
    both = with_prior(Recipe(**values), found.training, {})
    assert both.captions(0) == found.training.captions(0)
    assert both.captions(len(found.training)) == ("picture 200",)


def test_parts_of_a_mixture_are_worded(tiny_recipe: Recipe, tmp_path: Path) -> None:
    folder = write(tmp_path / "own", range(20))
    parts = [{"source": "folder", "path": str(folder)}, {"source": "shapes", "size": 4}]
    values = tiny_recipe.model_dump(by_alias=True)
    values["data"] |= {"source": "mixture", "mixture": parts, "suffix": ", drawn", "resolution": 64}
    training = sources.examples(Recipe(**values)).training
    assert all(caption.endswith(", drawn") for i in range(len(training)) for caption in training.captions(i))


def test_captions_are_drawn_only_where_something_is(tiny_recipe: Recipe, tiny_builder: Callable[..., Model]) -> None:
    def data(**tags: object) -> Recipe:
        return Recipe(**{**tiny_recipe.model_dump(by_alias=True), "data": {"tags": tags or None}})

    for recipe, draws in (
        (data(), None),
        (data(keep=2), None),
        (data(shuffle=True, separator="|"), TagDraws("|", True, examples=5)),
    ):
        assert tag_draws(recipe.data, 5) == draws
        assert runs_text(prepare(recipe, tiny_builder())) == (draws is not None)


def test_cached_and_live_words_are_of_the_same_captions(
    tiny_recipe: Recipe, tiny: Model, few: Callable, draw: Callable[..., Draw], tmp_path: Path
) -> None:
    model, d = replace(tiny, chunks=2), draw(step=2)
    arguments = (tiny_recipe, model, few(8), tmp_path, Share())
    cached, live = (words_of(*arguments, live=live, tags=None) for live in (False, True))
    assert isinstance(cached, CachedWords)
    assert isinstance(live, LiveWords)
    states, ids = cached(d)["context"], live(d)["text_encoder"]
    assert states.shape == (8, 20, 16)
    with torch.no_grad():
        expected = model.towers[0].encoder(ids.view(16, 10)).last_hidden_state.view(8, 20, 16)
    torch.testing.assert_close(states, expected, atol=2e-3, rtol=2e-3)


def test_what_is_cut_is_said_once(tiny: Model, few: Callable, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny.towers[0].tokenizer
    long = "one two three a red star a blue circle one"
    captions = ["a star", long, f"{long} two", "a circle"]

    def said(captions: list[str], chunks: int, key: str = "text_encoder.chunks") -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_of_cuts(captions, tokenizer, chunks, key=key)
        return "\n".join(record.getMessage() for record in caplog.records)

    assert said(captions, 1) == (
        '2 of 4 captions are too long: 5 tokens are cut, of the longest the last 3 ("circle one two"); '
        "text_encoder.chunks: 2 reads all"
    )
    assert said(captions, 2) == ""
    assert said(captions, 1, "text_encoder.context_length").endswith("text_encoder.context_length: 13 reads all")
    assert "shorten them" in said([long * 10], 8)
    assert len(some_captions(few(6), 1)) == 6
