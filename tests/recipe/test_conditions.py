"""What is shown beside words: networks made ready for it, batches that bring it, previews that begin from it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny as families
import torch
from PIL import Image
from pydantic import ValidationError

from latentgen.core.errors import UserError
from latentgen.data.captions import CachedWords
from latentgen.data.edges import edges
from latentgen.data.fetch import CachedBatches
from latentgen.data.latents import of_one_shape
from latentgen.data.reading import Reading
from latentgen.data.sources.folder import FolderStore
from latentgen.data.sources.stored import Pictures
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model
from latentgen.models.control import widen
from latentgen.pipelines.editing import hole_of
from latentgen.pipelines.generate import check, generate
from latentgen.pipelines.pictures import cells
from latentgen.recipe.conditions import SHOWN, conditioned, previews, starting_model, write_inputs
from latentgen.recipe.schema import Recipe
from latentgen.tasks.diffusion import HOLE, DiffusionTask, Objective

INPAINTING = {"method": "full", "inpainting": True}
CONTROL = {"method": "none", "control": "edge"}


def tuned(recipe: Recipe, finetune: dict[str, Any], **sections: dict[str, Any]) -> Recipe:
    """`recipe` for pictures of the tiny model, fine-tuned from somewhere."""
    values = recipe.model_dump(by_alias=True)
    values |= {"finetune": finetune, "unet": {"from": "base"}, "data": {**values["data"], "resolution": 16}}
    for name, changes in sections.items():
        values[name] = {**values[name], **changes}
    return Recipe.model_validate(values)


@pytest.fixture
def inpainting(tiny_recipe: Recipe) -> Recipe:
    return tuned(tiny_recipe, INPAINTING)


@pytest.fixture
def following(tiny_recipe: Recipe) -> Recipe:
    return tuned(tiny_recipe, CONTROL)


def test_step_zero_draws_what_the_base_draws(
    inpainting: Recipe,
    following: Recipe,
    tiny: Model,
    tiny_builder: Callable[..., Model],
    few: Callable,
    tmp_path: Path,
) -> None:
    request = previews(tuned(inpainting, {"method": "full"}), tiny, few(), tmp_path)[0]
    request = dataclasses.replace(request, num_inference_steps=3)
    base = np.asarray(next(generate(tiny, [request])))
    widened = starting_model(inpainting, tiny_builder())
    assert widened.inpaints
    assert np.array_equal(np.asarray(next(generate(widened, [request]))), base)
    beside = starting_model(following, tiny_builder())
    write_inputs(following, beside, few(), tmp_path)
    followed = dataclasses.replace(request, control=previews(following, beside, few(), tmp_path)[0].control)
    assert np.array_equal(np.asarray(next(generate(beside, [followed]))), base)


def test_an_inpainting_base_is_taken_as_it_is(inpainting: Recipe, tiny_builder: Callable[..., Model]) -> None:
    model = tiny_builder()
    widen(model.unet, 4)
    with torch.no_grad():
        model.unet.conv_in.weight.normal_()
    before = model.unet.conv_in.weight.clone()
    assert torch.equal(starting_model(inpainting, model).unet.conv_in.weight, before)


def test_a_controlnet_follows_from_the_seed(following: Recipe, tiny: Model) -> None:
    one = starting_model(following, tiny).control
    torch.rand(7)
    two = starting_model(following, tiny).control
    other = starting_model(following.model_copy(update={"seed": 1}), tiny).control
    assert one is not None
    assert two is not None
    assert other is not None
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_other_recipes_leave_the_model_alone(tiny_recipe: Recipe, tiny: Model) -> None:
    assert starting_model(tiny_recipe, tiny) is tiny
    assert starting_model(tuned(tiny_recipe, {"method": "full"}), tiny) is tiny


def test_small_matrices_cannot_learn_new_channels(tiny_recipe: Recipe, tiny: Model) -> None:
    recipe = tuned(tiny_recipe, {"method": "lora", "inpainting": True})
    with pytest.raises(UserError, match=r"^finetune.inpainting: the U-Net of unet.from \(base\) has no channels for a"):
        starting_model(recipe, tiny)
    assert not tiny.inpaints, "and nothing was changed"


def test_second_pictures_need_a_folder(tiny_recipe: Recipe) -> None:
    with pytest.raises(ValidationError, match=r"finetune.control: picture: needs data with a second picture"):
        tuned(tiny_recipe, {"method": "none", "control": "picture"})


def cached(examples: int = 8) -> CachedBatches:
    source = np.random.default_rng(0)
    moments = np.abs(source.standard_normal((2 * examples, 2, 4, 4, 4))).astype(np.float16)
    states = source.standard_normal((examples + 1, 10, 16)).astype(np.float16)
    words = CachedWords({"context": states}, [(i + 1,) for i in range(examples)], 0.3)
    return CachedBatches(of_one_shape(moments, mirrors=True), words)


KINDS = {"inpainting": (INPAINTING, {"image", "mask"}), "control": (CONTROL, {"control"})}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_bring_it(
    kind: str, tiny_recipe: Recipe, tiny_builder: Callable, few: Callable, draw: Callable
) -> None:
    finetune, names = KINDS[kind]
    recipe = tuned(tiny_recipe, finetune)
    batch = conditioned(recipe, starting_model(recipe, tiny_builder()), few(8), cached())(draw())
    assert batch.keys() == cached()(draw()).keys() | names
    for name in names:
        assert batch[name].shape == (8, 1 if name == "mask" else 3, 16, 16)
    if kind == "control":
        lines = torch.from_numpy(edges(few(8).image(0))).permute(2, 0, 1) / 255
        assert any(torch.equal(batch["control"][0], found) for found in (lines, lines.flip(-1)))


def task_of(recipe: Recipe, model: Model) -> DiffusionTask:
    def uniform(u: torch.Tensor, p: Any) -> torch.Tensor:
        return p.sigma_of_fraction(u)

    objective = Objective(model.parameterization(), uniform, lambda sigma, p: torch.ones_like(sigma))
    name = "unet" if model.control is None else "control"
    return DiffusionTask(model, objective, [], columns=1, trains=(name,))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_see_it_and_do_not_depend_on_the_cut(
    kind: str, tiny_recipe: Recipe, tiny_builder: Callable, few: Callable, draw: Callable
) -> None:
    finetune, names = KINDS[kind]
    recipe = tuned(tiny_recipe, finetune)
    model = starting_model(recipe, tiny_builder())
    task, fetch = task_of(recipe, model), conditioned(recipe, model, few(8), cached())
    task.model.unet.requires_grad_(kind == "inpainting")
    with torch.no_grad():
        for weight in next(iter(task.modules.values())).parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        whole = task.losses("unet", fetch(draw()), draw())["loss"]
        parts = [task.losses("unet", fetch(d), d)["loss"] for d in (draw(range(a, a + 2)) for a in range(0, 8, 2))]
        torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-4, atol=1e-6)
        other = {key: 1 - value if key in names else value for key, value in fetch(draw()).items()}
        assert abs(float(task.losses("unet", other, draw())["loss"] - whole)) > 1e-6, "what is shown counts"
        measured = task.measure(task.modules, fetch(draw()), draw())["loss"]
    assert measured.shape == (8,)
    task.losses("unet", fetch(draw()), draw())["loss"].backward()
    trained = next(iter(task.modules.values()))
    assert any(bool(weight.grad.any()) for weight in trained.parameters() if weight.grad is not None)
    if kind == "control":
        assert all(weight.grad is None for weight in model.unet.parameters())


def test_an_inpainting_network_is_shown_the_mask_and_what_is_outside(
    inpainting: Recipe, tiny_builder: Callable, few: Callable, draw: Callable
) -> None:
    """Noisy latents, mask, latents of the rest: what is inside the hole never reaches it."""
    model = starting_model(inpainting, tiny_builder())
    task, fetch = task_of(inpainting, model), conditioned(inpainting, model, few(8), cached())
    batch = fetch(draw())
    shown = task.draws(batch, draw()).channels
    assert shown is not None
    assert shown.shape == (8, 5, 4, 4)
    assert not shown.requires_grad
    assert torch.equal(shown[:, :1], batch["mask"][:, :, ::4, ::4]), "the mask is the first of them"
    hidden = {**batch, "image": torch.where(batch["mask"] > 0, 255 - batch["image"], batch["image"])}
    assert torch.equal(task.draws(hidden, draw()).channels, shown)
    seen = {**batch, "image": torch.where(batch["mask"] > 0, batch["image"], 255 - batch["image"])}
    assert not torch.equal(task.draws(seen, draw()).channels, shown)


@pytest.mark.parametrize("kind", KINDS)
def test_previews_begin_from_held_out_pictures(
    kind: str, tiny_recipe: Recipe, tiny_builder: Callable, few: Callable, tmp_path: Path, caplog: Any
) -> None:
    recipe = tuned(tiny_recipe, KINDS[kind][0], preview={"num": 2, "num_inference_steps": 1})
    model, held_out = starting_model(recipe, tiny_builder()), few(6, 3)
    write_inputs(recipe, model, held_out, tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "inputs").iterdir()}
    write_inputs(recipe, model, held_out, tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "inputs").iterdir()} == before, "the same every time"
    requests = previews(recipe, model, held_out, tmp_path)
    assert [r.seed for r in requests] == [0, 1] * SHOWN
    assert [r.prompt for r in requests[::2]] == [held_out.captions(i)[0] for i in range(SHOWN)]
    for number, request in enumerate(requests[::2]):
        check(request, model)
        if kind == "inpainting":
            assert request.image is not None
            assert np.array_equal(np.asarray(Image.open(request.image)), held_out.image(number))
            assert 0.01 < hole_of(request).mean() < 1
        else:
            assert request.control is not None
            assert np.array_equal(np.asarray(Image.open(request.control)), edges(held_out.image(number)))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        previews(tuned(recipe, KINDS[kind][0], preview={"prompts": ("a", "b")}), model, held_out, tmp_path)
    assert "preview.prompts is ignored" in caplog.text
    assert len(previews(recipe, model, few(2), tmp_path)) == 4, "fewer where fewer are held out"


@pytest.mark.parametrize("kind", KINDS)
def test_a_preview_shows_what_it_began_from(
    kind: str, tiny_recipe: Recipe, tiny_builder: Callable, few: Callable, tmp_path: Path
) -> None:
    recipe = tuned(tiny_recipe, KINDS[kind][0], preview={"num": 2, "num_inference_steps": 1})
    model, held_out = starting_model(recipe, tiny_builder()), few(6, 3)
    write_inputs(recipe, model, held_out, tmp_path)
    task = task_of(recipe, model)
    task.previews, task.columns = previews(recipe, model, held_out, tmp_path), 2
    task.preview(task.modules, 5, tmp_path)
    sheet = Image.open(tmp_path / "00000005.png")
    assert json.loads(sheet.text["latentgen"])["columns"] == 3  # type: ignore[attr-defined]
    rows = cells(sheet, SHOWN, 3, captions=True)
    last = np.asarray(rows[0][2].resize((16, 16), Image.Resampling.NEAREST))
    if kind == "control":
        assert np.array_equal(last, edges(held_out.image(0)))
    else:
        hole = hole_of(task.previews[0])
        assert (last[hole] == HOLE).all()
        assert np.array_equal(last[~hole], held_out.image(0)[~hole])


def test_an_inpainting_base_is_shown_masks_beside_a_controlnet_too(
    following: Recipe, tiny_builder: Callable, few: Callable, draw: Callable, tmp_path: Path
) -> None:
    model = tiny_builder()
    widen(model.unet, 4)
    model = starting_model(following, model)
    fetch = conditioned(following, model, few(8), cached())
    assert {"control", "mask", "image"} <= fetch(draw()).keys()
    with torch.no_grad():
        assert task_of(following, model).losses("unet", fetch(draw()), draw())["loss"].isfinite()
    write_inputs(following, model, few(), tmp_path)
    for request in previews(following, model, few(), tmp_path):
        check(request, model)
        assert None not in (request.control, request.image, request.mask)


def test_sdxl_is_told_where_each_picture_comes_from(
    tiny_recipe: Recipe, draw: Callable, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for number, (width, height) in enumerate([(90, 60), (60, 90), (40, 40)]):
        Image.new("RGB", (width, height)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a picture")
    reading = Reading(32, "random", shapes=((32, 32),))
    source = Pictures(FolderStore(str(tmp_path)), reading)
    model = load_model(families.saved("sdxl", tmp_path_factory.mktemp("sdxl") / "model"))
    assert model.sizes == 6
    live = dataclasses.replace(cached(3), latents=None, pictures=source, crop=True)
    d = draw(range(6), global_batch=6, indices=(0, 1, 2, 0, 1, 2))
    sizes = conditioned(tiny_recipe, model, source, live)(d)["sizes"]
    assert sizes.shape == (6, 6)
    assert sizes[:3, :2].tolist() == [[60, 90], [90, 60], [40, 40]], "as they were, height first"
    assert sizes[:, 4:].tolist() == [[32, 32]] * 6
    down, across = d.uniform("crop", (2,)).T
    free = torch.tensor([[0, 16], [16, 0], [0, 0]] * 2)
    expected = torch.stack([down, across], dim=1) * free
    assert float((sizes[:, 2:4] - expected).abs().max()) <= 1
    assert int((sizes[:, 2:4] > 0).any(dim=1).sum()) >= 3
