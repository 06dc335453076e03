"""Presets fill in what was not set, by the number of pictures, and nothing else."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from latentgen.core.errors import UserError
from latentgen.recipe.load import dump_recipe, load_recipe, valid_keys
from latentgen.recipe.presets import TABLE, filled, is_set
from latentgen.recipe.schema import Recipe

PRESETS = ("subject", "style")
BASE = ["unet.from=base"]


def of(preset: str, *words: str, pictures: int = 20) -> Recipe:
    return filled(load_recipe(None, [*BASE, f"finetune.preset={preset}", *words]), pictures)


def values(recipe: Recipe) -> dict[str, object]:
    found: dict[str, object] = {}
    for entry in TABLE:
        inner: object = recipe
        for part in entry.key.split("."):
            inner = getattr(inner, part, None)
        found[entry.key] = inner
    return found


def test_the_table_is_of_keys_that_exist_with_a_reason_each() -> None:
    keys = [entry.key for entry in TABLE]
    assert set(keys) <= set(valid_keys())
    assert len(set(keys)) == len(keys)
    assert all(entry.reason for entry in TABLE)


def test_without_preset_nothing_is_filled_in() -> None:
    for words in ([], [*BASE, "finetune.method=lora"]):
        recipe = load_recipe(None, words)
        assert filled(recipe, 20) is recipe


def test_a_subject() -> None:
    recipe = of("subject", "finetune.prior.prompt=a dog", pictures=12)
    assert values(recipe) == {
        "finetune.method": "lora",
        "finetune.rank": 16,
        "finetune.targets": ("attention",),
        "finetune.text_encoders": True,
        "finetune.text_learning_rate": 5e-5,
        "finetune.prior.pictures": 200,
        "train.learning_rate": 1e-4,
        "train.global_batch": 4,
        "train.steps": 600,
        "train.schedule": "constant",
        "train.warmup_steps": 0,
        "train.ema_decay": 0.99,
        "diffusion.weight": "min_snr",
        "diffusion.min_snr_gamma": 5.0,
        "diffusion.caption_dropout": 0.0,
        "data.flip": False,
    }
    alone = of("subject", pictures=12)
    assert alone.finetune is not None
    assert alone.finetune.prior is None
    assert alone.train.global_batch == 2


def test_a_style() -> None:
    found = values(of("style", pictures=60))
    wanted = {"finetune.rank": 32, "train.steps": 1500, "train.schedule": "cosine", "data.flip": True}
    wanted |= {"diffusion.caption_dropout": 0.1, "finetune.text_encoders": False, "train.global_batch": 4}
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("preset", PRESETS)
def test_steps_follow_the_number_of_pictures_between_two_ends(preset: str) -> None:
    steps = [of(preset, pictures=count).train.steps for count in (1, 5, 20, 40, 1000, 100_000)]
    assert steps == sorted(steps)
    low, high = (300, 2000) if preset == "subject" else (500, 4000)
    assert (steps[0], steps[-1]) == (low, high)
    assert low < steps[3] <= high


@pytest.mark.parametrize("preset", PRESETS)
def test_all_weights_learn_slower_and_have_no_matrices(preset: str) -> None:
    plain, full = load_recipe(None).train, of(preset, "finetune.method=full")
    assert full.train.learning_rate <= 1e-5 < plain.learning_rate
    assert full.finetune is not None
    assert (full.finetune.rank, full.finetune.text_encoders, full.finetune.text_learning_rate) == (16, False, None)
    words = of(preset, "finetune.method=none", "finetune.tokens={<x>: {start: dog}}")
    assert words.finetune is not None
    assert not words.finetune.text_encoders


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("where", ["command line", "file"])
def test_what_was_set_wins(preset: str, where: str, tmp_path: Path) -> None:
    """Even where it is set to what it would have been without a preset."""
    text = (
        "finetune: {rank: 16, text_encoders: false}\ntrain: {steps: 1000, learning_rate: 3e-4}\ndata: {flip: false}\n"
    )
    words = ["finetune.rank=16", "finetune.text_encoders=false", "train.steps=1000", "train.learning_rate=3e-4"]
    (tmp_path / "r.yaml").write_text(text)
    plain = [*BASE, f"finetune.preset={preset}"]
    if where == "file":
        recipe = filled(load_recipe(tmp_path / "r.yaml", plain), 5)
    else:
        recipe = filled(load_recipe(None, [*plain, *words, "data.flip=false"]), 5)
    assert recipe.finetune is not None
    assert (recipe.finetune.rank, recipe.finetune.text_encoders, recipe.data.flip) == (16, False, False)
    assert (recipe.train.steps, recipe.train.learning_rate) == (1000, 3e-4)
    assert recipe.train.ema_decay == of(preset).train.ema_decay, "the rest is filled in"


def test_own_class_pictures_are_not_counted() -> None:
    recipe = of("subject", "finetune.prior={prompt: a dog, path: dogs}")
    assert recipe.finetune is not None
    assert recipe.finetune.prior is not None
    assert not is_set(load_recipe(None, [*BASE, "finetune.prior.prompt=a dog"]), "finetune.prior.pictures")
    assert recipe.finetune.prior.pictures == 100, "as without a preset: nothing is made"


def test_what_was_filled_in_is_said_and_written_down(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        recipe = of("subject", "train.steps=7", pictures=5)
    assert "finetune.preset subject, for 5 pictures: finetune.method=lora" in caplog.text
    assert "finetune.targets=[attention]" in caplog.text
    assert "train.steps" not in caplog.text
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    caplog.clear()
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe
    assert filled(again, 5000) == recipe, "what is written down is set"
    assert not caplog.text


def test_presets_without_sense_are_refused() -> None:
    with pytest.raises(UserError, match=r"finetune: say which model to start from"):
        load_recipe(None, ["finetune.preset=style"])
    with pytest.raises(UserError, match=r"finetune.preset: there is none for a ControlNet"):
        of("style", "finetune.method=none", "finetune.control=edge")
    with pytest.raises(UserError, match=r"`finetune.preset`: Input should be 'subject' or 'style'"):
        of("object")
