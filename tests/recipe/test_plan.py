"""The plan counts what will be computed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from latentgen.formats.model_folder import Model, save_model
from latentgen.recipe import build
from latentgen.recipe.plan import describe, flops_of, make_plan
from latentgen.recipe.schema import Recipe


def changed(recipe: Recipe, section: str, **values: object) -> Recipe:
    return Recipe(**{**recipe.model_dump(), section: {**recipe.model_dump()[section], **values}})


def test_flops_of_known_layers() -> None:
    with torch.device("meta"):
        linear, x = nn.Linear(5, 7), torch.empty(3, 5)
        conv, image = nn.Conv2d(2, 4, 3, padding=1), torch.empty(1, 2, 8, 8)
        assert flops_of(lambda: linear(x)) == 2 * 3 * 5 * 7
        assert flops_of(lambda: conv(image)) == 2 * 8 * 8 * 4 * 2 * 9
        assert flops_of(lambda: linear(x).sum().backward()) == 2 * (2 * 3 * 5 * 7)  # the input needs no gradient


def test_flops_grow_with_steps_and_batch(tiny_recipe: Recipe) -> None:
    plan = make_plan(tiny_recipe)
    assert [stage.name for stage in plan.stages] == ["vae", "clip", "unet"]
    assert all(stage.flops > 0 and stage.disk > 0 for stage in plan.stages)
    twice = make_plan(changed(tiny_recipe, "train", steps=24, global_batch=16))
    one, two = plan.stages[2], twice.stages[2]
    assert two.flops == 4 * one.flops
    assert two.flops_per_step == 2 * one.flops_per_step
    assert plan.stages[0].flops == twice.stages[0].flops, "the autoencoder has steps and batch of its own"
    assert plan.flops == sum(stage.flops for stage in plan.stages) + plan.cache_flops


def test_parameters_are_those_that_are_built(tiny_recipe: Recipe) -> None:
    plan, vae = make_plan(tiny_recipe), build.new_vae(tiny_recipe)
    assert plan.stages[0].parameters == sum(p.numel() for p in vae.parameters())
    unet = build.new_unet(tiny_recipe, vae, tiny_recipe.text_encoder.width)
    assert plan.stages[2].parameters == sum(p.numel() for p in unet.parameters())


def test_caches_grow_with_the_data(tiny_recipe: Recipe) -> None:
    plan = make_plan(tiny_recipe)
    latents = 32 * 2 * 4 * 16 * 16
    text = 32 * 2 * 12 * 32
    assert plan.cache_disk == 2 * (latents + text)
    assert make_plan(changed(tiny_recipe, "data", flip=True)).cache_disk == 2 * (2 * latents + text)
    assert plan.disk == plan.cache_disk + sum(stage.disk for stage in plan.stages)


def test_the_autoencoder_is_planned_at_the_side_it_sees(tiny_recipe: Recipe) -> None:
    whole = make_plan(tiny_recipe).stages[0].flops
    quarter = make_plan(changed(tiny_recipe, "autoencoder", patch=32)).stages[0].flops
    assert quarter * 4 == whole


def test_a_plan_of_parts_that_exist_already(tiny_recipe: Recipe, tiny: Model, tmp_path: Path) -> None:
    save_model(tiny, tmp_path / "start")
    recipe = tiny_recipe
    for section in ("autoencoder", "text_encoder", "unet"):
        recipe = changed(recipe, section, source=str(tmp_path / "start"))
    plan = make_plan(recipe)
    assert [stage.name for stage in plan.stages] == ["unet"]
    assert plan.stages[0].parameters == sum(p.numel() for p in tiny.unet.parameters())
    assert plan.cache_flops > 0


def test_describe_shows_the_whole_recipe_and_the_total(tiny_recipe: Recipe) -> None:
    text = describe(tiny_recipe)
    assert "global_batch: 8" in text
    assert text.splitlines()[-1].startswith("total")
