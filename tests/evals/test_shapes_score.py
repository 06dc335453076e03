"""The judge accepts what is true and rejects what is not, also in damaged pictures."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.data.sources.shapes import example
from latentgen.data.sources.shapes_captions import alterations, full_requirement, parse
from latentgen.data.sources.shapes_render import render
from latentgen.data.sources.shapes_scene import Item, Scene
from latentgen.evals.shapes_detect import detect
from latentgen.evals.shapes_score import judge, score
from tests.damages import DAMAGES


@pytest.mark.parametrize("damage", DAMAGES)
def test_accepts_true_captions_and_rejects_changed_ones(damage):
    rng = np.random.default_rng(0)
    true, passed = 0, 0
    asked: Counter[str] = Counter()
    fooled: Counter[str] = Counter()
    for number in range(375):
        shown = example(number, seed=5, split="all")
        detection = detect(DAMAGES[damage](shown.image, rng))
        verdicts = [judge(detection, parse(caption)) for caption in shown.captions]
        true, passed = true + len(verdicts), passed + sum(verdict.ok for verdict in verdicts)
        for attribute, changed in alterations(full_requirement(shown.scene)):
            asked[attribute] += 1
            fooled[attribute] += judge(detection, changed).ok
    assert passed >= 0.995 * true
    assert all(fooled[attribute] <= 0.01 * asked[attribute] for attribute in asked)
    assert len(asked) == 7


def _scene(*items, background="white"):
    return Scene("two", background, tuple(Item(*item) for item in items))


RED_CIRCLE = ("circle", "red", "small", 16.0, 16.0, 7.5)
BLUE_SQUARE = ("square", "blue", "large", 44.0, 44.0, 13.0)
GREEN_STAR = ("star", "green", "small", 48.0, 12.0, 8.0)
GREEN_STAR_TOO = ("star", "green", "small", 14.0, 50.0, 8.0)


def test_found_objects_are_where_they_were_drawn():
    verdict = score(render(_scene(RED_CIRCLE, BLUE_SQUARE)), "a red circle and a blue square")
    assert verdict.ok
    assert verdict.background == "white"
    square, circle = verdict.found
    assert (square.shape, square.colour, square.size) == ("square", "blue", "large")
    assert (circle.shape, circle.colour, circle.size) == ("circle", "red", "small")
    assert (circle.x, circle.y, circle.radius) == pytest.approx((16, 16, 7.5), abs=0.6)
    assert circle.box == pytest.approx((8, 8, 24, 24), abs=1)
    assert square.margin > 0.1


@pytest.mark.parametrize(
    ("caption", "failed"),
    [
        ("a small red circle and a large blue square on a white background", ()),
        ("a red circle and a blue star", ("shape",)),
        ("a blue circle and a red square", ("colour",)),
        ("a large circle and a square", ("size",)),
        ("a circle and a square on a gray background", ("background",)),
        ("a circle below a square", ("relation",)),
        ("a circle", ("count",)),
        ("two circles", ("count",)),
        ("two hearts", ("count", "shape")),
        ("two pink stars", ("count", "shape", "colour")),
    ],
)
def test_failed_checks_name_the_cause(caption, failed):
    assert score(render(_scene(RED_CIRCLE, BLUE_SQUARE)), caption).failed == failed


def test_diagonal_may_be_called_either_way_but_not_the_opposite():
    picture = render(_scene(RED_CIRCLE, BLUE_SQUARE))
    verdicts = {
        words: score(picture, f"a circle {words} a square").ok for words in ("above", "below", "left of", "right of")
    }
    assert verdicts == {"above": True, "left of": True, "below": False, "right of": False}


def test_objects_that_were_not_asked_for():
    three = render(_scene(RED_CIRCLE, BLUE_SQUARE, GREEN_STAR))
    assert score(three, "a circle and a square").ok
    assert score(three, "a circle").failed == ("count",)
    stars = render(_scene(GREEN_STAR, GREEN_STAR_TOO, BLUE_SQUARE))
    assert score(stars, "two green stars").ok
    assert score(stars, "three green stars").failed == ("count",)


def test_a_shapeless_object_fails_the_count_of_others():
    picture = render(_scene(GREEN_STAR, GREEN_STAR_TOO))
    assert score(picture, "two stars").ok
    picture[30:34, 10:60] = (40, 170, 70)
    assert score(picture, "two stars").failed == ("count",)


def test_specks_do_not_count():
    picture = render(_scene(RED_CIRCLE))
    picture[50:53, 50:53] = (45, 90, 220)
    assert score(picture, "a red circle").ok


def test_objects_that_touch_are_told_apart_by_colour():
    touching = _scene(("circle", "red", "small", 20.0, 32.0, 8.0), ("square", "blue", "small", 35.2, 32.0, 8.0))
    assert score(render(touching), "a red circle left of a blue square").ok


def test_colours_a_little_off_are_named_and_foreign_ones_are_not():
    picture = render(_scene(RED_CIRCLE)).astype(int)
    inside = (picture == (220, 40, 40)).all(-1)
    near, far = picture.copy(), picture.copy()
    near[inside] += (-25, 25, 20)
    far[inside] = (90, 120, 120)
    assert score(near.astype(np.uint8), "a red circle").ok
    assert "colour" in score(far.astype(np.uint8), "a red circle").checks
    assert not score(far.astype(np.uint8), "a red circle").checks["colour"]
    assert detect(far.astype(np.uint8)).found[0].colour is None


def test_an_empty_picture_fails_and_a_foreign_background_has_no_name():
    empty = np.full((64, 64, 3), 250, dtype=np.uint8)
    verdict = score(empty, "a red circle on a white background")
    assert verdict.failed == ("count", "shape", "colour")
    assert verdict.confidence == 0.0
    assert score(empty, "a circle above a square").failed == ("count", "shape", "relation")
    assert detect(np.full((64, 64, 3), 60, dtype=np.uint8)).background is None


@pytest.mark.parametrize("resolution", [128, 256])
def test_larger_pictures_are_judged_alike(resolution):
    for number in range(40):
        shown = example(number, seed=2, split="all", resolution=resolution)
        assert score(Image.fromarray(shown.image), shown.caption).ok


def test_mistakes_are_named():
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    with pytest.raises(UserError, match="grammar"):
        score(picture, "a photo of a dog")
    with pytest.raises(UserError, match="square"):
        score(Image.new("RGB", (64, 32)), "a circle")
    with pytest.raises(UserError, match="uint8"):
        score(picture.astype(np.float32), "a circle")
