"""The standing prompts and the report: counts, tags, intervals, and scores of drawers whose skill is known."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.data.sources.shapes_captions import holds, parse
from latentgen.data.sources.shapes_layout import Draws, draw_scene
from latentgen.data.sources.shapes_render import render
from latentgen.data.sources.shapes_scene import BACKGROUNDS, CATEGORIES, COLOURS, RADII, SHAPES, relation_of
from latentgen.evals.shapes_prompts import PER_CATEGORY, Prompt, standing_prompts
from latentgen.evals.shapes_report import as_markdown, bootstrap, evaluate, grid, write


def _perfect(text: str, seed: int) -> Image.Image:
    """A picture that shows what the prompt asks for: a drawn layout that fits, with the words put into it."""
    said, number = parse(text), 0
    category = (
        "position" if said.relation else "two" if len(said.wanted) == 2 else "counting" if said.count > 1 else "single"
    )
    while True:
        draws = Draws("perfect", text, seed, number)
        scene = draw_scene(number, seed=seed, split="all", category=category)
        number += 1
        words = said.wanted * said.count
        if len(scene.items) != len(words):
            continue
        items = tuple(
            replace(item, shape=word.shape, colour=word.colour or draws.pick(tuple(COLOURS)))
            for item, word in zip(scene.items, words, strict=True)
        )
        scene = replace(scene, items=items, background=said.background or scene.background)
        if holds(said, scene) and (said.relation is None or relation_of(*items) == said.relation):
            return Image.fromarray(render(scene))


def _draw_perfect(texts, seeds):
    return [_perfect(text, seed) for text, seed in zip(texts, seeds, strict=True)]


def _draw_wrong(texts, seeds):
    """The perfect picture of another shape."""
    following = dict(zip(SHAPES, SHAPES[1:] + SHAPES[:1], strict=True))
    swapped = []
    for text in texts:
        words = text.replace("crosses", "crosss").split()
        words = [
            following[w] if w in following else following[w[:-1]] + "s" if w[:-1] in following else w for w in words
        ]
        swapped.append(" ".join(words).replace("crosss", "crosses").replace("a orange", "an orange"))
    return _draw_perfect(swapped, seeds)


def test_the_list_is_long_enough_unique_and_tagged():
    prompts = standing_prompts()
    assert len(prompts) == 6 * PER_CATEGORY == 720
    assert Counter(prompt.category for prompt in prompts) == dict.fromkeys(CATEGORIES, 120)
    for category in CATEGORIES:
        own = [prompt for prompt in prompts if prompt.category == category]
        assert len({prompt.text for prompt in own}) == 120
        assert sum(prompt.heldout for prompt in own) == 40
        assert sum(prompt.heldout for prompt in own[:21]) == 7
    for prompt in prompts:
        said = parse(prompt.text)
        assert said.heldout == prompt.heldout
        assert (said.relation is not None) == (prompt.category == "position")
        assert (said.count > 1) == (prompt.category == "counting")
        assert len(said.wanted) == (2 if prompt.category in ("two", "position", "attribution") else 1)
        if prompt.category in ("colours", "attribution"):
            assert all(wanted.colour for wanted in said.wanted)


def test_the_quick_list_is_the_beginning_of_each_category():
    whole = standing_prompts()
    for category in CATEGORIES:
        quick = [prompt for prompt in standing_prompts(quick=True) if prompt.category == category]
        assert quick == [prompt for prompt in whole if prompt.category == category][:21]


def test_a_perfect_drawer_scores_one():
    report = evaluate(_draw_perfect, standing_prompts(quick=True), pictures_per_prompt=2)
    assert report.score == 1.0
    assert {row.score for row in report.rows} == {1.0}
    assert {(row.category, row.set) for row in report.rows} == {
        (category, name) for category in (*CATEGORIES, "overall") for name in ("all", "seen", "heldout")
    }
    assert report.row("single", "heldout").prompts == 7
    assert report.row().pictures == 6 * 21 * 2


def test_a_wrong_drawer_scores_about_zero():
    report = evaluate(_draw_wrong, standing_prompts(quick=True), pictures_per_prompt=1)
    # "a circle and a square" may become "a square and a star", never itself; chance can still fit a few vague prompts.
    assert report.score <= 0.01
    assert report.row().high <= 0.03


def test_half_a_drawer_scores_half_and_fails_by_name(tmp_path):
    prompts = [Prompt("a red circle", "colours", False), Prompt("a blue heart", "colours", True)]

    def red_circles(texts, seeds):
        return _draw_perfect(["a red circle"] * len(texts), seeds)

    report = evaluate(red_circles, prompts, pictures_per_prompt=3)
    assert report.score == 0.5
    assert (report.row("colours", "seen").score, report.row("colours", "heldout").score) == (1.0, 0.0)
    write(report, tmp_path / "report")
    saved = json.loads((tmp_path / "report" / "shapes.json").read_text())
    assert saved["score"] == 0.5
    assert saved["failures"]["colours"] == {"shape": 3, "colour": 3}
    assert [outcome["ok"] for outcome in saved["outcomes"]] == [True] * 3 + [False] * 3
    assert saved["outcomes"][3]["text"] == "a blue heart"
    assert "| colours | 50.0 (0.0 to 100.0) | 100.0" in (tmp_path / "report" / "shapes.md").read_text()
    with Image.open(tmp_path / "report" / "shapes.png") as sheet:
        pixels = np.asarray(sheet)
    assert (pixels == (215, 30, 30)).all(-1).any()
    assert (pixels == (60, 160, 80)).all(-1).any()


def test_pictures_do_not_depend_on_the_rest_of_the_list():
    asked: dict[tuple[str, int], None] = {}

    def remember(texts, seeds):
        asked.update(dict.fromkeys(zip(texts, seeds, strict=True)))
        return [Image.new("RGB", (64, 64), BACKGROUNDS["white"]) for _ in texts]

    quick = standing_prompts(quick=True)
    evaluate(remember, quick[10:12], pictures_per_prompt=2, seed=1)
    few = set(asked)
    assert len(few) == 4
    asked.clear()
    evaluate(remember, quick[:30], pictures_per_prompt=2, seed=1, batch_size=7)
    assert few < set(asked)
    asked.clear()
    evaluate(remember, quick[10:12], pictures_per_prompt=2, seed=2)
    assert not few & set(asked)


def test_grid_and_table_without_failures_or_heldout_prompts():
    report = evaluate(_draw_perfect, [Prompt("a small star", "single", False)], pictures_per_prompt=1)
    assert grid(report).width > 128
    assert "| single | 100.0 (100.0 to 100.0) | 100.0 (100.0 to 100.0) | - | 1 | none |" in as_markdown(report)


def test_bootstrap_interval_covers_the_mean_and_narrows_with_more_prompts():
    rng = np.random.default_rng(1)
    few, many = rng.random(25), rng.random(2500)
    (low, high), (low_many, high_many) = bootstrap([few]), bootstrap([many])
    assert low < few.mean() < high
    # The textbook interval, mean +- 1.96 standard errors.
    assert high - low == pytest.approx(2 * 1.96 * few.std() / 5, rel=0.15)
    assert (high_many - low_many) < (high - low) / 5
    assert bootstrap([np.ones(9)]) == (1.0, 1.0)
    # The mean of two groups: independent errors, halved.
    low_two, high_two = bootstrap([few, few])
    assert high_two - low_two == pytest.approx((high - low) / 2**0.5, rel=0.15)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = bootstrap([rng.binomial(4, 0.6, size=80) / 4], seed=trial)
        covered += low <= 0.6 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_mistakes_are_named():
    with pytest.raises(UserError, match="prompts"):
        evaluate(_draw_perfect, [])
    with pytest.raises(UserError, match="at least 1"):
        evaluate(_draw_perfect, standing_prompts(quick=True), pictures_per_prompt=0)
    with pytest.raises(ValueError, match="0 pictures for 1"):
        evaluate(lambda texts, seeds: [], [Prompt("a star", "single", False)], pictures_per_prompt=1)
    with pytest.raises(UserError, match="category 'colors'"):
        evaluate(_draw_perfect, [Prompt("a red star", "colors", False)])
    report = evaluate(_draw_perfect, [Prompt("a star", "single", False)], pictures_per_prompt=1)
    with pytest.raises(UserError, match="colours"):
        report.row("colours")


def test_radii_of_the_classes_do_not_meet():
    assert RADII["small"][1] * 1.2 < RADII["large"][0]
