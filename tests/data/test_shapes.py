"""The world of shapes: pure, balanced, captioned truly, and without held-out combinations in training."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.core.errors import UserError
from latentgen.data.sources.shapes import ShapesSource, example
from latentgen.data.sources.shapes_captions import (
    Requirement,
    Wanted,
    alterations,
    full_requirement,
    holds,
    least_requirement,
    parse,
    phrase,
    turned,
)
from latentgen.data.sources.shapes_layout import GAP, MARGIN, Draws, draw_scene
from latentgen.data.sources.shapes_render import DISTANCES, coverage, render
from latentgen.data.sources.shapes_scene import (
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    HELDOUT_KINDS,
    RADII,
    RELATIONS,
    SHAPES,
    SIDE,
    SPLITS,
    heldout_pairs,
    pair_of,
    relation_of,
    scene_is_heldout,
    seen_kinds,
)


def test_examples_are_a_function_of_their_number():
    one, other = ShapesSource(seed=3, size=200), ShapesSource(seed=3, size=200)
    forward = [(one.image(i).tobytes(), one.captions(i)) for i in range(200)]
    backward = [(other.image(i).tobytes(), other.captions(i)) for i in reversed(range(200))]
    assert forward == backward[::-1]
    assert len({image for image, _ in forward}) == 200


def test_known_example_stays_as_it_is():
    """Cached latents and published scores rest on this; raise `VERSION` when it has to change."""
    shown = example(0, seed=0, split="train")
    assert shown.caption == "a circle"
    assert [(item.shape, item.colour, item.size) for item in shown.scene.items] == [("circle", "red", "small")]
    assert ShapesSource(seed=0, size=10).key() == ShapesSource(seed=0, size=10).key()


def test_seed_and_split_give_other_pictures_and_keys():
    sources = [ShapesSource(seed=seed, size=8, split=split) for seed in (0, 1) for split in SPLITS]
    sources += [ShapesSource(size=9), ShapesSource(size=8, resolution=128)]
    assert len({source.key() for source in sources}) == len(sources)
    assert len({b"".join(source.image(i).tobytes() for i in range(8)) for source in sources[:6]}) == 6


def test_pictures_are_exact_at_object_centres_and_in_the_background():
    for number in range(300):
        shown = example(number, split="all")
        assert shown.image.dtype == np.uint8
        assert shown.image.shape == (SIDE, SIDE, 3)
        assert tuple(shown.image[0, 0]) == BACKGROUNDS[shown.scene.background]
        for item in shown.scene.items:
            assert tuple(shown.image[int(item.y), int(item.x)]) == COLOURS[item.colour]


def test_outlines_are_antialiased_and_scale_with_the_resolution():
    for number in range(20):
        scene = draw_scene(number, category="single")
        small, large = render(scene), render(scene, 4 * SIDE)
        assert len(np.unique(small.reshape(-1, 3), axis=0)) > 4
        averaged = large.reshape(SIDE, 4, SIDE, 4, 3).mean((1, 3))
        # The mean difference is that of edge pixels only; a shifted or unsmoothed outline would give several units.
        assert np.abs(averaged - small).mean() < 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_bounding_box(shape):
    radius, axis = 40.0, np.arange(-50, 50) + 0.5
    mask = coverage(DISTANCES[shape], axis[None, :], axis[:, None], radius) > 0.5
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    half_height, half_width = (rows[-1] + 1 - rows[0]) / 2, (columns[-1] + 1 - columns[0]) / 2
    assert max(half_height, half_width) == pytest.approx(36 if shape == "square" else 40, abs=1.5)
    assert rows[0] + rows[-1] == pytest.approx(99, abs=2)
    assert columns[0] + columns[-1] == 99


def test_objects_keep_their_distance_and_stay_inside():
    for number in range(2000):
        items = draw_scene(number, split="all").items
        for i, a in enumerate(items):
            assert min(a.x, a.y, SIDE - a.x, SIDE - a.y) >= a.radius + MARGIN - 1e-9
            assert RADII[a.size][0] <= a.radius <= RADII[a.size][1]
            for b in items[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + GAP - 1e-9


def test_categories_have_equal_shares_and_their_own_scenes():
    scenes = [draw_scene(number) for number in range(3000)]
    shares = Counter(scene.category for scene in scenes)
    assert set(shares) == set(CATEGORIES)
    assert all(400 < count < 600 for count in shares.values())
    for scene in scenes:
        shapes = [item.shape for item in scene.items]
        if scene.category == "counting":
            assert 2 <= len(shapes) <= 4
            assert len({(item.shape, item.colour, item.size) for item in scene.items}) == 1
        elif scene.category in ("single", "colours"):
            assert len(shapes) == 1
        else:
            assert len(set(shapes)) == len(shapes) == 2
        if scene.category == "attribution":
            assert scene.items[0].colour != scene.items[1].colour
        if scene.category == "position":
            assert relation_of(*scene.items) is not None


def test_heldout_kinds_and_pairs_are_balanced():
    assert len(HELDOUT_KINDS) == 12
    assert set(Counter(shape for shape, _ in HELDOUT_KINDS).values()) == {2}
    assert set(Counter(colour for _, colour in HELDOUT_KINDS)) == set(COLOURS)
    assert max(Counter(colour for _, colour in HELDOUT_KINDS).values()) == 2
    assert len(heldout_pairs()) == 54
    assert all(a[0] != b[0] and not {a, b} & HELDOUT_KINDS for a, b in heldout_pairs())


def test_training_never_shows_a_heldout_combination():
    shown: Counter[tuple[str, str]] = Counter()
    for number in range(20_000):
        items = draw_scene(number, split="train").items
        kinds = {item.kind for item in items}
        assert not kinds & HELDOUT_KINDS
        assert len(kinds) == 1 or pair_of(*kinds) not in heldout_pairs()
        shown.update(kinds)
    assert set(shown) == set(seen_kinds())
    assert min(shown.values()) > 400


def test_the_heldout_split_shows_nothing_else():
    scenes = [draw_scene(number, split="heldout") for number in range(1500)]
    assert all(scene_is_heldout(scene) for scene in scenes)
    assert {item.kind for scene in scenes for item in scene.items} >= HELDOUT_KINDS
    pairs = {pair_of(*(item.kind for item in scene.items)) for scene in scenes if len(scene.items) == 2}
    assert len(pairs & heldout_pairs()) == 54


def test_captions_are_true_and_one_says_everything():
    for number in range(2000):
        shown = example(number, split="all")
        said = [parse(caption) for caption in shown.captions]
        assert all(holds(requirement, shown.scene) for requirement in said)
        assert full_requirement(shown.scene) in said
        assert least_requirement(shown.scene) in said
        if shown.scene.category == "position":
            assert all(requirement.relation for requirement in said)
        assert len(set(shown.captions)) == len(shown.captions) >= 2


def test_altered_requirements_are_false():
    attributes: Counter[str] = Counter()
    for number in range(800):
        scene = draw_scene(number, split="all")
        for requirement in (full_requirement(scene), least_requirement(scene), turned(full_requirement(scene))):
            assert holds(requirement, scene)
            for attribute, changed in alterations(requirement):
                attributes[attribute] += 1
                assert changed != requirement
                assert not holds(changed, scene)
    assert set(attributes) == {"shape", "colour", "size", "count", "relation", "background", "swap"}


def test_captions_vary_and_say_less_than_the_picture():
    said = [parse(example(number).caption) for number in range(1000)]
    assert sum(requirement.wanted[0].colour is None for requirement in said) > 150
    assert sum(requirement.background is not None for requirement in said) > 100
    assert {requirement.relation for requirement in said} == {None, *RELATIONS}


_maybe_colour = st.none() | st.sampled_from(sorted(COLOURS))
_maybe_size = st.none() | st.sampled_from(sorted(RADII))
_backgrounds = st.none() | st.sampled_from(sorted(BACKGROUNDS))


@st.composite
def _requirements(draw):
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=2, unique=True))
    wanted = tuple(Wanted(shape, draw(_maybe_colour), draw(_maybe_size)) for shape in shapes)
    if len(wanted) == 1:
        return Requirement(wanted, count=draw(st.integers(1, 4)), background=draw(_backgrounds))
    return Requirement(wanted, relation=draw(st.none() | st.sampled_from(RELATIONS)), background=draw(_backgrounds))


@settings(max_examples=400)
@given(_requirements(), st.integers(0, 10**6))
def test_every_phrasing_reads_back_as_what_was_meant(requirement, number):
    assert parse(phrase(requirement, Draws("test", number))) == requirement


def test_spelled_captions():
    circle, square = Wanted("circle", "red"), Wanted("square", "blue")
    assert parse("A red circle above a blue square.") == Requirement((circle, square), relation="above")
    assert parse("a blue square with a red circle above it") == Requirement((circle, square), relation="above")
    assert parse("two green stars on a gray background") == Requirement(
        (Wanted("star", "green"),), count=2, background="gray"
    )
    assert parse("a large pink heart") == Requirement((Wanted("heart", "pink", "large"),))
    assert parse("an orange cross to the left of one heart that is black").relation == "left of"


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a dog",
        "red circle",
        "a circle and",
        "two star",
        "five stars",
        "a circle a square",
        "a red circle that is blue",
        "a red circle and a blue circle",
        "a circle above a square and a star",
        "two stars above a circle",
        "a circle on a green background",
    ],
)
def test_captions_outside_the_grammar_are_refused(caption):
    with pytest.raises(UserError, match="caption"):
        parse(caption)


def test_holds_needs_exactly_the_objects_of_a_single_caption():
    scene = draw_scene(0, category="two")
    item = scene.items[0]
    assert not holds(Requirement((Wanted(item.shape),)), scene)
    assert holds(Requirement((Wanted(item.shape),)), replace(scene, items=(item,)))


def test_heldout_is_decided_by_the_words():
    assert parse("a black triangle").heldout
    assert not parse("a triangle").heldout
    first, second = sorted(heldout_pairs())[0]
    both = (Wanted(*first), Wanted(*second))
    assert Requirement(both).heldout
    assert not Requirement((both[0], replace(both[1], colour=None))).heldout
    assert not parse("a red circle above a blue square").heldout


def test_contrasts_are_false_and_name_nothing_held_out():
    source = ShapesSource(size=200)
    respects = set()
    for index in range(200):
        scene = source.scene(index)
        for caption in source.captions(index):
            groups = source.contrasts(index, caption)
            assert groups
            assert groups == source.contrasts(index, caption)
            respects.add(len(groups))
            for false in (false for group in groups for false in group):
                requirement = parse(false)
                assert not holds(requirement, scene), (caption, false)
                assert not requirement.heldout, false
    assert respects >= {2, 3, 4, 5}
    heldout = ShapesSource(size=60, split="heldout")
    assert any(
        parse(false).heldout
        for index in range(60)
        for group in heldout.contrasts(index, heldout.captions(index)[0])
        for false in group
    )


def test_source_names_and_mistakes():
    source = ShapesSource(size=5, split="heldout", resolution=128)
    assert len(source) == 5
    assert source.name(3) == "shapes:heldout:3"
    assert source.image(4).shape == (128, 128, 3)
    for index in (-1, 5):
        with pytest.raises(UserError, match="does not exist"):
            source.image(index)
    for wrong in ({"split": "test"}, {"size": 0}, {"resolution": 96}, {"resolution": 32}):
        with pytest.raises(UserError, match="shapes"):
            ShapesSource(**wrong)
    with pytest.raises(UserError, match="category"):
        draw_scene(0, category="colors")
