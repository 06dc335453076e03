"""The judge of fine-tuning: it knows arrows and outlines as exactly as it knows the shapes of the world."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from new_shape import (
    ARROW,
    ASKED,
    OUTLINED,
    SHOWN,
    WITH_ARROW,
    arrow,
    arrow_example,
    arrows_in,
    asks_alone,
    asks_beside,
    asks_large,
    hollow,
    judged,
    judged_outlined,
    outlined_example,
    write_pictures,
)

from latentgen.data.sources.folder import FolderSource
from latentgen.data.sources.shapes import example
from latentgen.data.sources.shapes_captions import Requirement, parse
from latentgen.data.sources.shapes_layout import Draws, draw_scene
from latentgen.data.sources.shapes_render import coverage, render
from latentgen.data.sources.shapes_scene import COLOURS, RADII, SHAPES, Item, Scene
from latentgen.evals.shapes_detect import detect
from latentgen.evals.shapes_score import judge, stands
from tests.damages import DAMAGES


def scene_for(requirement: Requirement, number: int) -> Scene:
    """A scene that shows what was asked for and nothing else."""
    wanted, draws = requirement.wanted, Draws("test", number)
    for attempt in range(1000):
        drawn = draw_scene(1000 * number + attempt, category="single" if len(wanted) == 1 else "position", split="all")
        items = tuple(
            Item(w.shape, w.colour or draws.pick(tuple(COLOURS)), i.size, i.x, i.y, i.radius)
            for w, i in zip(wanted, drawn.items, strict=True)
        )
        sizes = all(w.size in (None, i.size) for w, i in zip(wanted, items, strict=True))
        if not sizes or requirement.background not in (None, drawn.background):
            continue
        if len(items) == 1 or requirement.relation is None or stands(items[0], requirement.relation, items[1]):
            return Scene(drawn.category, drawn.background, items)
    raise AssertionError("no scene fits")


def test_the_arrow_fills_its_box_and_is_mirrored():
    radius, axis = 40.0, np.arange(-50, 50) + 0.5
    mask = coverage(arrow, axis[None, :], axis[:, None], radius)
    rows, columns = np.flatnonzero(mask.max(1) > 0.5), np.flatnonzero(mask.max(0) > 0.5)
    assert (rows[0] - 50, rows[-1] - 49) == pytest.approx((-40, 40), abs=1.5)
    assert columns[0] + columns[-1] == 99
    assert np.array_equal(mask, mask[:, ::-1])
    assert mask[15].sum() < mask[50].sum(), "the point is up"
    assert 0 < mask[85].sum() < mask[50].sum(), "and a shaft below the head"


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_asked_for_is_found(damage):
    rng, asks = np.random.default_rng(0), [*asks_alone(sizes=(None, *RADII)), *asks_beside()]
    right = [judged(DAMAGES[damage](render(scene_for(a.requirement, n), shapes=WITH_ARROW), rng), a).ok
             for n, a in enumerate(asks)]  # fmt: skip
    assert len(right) == 54
    assert all(right) if damage == "clean" else sum(right) >= 0.98 * len(right)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_world_is_judged_as_before_and_shows_no_arrows(damage):
    rng, arrows, objects = np.random.default_rng(0), 0, 0
    for number in range(250):
        shown = example(number, seed=5, split="all")
        picture = DAMAGES[damage](shown.image, rng)
        plain, knowing = detect(picture), detect(picture, WITH_ARROW)
        assert [one.box for one in plain.found] == [one.box for one in knowing.found]
        arrows, objects = arrows + arrows_in(picture), objects + len(plain.found)
        if damage == "clean":
            assert all(judge(knowing, parse(caption)).ok for caption in shown.captions)
    assert objects > 250
    assert arrows <= 0.002 * objects


@pytest.mark.parametrize("shape", SHAPES)
def test_another_shape_in_the_place_of_an_arrow_is_refused(shape):
    for number, ask in enumerate(asks_alone()):
        scene = scene_for(ask.requirement, number)
        other = Item(shape, *(getattr(scene.items[0], part) for part in ("colour", "size", "x", "y", "radius")))
        verdict = judged(render(Scene("single", scene.background, (other,))), ask)
        assert verdict.failed == ("shape",)


@pytest.mark.parametrize("colour", COLOURS)
def test_an_arrow_in_another_colour_is_refused(colour):
    ask = next(ask for ask in asks_alone() if ask.requirement.wanted[0].colour != colour)
    item = Item(ARROW, colour, "large", 30.0, 32.0, 13.0)
    assert judged(render(Scene("single", "white", (item,)), shapes=WITH_ARROW), ask).failed == ("colour",)


def test_examples_show_arrows_in_their_colours_only():
    colours = Counter()
    for number in range(40):
        shown = arrow_example(number)
        (found,) = detect(shown.image, WITH_ARROW).found
        assert (found.shape, found.size) == (ARROW, "large")
        assert f"{found.colour} arrow" in shown.caption or f"arrow that is {found.colour}" in shown.caption
        colours[found.colour] += 1
    assert colours == dict.fromkeys(SHOWN, 8)
    assert not set(SHOWN) & set(ASKED)
    assert "<thing>" in arrow_example(3, "<thing>").caption


def test_a_known_shape_can_stand_in_for_the_arrow():
    shown = arrow_example(3, "<thing>", "heart")
    assert [found.shape for found in detect(shown.image).found] == ["heart"]
    assert "<thing>" in shown.caption
    for ask in asks_alone("<thing>", shape="heart"):
        assert "<thing>" in ask.text
        assert ask.requirement.wanted[0].shape == "heart"


def test_prompts_ask_for_arrows_in_the_other_colours_only():
    for ask in (*asks_alone("<thing>"), *asks_beside("<thing>")):
        assert "<thing>" in ask.text
        assert ARROW not in ask.text
        assert ask.requirement.wanted[0].shape == ARROW
        assert ask.requirement.wanted[0].colour in ASKED
    for ask in (*asks_alone("star"), *asks_beside("circle")):
        text = ask.text.replace(" and a circle", " and a square")
        if text.count("circle") < 2:
            assert parse(text).background == ask.requirement.background
            assert parse(text).relation == ask.requirement.relation


def test_outlines_are_hollow_and_filled_shapes_are_not():
    outlines = [outlined_example(number) for number in range(24)]
    assert all(hollow(shown.image) > 0.05 for shown in outlines)
    assert np.mean([hollow(shown.image) for shown in outlines]) > 0.3
    assert max(hollow(example(number, split="all").image) for number in range(200)) == 0.0
    assert hollow(np.full((64, 64, 3), 250, dtype=np.uint8)) == 0.0


def test_outlined_shapes_are_told_from_filled_ones():
    for number, ask in enumerate(asks_large()):
        scene = scene_for(ask.requirement, number)
        item = scene.items[0]
        filled = replace(scene, items=(replace(item, shape=item.shape.removeprefix("outlined ")),))
        assert judged_outlined(render(scene, shapes=OUTLINED), ask).ok
        assert judged_outlined(render(filled), ask).failed == ("shape",)
    assert all(parse(outlined_example(number).caption).wanted[0].size == "large" for number in range(6))


def test_pictures_come_back_from_their_folder(tmp_path):
    shown = [arrow_example(number) for number in range(3)]
    write_pictures(tmp_path, shown)
    source = FolderSource(path=tmp_path, resolution=64)
    assert [source.captions(number) for number in range(3)] == [(one.caption,) for one in shown]
    assert all(np.array_equal(source.image(number), one.image) for number, one in enumerate(shown))
    assert len(json.loads((tmp_path / "metadata.jsonl").read_text().splitlines()[0])) == 2
