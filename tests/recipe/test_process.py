"""Processes and objectives from the recipe: each trains, samples and survives the model folder, or is refused."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.core.rand import Draw
from latentgen.data.captions import CachedWords
from latentgen.data.fetch import CachedBatches
from latentgen.data.latents import of_one_shape
from latentgen.diffusion.parameterization import EDM, VE, Flow, V
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model, save_model
from latentgen.pipelines.generate import Request, check, generate
from latentgen.recipe import build
from latentgen.recipe.process import check_process, process
from latentgen.recipe.schema import Diffusion, Recipe
from latentgen.tasks.diffusion import DiffusionTask

SETTINGS: dict[str, dict[str, Any]] = {
    "eps-sigmoid": {"target": "eps", "schedule": "sigmoid", "weight": "p2", "p2_gamma": 0.5},
    "v-zero-snr": {"target": "v", "zero_terminal_snr": True, "weight": "soft_min_snr"},
    "x0-cosine-huber": {"target": "x0", "schedule": "cosine", "loss": "huber", "weight": "snr"},
    "flow-shifted": {"target": "flow", "shift": 2.0, "density": "logit_normal", "weight": "unit"},
    "edm": {"target": "edm", "density": "log_normal", "weight": "edm"},
    "pfgm++": {"target": "edm", "augmented_dim": 64.0, "density": "log_normal", "weight": "edm"},
    "ve": {"target": "ve", "sigma_max": 20.0, "weight": "unit", "loss": "l1"},
    "learned-variance": {"target": "v", "learned_variance": True, "schedule": "sigmoid_alpha_bar"},
    "by-loss": {"target": "v", "density": "importance", "weight": "debiased"},
    "cosine-levels": {"target": "v", "density": "cosine_interpolated", "density_low": 16.0},
    "other-noise": {"offset_noise": 0.1, "pyramid_discount": 0.4, "input_perturbation": 0.1},
}


def with_(recipe: Recipe, **diffusion: Any) -> Recipe:
    values = recipe.model_dump()
    values["diffusion"] |= diffusion
    values["unet"] |= {"channels": (8, 16), "attention": (False, True), "heads": 2, "norm_groups": 4}
    values["data"]["resolution"] = 16
    return Recipe(**values)


def cached() -> CachedBatches:
    """Latents of spread 0.5 about four patterns, with captions that say which."""
    source = np.random.default_rng(0)
    moments = np.full((8, 2, 4, 4, 4), 0.05, np.float16)
    moments[:, 0] = source.standard_normal((8, 4, 4, 4))
    states = source.standard_normal((17, 10, 16)).astype(np.float16)
    words = CachedWords({"context": states}, [(2 * i + 1, 2 * i + 2) for i in range(8)], 0.0)
    return CachedBatches(of_one_shape(moments), words)


def made(recipe: Recipe, tiny: Model) -> Model:
    return build.new_model(recipe, tiny.vae, tiny.towers)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_setting_trains_samples_and_survives_the_folder(
    name: str, tiny_recipe: Recipe, tiny: Model, draw: Callable[..., Draw], tmp_path: Path
) -> None:
    recipe = with_(tiny_recipe, **SETTINGS[name])
    check_process(recipe)
    model = made(recipe, tiny)
    task, fetch = DiffusionTask(model, build.objective(recipe, model), [], columns=1), cached()
    parameters = [p for module in task.modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3, betas=(0.9, 0.9))
    errors = []
    for _ in range(20):  # the same draws every time: any objective worth its name learns them by heart
        values = task.losses("unet", fetch(draw()), draw())
        assert all(value.isfinite() and value.ndim == 0 for value in values.values())
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
        errors.append(values["loss"].item())
    assert errors[-1] < 0.9 * errors[0]
    assert all(p.grad is not None for p in parameters)
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    p, q = model.parameterization(), again.parameterization()
    assert (q.sigma_min, q.sigma_max) == pytest.approx((p.sigma_min, p.sigma_max), rel=1e-9)
    assert again.learned_variance == model.learned_variance == recipe.diffusion.learned_variance
    request = Request("picture 1 one", num_inference_steps=3, height=16, width=16, guidance_scale=1.0)
    first, second = (np.asarray(next(generate(m, [request]))) for m in (dataclasses.replace(model), again))
    assert np.array_equal(first, second)
    assert first.std() > 0


def test_processes_of_the_recipe(tiny_recipe: Recipe, tiny: Model) -> None:
    edm = made(with_(tiny_recipe, target="edm", sigma_data=0.7, sigma_max=50.0), tiny).parameterization()
    assert edm == EDM(sigma_data=0.7, sigma_max=50.0)
    assert made(with_(tiny_recipe, target="ve", sigma_min=0.01), tiny).parameterization() == VE(sigma_min=0.01)
    plain = made(with_(tiny_recipe, target="flow"), tiny)
    assert plain.parameterization() == Flow()
    v = made(with_(tiny_recipe, zero_terminal_snr=True), tiny).parameterization()
    assert isinstance(v, V)
    assert v.sigma_max == pytest.approx(4096)


def test_the_shift_grows_with_the_side(tiny_recipe: Recipe) -> None:
    """arXiv 2403.03206, eq. 23: four times the pixels, twice the shift."""
    recipe = with_(tiny_recipe, target="flow", shift=1.5, shift_resolution=8)
    assert recipe.data.resolution == 16
    assert process(recipe) == ("flow", {"shift": 3.0})
    assert process(with_(tiny_recipe, target="flow", shift=1.5)) == ("flow", {"shift": 1.5})


def test_knobs_reach_the_objective(tiny_recipe: Recipe, tiny: Model) -> None:
    sigma, u = torch.tensor([0.3, 4.0]), torch.tensor([0.2, 0.9])
    model = made(with_(tiny_recipe, target="edm"), tiny)
    objective = build.objective(
        with_(tiny_recipe, target="edm", weight="p2", p2_k=3.0, p2_gamma=0.5, density="log_normal", density_mean=-0.4),
        model,
    )
    p = objective.parameterization
    torch.testing.assert_close(
        objective.weight(sigma, p), p.scalings(sigma).c_out ** 2 / sigma**2 * (3 + sigma**-2) ** -0.5
    )
    assert objective.density is not None
    torch.testing.assert_close(objective.density(u, p), torch.exp(-0.4 + torch.special.ndtri(u)))
    huber = build.objective(with_(tiny_recipe, loss="huber", huber_c=0.2, huber_schedule="constant"), tiny).loss
    error = torch.full((1, 1, 1, 1), 1000.0)
    assert huber(error, 0 * error, u[:1], sigma[:1]).item() == pytest.approx(2 * 0.2 * 1000, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "eps", "zero_terminal_snr": True}, "zero-terminal-SNR.*target v or x0"),
        ({"target": "v", "augmented_dim": 64.0}, "augmented_dim.*edm"),
        ({"target": "flow", "learned_variance": True}, "learned_variance.*eps, v or x0"),
        ({"density": "importance", "balanced": True}, "importance.*balanced"),
        ({"target": "edm", "augmented_dim": 64.0, "offset_noise": 0.1}, "offset_noise.*PFGM"),
        ({"learned_variance": True, "pyramid_discount": 0.3}, "pyramid_discount.*plain noise"),
        ({"learned_variance": True, "input_perturbation": 0.1}, "input_perturbation.*plain noise"),
        ({"target": "edm", "sigma_min": 3.0, "sigma_max": 2.0}, "sigma_min"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(settings: dict, message: str, tiny_recipe: Recipe) -> None:
    with pytest.raises(UserError, match=message) as told:
        build.check(with_(tiny_recipe, **settings), processes=1)
    assert "\n" not in str(told.value)


def test_a_model_to_start_from_is_checked_too(tiny_recipe: Recipe, tiny: Model) -> None:
    model = made(with_(tiny_recipe, learned_variance=True), tiny)
    with pytest.raises(UserError, match="offset_noise"):
        build.objective(with_(tiny_recipe, offset_noise=0.1), model)


@pytest.mark.parametrize(
    ("settings", "ignored"),
    [
        ({"density_std": 2.0}, ["density_std"]),
        ({"target": "flow", "zero_terminal_snr": True, "beta_end": 0.02}, ["beta_end", "zero_terminal_snr"]),
        ({"schedule": "cosine", "beta_start": 0.001}, ["beta_start"]),
        ({"target": "edm", "shift": 3.0, "sigma_data": 0.5}, ["shift"]),
        ({"target": "ve", "sigma_data": 0.5, "sigma_min": 0.1}, ["sigma_data"]),
        ({"p2_k": 2.0, "weight": "min_snr", "min_snr_gamma": 3.0}, ["p2_k"]),
        ({"weight": "unit", "min_snr_gamma": 3.0, "loss": "huber", "huber_c": 0.5}, ["min_snr_gamma"]),
        ({"loss": "l1", "huber_schedule": "constant", "vlb_weight": 0.1}, ["vlb_weight", "huber_schedule"]),
        ({"target": "v", "density": "cosine_interpolated", "density_low": 8.0, "density_mean": 1.0}, ["density_mean"]),
    ],
)
def test_what_has_no_effect_is_said_and_nothing_else(
    settings: dict, ignored: list[str], tiny_recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_process(with_(tiny_recipe, **settings))
    said = [record.getMessage().split()[0].removeprefix("diffusion.") for record in caplog.records]
    assert said == sorted(ignored, key=list(Diffusion.model_fields).index)


def test_settings_of_the_process_come_with_the_network(
    tiny_recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = with_(tiny_recipe, schedule="cosine", shift=2.0, weight="unit").model_dump()
    values["unet"]["source"] = str(tmp_path)
    with caplog.at_level(logging.WARNING):
        check_process(Recipe(**values))
    assert [record.getMessage().split()[0] for record in caplog.records] == ["diffusion.schedule", "diffusion.shift"]


def test_whoever_asks_for_a_fixed_variance_gets_it(tiny_recipe: Recipe, tiny: Model) -> None:
    """And not the one that the network learned, which is what plain ddpm takes."""
    model = made(with_(tiny_recipe, learned_variance=True), tiny)

    def draw(sampler: str) -> np.ndarray:
        request = Request("a", num_inference_steps=3, height=16, width=16, sampler=sampler)
        return np.asarray(next(generate(model, [request])), dtype=int)

    learned, small, large = (draw(f"ddpm{knob}") for knob in ("", ",variance=fixed_small", ",variance=fixed_large"))
    same_as_small = draw("ddim,eta=1")
    assert abs(small - same_as_small).max() <= 1
    assert abs(small - large).max() > 1
    assert min(abs(learned - small).max(), abs(learned - large).max()) > 1


def test_pfgm_takes_no_sampler_that_adds_noise(tiny_recipe: Recipe, tiny: Model) -> None:
    recipe = with_(tiny_recipe, target="edm", augmented_dim=64.0)
    model = made(recipe, tiny)

    def drawing(sampler: str) -> None:
        check(Request("a", num_inference_steps=3, height=16, width=16, sampler=sampler), model)

    def training(sampler: str) -> None:
        build.check(recipe.model_copy(update={"preview": recipe.preview.model_copy(update={"sampler": sampler})}), 1)

    for sampler in ("heun", "ddim,eta=0", "euler_ancestral,eta=0"):
        drawing(sampler)
        training(sampler)
    for sampler in ("ddim,eta=0.5", "heun,s_churn=4", "euler_a"):
        for asked, key in ((drawing, "--sampler"), (training, "preview.sampler")):
            with pytest.raises(UserError, match=rf"{key}.* adds normal noise, which is not PFGM"):
                asked(sampler)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "ddim,eta=3"}, "eta 3.0"),
        ({"sampler": "DPM++ 2M Karras", "schedule": "beta"}, "means the schedule 'karras'"),
        ({"schedule": "fitted"}, "preview.schedule: fitted: .* finished model"),
        ({"schedule": "karas"}, "karras"),
        ({"guidance": ("intervall",)}, "interval"),
        ({"guidance": ("cfgpp",), "guidance_scale": 0.5}, "choose euler"),
        ({"guidance": ("zero_init,steps=9",), "sampler": "euler", "num_inference_steps": 4}, "from 0 to 4"),
        ({"guidance": ("compose",), "prompts": ("a red circle AND ",)}, "empty prompt"),
    ],
)
def test_previews_that_cannot_be_drawn_are_refused_before_training(
    settings: dict, message: str, tiny_recipe: Recipe
) -> None:
    values = tiny_recipe.model_dump()
    values["preview"] |= settings
    with pytest.raises(UserError, match=message) as told:
        build.check(Recipe(**values), processes=1)
    assert "\n" not in str(told.value)


def test_previews_are_drawn_as_the_recipe_says(tiny_recipe: Recipe) -> None:
    values = tiny_recipe.model_dump()
    values["preview"] |= {"sampler": "ddim,eta=0.5", "schedule": "karras", "guidance": ["rescale"]}
    for request in build.previews(Recipe(**values)):
        assert (request.sampler, request.schedule, request.guidance) == ("ddim,eta=0.5", "karras", ("rescale",))


def test_pfgm_starts_from_its_own_noise(tiny: Model) -> None:
    """The first x has the heavy tails of the process: another length than plain noise, the same direction."""
    from latentgen.pipelines.generate import start_noise

    request = Request("a", seed=3, height=16, width=16)
    plain, heavy = start_noise(request, 4, 4), start_noise(request, 4, 4, 2.0)
    factor = (heavy / plain).flatten()
    torch.testing.assert_close(factor, factor[:1].expand_as(factor))
    assert not math.isclose(factor[0].item(), 1.0, rel_tol=0.01)
