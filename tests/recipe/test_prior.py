"""Class pictures: drawn once, the same bits however the work was cut, and mixed with the subject's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.data.sources.made import MadePictures
from latentgen.data.sources.mixture import Mixture
from latentgen.formats.model import Model
from latentgen.formats.model_folder import save_model
from latentgen.pipelines.generate import generate
from latentgen.recipe import prior
from latentgen.recipe.load import load_recipe
from latentgen.recipe.plan import make_plan
from latentgen.recipe.schema import Recipe
from latentgen.tasks.caching import Share

WEIGHTS = {"base": "w1"}


def recipe_of(folder: Path, *words: str, base: str = "base") -> Recipe:
    plain = ["data.resolution=16", f"data.cache={folder}/cache", f"unet.from={base}", "finetune.method=full"]
    plain += ["preview.num_inference_steps=2", "finetune.prior={prompt: a dog, pictures: 5, weight: 0.5}"]
    return load_recipe(None, [*plain, *words])


def made(recipe: Recipe, few: Callable, weights: dict[str, str] = WEIGHTS) -> tuple[Mixture, MadePictures]:
    source = prior.with_prior(recipe, few(3), weights)
    assert isinstance(source, Mixture)
    assert isinstance(source.parts[1], MadePictures)
    return source, source.parts[1]


def contents(pictures: MadePictures) -> list[bytes]:
    return [pictures.path(i).read_bytes() for i in range(len(pictures))]


def test_without_prior_nothing_is_mixed(tmp_path: Path, few: Callable) -> None:
    source = few(3)
    assert prior.with_prior(recipe_of(tmp_path, "finetune.prior=null"), source, WEIGHTS) is source
    assert prior.with_prior(load_recipe(None), source, {}) is source


def test_they_are_what_the_model_draws(tmp_path: Path, few: Callable, tiny: Model) -> None:
    recipe = recipe_of(tmp_path)
    source, pictures = made(recipe, few)
    assert source.weights == (1.0, 0.5)
    assert pictures.folder.parent == tmp_path / "cache" / "prior"
    prior.make_class_pictures(recipe, tiny, source, Share())
    drawn = generate(tiny, [prior.request(recipe, number) for number in range(5)])
    for number, picture in enumerate(drawn):
        assert (pictures.image(number) == np.asarray(picture)).all()
    assert {prior.request(recipe, n).seed for n in range(5)} == set(range(5))
    assert {path.name for path in pictures.folder.iterdir()} == {f"{n:05d}.png" for n in range(5)}


def test_several_prompts_take_turns(tmp_path: Path, few: Callable, tiny: Model) -> None:
    recipe = recipe_of(tmp_path, "finetune.prior.prompt=[a red circle, '', two stars]")
    source, pictures = made(recipe, few)
    prior.make_class_pictures(recipe, tiny, source, Share())
    asked = [prior.request(recipe, number) for number in range(5)]
    assert [request.prompt for request in asked] == ["a red circle", "", "two stars", "a red circle", ""]
    assert [pictures.captions(number) for number in range(5)] == [(request.prompt,) for request in asked]
    for number, picture in enumerate(generate(tiny, asked)):
        assert (pictures.image(number) == np.asarray(picture)).all()


def test_what_determines_them_names_them(tmp_path: Path, few: Callable) -> None:
    changes = [
        "preview.num_inference_steps=3",
        "preview.guidance_scale=2",
        "data.resolution=32",
        "preview.sampler=ddim",
    ]
    changes += [
        "finetune.prior.prompt=[a dog, '']",
        "finetune.prior.prompt=a cat",
        "finetune.prior.pictures=6",
        "preview.negative_prompt=bad",
    ]
    names = {made(recipe_of(tmp_path, change), few)[1].folder.name for change in changes}
    plain = made(recipe_of(tmp_path), few)[1].folder.name
    names |= {plain, made(recipe_of(tmp_path), few, {"base": "w2"})[1].folder.name}
    assert len(names) == len(changes) + 2
    for same in ("finetune.prior.weight=2", "preview.prompts=[x]", "preview.seed=3", "train.steps=9", "seed=4"):
        assert made(recipe_of(tmp_path, same), few)[1].folder.name == plain
    moved = recipe_of(tmp_path, base="elsewhere")
    assert made(moved, few, {"elsewhere": "w1"})[1].folder.name == plain, (
        "what counts is the weights, not where they are"
    )


def test_a_broken_off_beginning_is_finished_in_the_same_bits(
    tmp_path: Path, few: Callable, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prior, "TOGETHER", 3)
    recipe = recipe_of(tmp_path)
    source, pictures = made(recipe, few)
    prior.make_class_pictures(recipe, tiny, source, Share())
    whole = contents(pictures)
    for number in (1, 3, 4):
        pictures.path(number).unlink()
    (pictures.folder / "00001.png.99999999.partial").touch()  # of a process that was killed
    saved = recorded(monkeypatch)
    prior.make_class_pictures(recipe, tiny, source, Share())
    assert sorted(saved) == ["00001.png", "00003.png", "00004.png"]
    assert contents(pictures) == whole
    assert not list(pictures.folder.glob("*.partial"))
    monkeypatch.setattr(prior, "generate", None)
    prior.make_class_pictures(recipe, tiny, source, Share())


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    saved: list[str] = []
    plain = prior.save_png

    def save(picture: Image.Image, path: Path, **named: Any) -> None:
        plain(picture, path, **named)
        saved.append(path.name)

    monkeypatch.setattr(prior, "save_png", save)
    return saved


def test_several_processes_draw_each_picture_once(
    tmp_path: Path, few: Callable, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prior, "TOGETHER", 2)
    alone, together = recipe_of(tmp_path / "one"), recipe_of(tmp_path / "two")
    source, pictures = made(alone, few)
    prior.make_class_pictures(alone, tiny, source, Share())
    expected, saved = contents(pictures), recorded(monkeypatch)
    source, pictures = made(together, few)

    def work(rank: int) -> None:
        prior.make_class_pictures(together, tiny, source, Share(rank, 2))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(saved) == [f"{n:05d}.png" for n in range(5)]
    assert contents(pictures) == expected


def test_own_class_pictures(tmp_path: Path, few: Callable, tiny: Model, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "dogs"
    folder.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"IMG_{number}.png")
    (folder / "IMG_1.txt").write_text("a sleeping dog")
    recipe = recipe_of(tmp_path, f"finetune.prior={{prompt: a dog, path: {folder}}}")
    source = prior.with_prior(recipe, few(3), WEIGHTS)
    assert isinstance(source, Mixture)
    assert [source.parts[1].captions(i) for i in range(2)] == [("a dog",), ("a sleeping dog",)]
    assert source.parts[1].image(0).shape == (16, 16, 3)
    prior.make_class_pictures(recipe, tiny, source, Share())
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match=r"finetune.prior.path: .*nowhere: no such folder; leave it out"):
        prior.with_prior(recipe_of(tmp_path, "finetune.prior.path=nowhere"), few(3), WEIGHTS)


def test_the_plan_counts_them(tmp_path: Path, tiny: Model) -> None:
    save_model(tiny, tmp_path / "start")
    base, words = str(tmp_path / "start"), ("data.size=8", "data.resolution=64")
    plain = make_plan(recipe_of(tmp_path, "finetune.prior=null", *words, base=base))
    five = make_plan(recipe_of(tmp_path, *words, base=base))
    ten = make_plan(recipe_of(tmp_path, *words, "finetune.prior.pictures=10", base=base))
    assert plain.prior_flops == plain.prior_disk == 0
    assert "prior" not in plain.table()
    assert ten.prior_flops == 2 * five.prior_flops > 0
    assert ten.prior_disk == 2 * five.prior_disk == 10 * 3 * 64 * 64
    assert five.flops == five.prior_flops + five.cache_flops + five.stages[0].flops
    assert any(line.startswith("prior ") for line in five.table().splitlines())
    assert five.cache_flops > plain.cache_flops, "class pictures are encoded, too"
    assert torch.get_default_device().type == "cpu"


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"finetune.prior.prompt: say what class the subject belongs to"):
        recipe_of(tmp_path, "finetune.prior={pictures: 3}")
    with pytest.raises(UserError, match=r"finetune.prior.prompt: say what class the subject belongs to"):
        recipe_of(tmp_path, "finetune.prior.prompt=['']")
    with pytest.raises(UserError, match=r"finetune.prior: a ControlNet learns no subject"):
        recipe_of(tmp_path, "finetune.method=none", "finetune.control=edge")
