"""The plan counts what will be computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from latentgen.formats.model import Model
from latentgen.formats.model_folder import save_model
from latentgen.models.context import Context
from latentgen.models.control import build_control
from latentgen.models.late_interaction import late_loss
from latentgen.models.unet import predict
from latentgen.recipe import build
from latentgen.recipe.plan import Plan, _late_flops, flops_of, make_plan
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


def test_comparing_words_with_places_is_counted_whole(tiny_recipe: Recipe) -> None:
    recipe = changed(tiny_recipe, "text_encoder", contrasts=2)
    text, batch = recipe.text_encoder, recipe.stage_train("clip").global_batch
    with torch.device("meta"):
        places = torch.empty(batch, 5, text.embed_dim, requires_grad=True)
        words = torch.empty(3 * batch, text.context_length, text.embed_dim, requires_grad=True)
        mask, scale = torch.empty(words.shape[:2]), torch.empty(())
        trained = flops_of(lambda: late_loss(places, words, mask, scale, 2).backward())
        assert _late_flops(recipe, 5) == trained


@pytest.fixture(scope="module")
def plan(tiny_recipe: Recipe) -> Plan:
    return make_plan(tiny_recipe)


@pytest.fixture(scope="module")
def larger(tiny_recipe: Recipe) -> Plan:
    """For the U-Net twice the steps and the batch, mirrored pictures, a quarter of each for the autoencoder, and a
    state to go back to."""
    recipe = changed(tiny_recipe, "train", steps=24, global_batch=16, rollback_every=5)
    recipe = changed(recipe, "data", flip=True)
    return make_plan(changed(recipe, "autoencoder", patch=32))


def test_flops_grow_with_steps_and_batch(plan: Plan, larger: Plan) -> None:
    assert [stage.name for stage in plan.stages] == ["vae", "clip", "unet"]
    assert all(stage.flops > 0 and stage.disk > 0 for stage in plan.stages)
    one, two = plan.stages[2], larger.stages[2]
    assert two.flops == 4 * one.flops
    assert two.flops_per_step == 2 * one.flops_per_step
    assert plan.flops == sum(stage.flops for stage in plan.stages) + plan.cache_flops


def test_a_good_state_makes_every_checkpoint_twice_as_large(plan: Plan, larger: Plan, tiny_recipe: Recipe) -> None:
    checkpoints = tiny_recipe.train.keep_last + 1
    for one, two in zip(plan.stages, larger.stages, strict=True):
        assert two.disk - one.disk == 16 * one.parameters * checkpoints


def test_the_autoencoder_is_planned_at_the_side_it_sees(plan: Plan, larger: Plan) -> None:
    assert larger.stages[0].flops * 4 == plan.stages[0].flops, "with steps and batch of its own"


def test_shapes_are_planned_by_how_many_pictures_they_have(plan: Plan, tiny_recipe: Recipe) -> None:
    square, wide = {(64, 64): 32}, {(32, 64): 32}
    assert make_plan(tiny_recipe, square) == plan
    half = make_plan(tiny_recipe, wide)
    both = make_plan(tiny_recipe, {(64, 32): 8, (32, 64): 16, (64, 64): 8})
    for stage, one, mixed in zip(plan.stages, half.stages, both.stages, strict=True):
        share = (stage.flops_per_step + 3 * one.flops_per_step) / 4
        assert mixed.flops_per_step == pytest.approx(share, rel=1e-12)
    assert half.stages[0].flops == plan.stages[0].flops / 2, "an autoencoder without attention"
    assert half.stages[1].flops == plan.stages[1].flops, "CLIP sees squares"
    assert half.stages[2].flops < plan.stages[2].flops / 2 + plan.stages[2].flops / 4
    assert both.cache_disk == (plan.cache_disk + 3 * half.cache_disk) / 4


def test_pictures_that_are_encoded_anew_are_not_kept(plan: Plan, tiny_recipe: Recipe) -> None:
    live = make_plan(changed(tiny_recipe, "data", live=True))
    latents, batch = 2 * 32 * 2 * 4 * 16 * 16, tiny_recipe.train.global_batch
    assert plan.cache_disk - live.cache_disk == latents
    encode = (live.stages[2].flops_per_step - plan.stages[2].flops_per_step) / batch
    assert encode > 0
    assert plan.cache_flops - live.cache_flops == pytest.approx(32 * encode)


def test_parameters_are_those_that_are_built(plan: Plan, tiny_recipe: Recipe) -> None:
    vae = build.new_vae(tiny_recipe)
    assert plan.stages[0].parameters == sum(p.numel() for p in vae.parameters())
    unet = build.new_unet(tiny_recipe, vae, tiny_recipe.text_encoder.width)
    assert plan.stages[2].parameters == sum(p.numel() for p in unet.parameters())


def test_caches_grow_with_the_data(plan: Plan, larger: Plan) -> None:
    latents = 32 * 2 * 4 * 16 * 16
    text = 32 * 2 * 12 * 32
    assert plan.cache_disk == 2 * (latents + text)
    assert larger.cache_disk == 2 * (2 * latents + text)
    assert plan.disk == plan.cache_disk + sum(stage.disk for stage in plan.stages)


def test_a_plan_of_parts_that_exist_already(tiny_recipe: Recipe, tiny: Model, tmp_path: Path) -> None:
    save_model(tiny, tmp_path / "start")
    recipe = tiny_recipe
    for section in ("autoencoder", "text_encoder", "unet"):
        recipe = changed(recipe, section, source=str(tmp_path / "start"))
    plan = make_plan(recipe)
    assert [stage.name for stage in plan.stages] == ["unet"]
    assert plan.stages[0].parameters == sum(p.numel() for p in tiny.unet.parameters())
    assert plan.cache_flops > 0


def planned(recipe: Recipe, start: Path, finetune: dict[str, object] | None) -> Plan:
    for section in ("autoencoder", "text_encoder", "unet"):
        recipe = changed(recipe, section, source=str(start))
    return make_plan(Recipe(**{**recipe.model_dump(), "finetune": finetune}))


def test_a_controlnet_is_planned_with_what_passes_through_the_unet(
    tiny_recipe: Recipe, tiny: Model, tmp_path: Path
) -> None:
    save_model(tiny, tmp_path / "start")
    plain, beside = (
        planned(tiny_recipe, tmp_path / "start", finetune) for finetune in (None, {"method": "none", "control": "edge"})
    )
    control = build_control(tiny.unet, 4, 4)
    assert beside.stages[0].parameters == sum(p.numel() for p in control.parameters())
    assert beside.cache_flops == plain.cache_flops
    latents, context, picture = torch.randn(1, 4, 16, 16), Context(torch.randn(1, 10, 16)), torch.rand(1, 3, 64, 64)
    networks = {"unet": tiny.unet, "control": control}
    with torch.no_grad():
        forward = flops_of(lambda: predict(networks, latents, torch.zeros(1), context, control=picture))
    own = beside.stages[0].flops_per_step / tiny_recipe.train.global_batch
    assert 2 * forward < own < 3 * forward, "the U-Net's first half has no backward pass, its second half half of one"


def test_an_inpainting_step_encodes_what_is_outside_the_mask(tiny_recipe: Recipe, tiny: Model, tmp_path: Path) -> None:
    save_model(tiny, tmp_path / "start")
    plain, holes = (
        planned(tiny_recipe, tmp_path / "start", finetune)
        for finetune in (None, {"method": "full", "inpainting": True})
    )
    assert holes.stages[0].parameters == plain.stages[0].parameters + 5 * 8 * 9
    picture = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        encode = flops_of(lambda: tiny.vae.encode(picture))
    more = (holes.stages[0].flops_per_step - plain.stages[0].flops_per_step) / tiny_recipe.train.global_batch
    convolution = 2 * 2 * 16 * 16 * 5 * 8 * 9  # forward, and the weights' gradient: the input needs none
    assert more == encode + convolution


def test_the_table_ends_with_the_total(plan: Plan) -> None:
    lines = plan.table().splitlines()
    assert len(lines) == 6
    assert lines[-1].split() == ["total", f"{plan.flops:.2e}", f"{plan.disk / 2**20:.0f}"]
