"""From the recipe's values to networks: a function of the seed and the stage, and of nothing that ran before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import Flow, V
from latentgen.formats.model import Model
from latentgen.formats.model_folder import save_model
from latentgen.recipe import build, sources
from latentgen.recipe.schema import Recipe
from latentgen.recipe.schema_data import Data


def with_(recipe: Recipe, **sections: dict) -> Recipe:
    values = recipe.model_dump()
    for section, changes in sections.items():
        values[section] = {**values[section], **changes} if isinstance(changes, dict) else changes
    return Recipe(**values)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_random_weights_follow_from_the_seed_alone(tiny_recipe: Recipe) -> None:
    vae = build.new_vae(tiny_recipe)
    torch.rand(7)
    assert same(build.new_vae(tiny_recipe), vae)
    assert not same(build.new_vae(tiny_recipe.model_copy(update={"seed": 1})), vae)
    clip = build.new_clip(tiny_recipe, 600, 599)
    torch.rand(7)
    assert same(build.new_clip(tiny_recipe, 600, 599), clip)
    unet = build.new_unet(tiny_recipe, vae, 32)
    torch.rand(7)
    assert same(build.new_unet(tiny_recipe, vae, 32), unet)


def test_held_out_shapes_are_others(tiny_recipe: Recipe) -> None:
    found = sources.examples(tiny_recipe)
    seen, kept = found.training, found.held_out
    assert found.apart
    assert (len(seen), len(kept)) == (32, 4)
    assert seen.key() != kept.key()
    pictures = {seen.image(i).tobytes() for i in range(32)}
    assert not any(kept.image(i).tobytes() in pictures for i in range(4))


def test_an_unet_whose_latents_are_no_whole_pixels(tiny_recipe: Recipe, tiny: Model) -> None:
    recipe = with_(tiny_recipe, data={"resolution": 36})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"resolution": 34})})
    with pytest.raises(UserError, match=r"data.resolution: 34 is not a multiple of 4"):
        build.new_unet(recipe, tiny.vae, 16)


def test_objective_passes_its_knobs(tiny_recipe: Recipe, tiny: Model) -> None:
    recipe = with_(
        tiny_recipe,
        diffusion={"density": "logit_normal", "density_mean": 1.0, "density_std": 1e-6, "min_snr_gamma": 0.5},
    )
    objective = build.objective(recipe, tiny)
    p = objective.parameterization
    assert isinstance(p, V)
    sigma = objective.density(torch.tensor([0.2, 0.8]), p)
    expected = p.sigma_of_fraction(torch.sigmoid(torch.ones(2)))
    torch.testing.assert_close(sigma, expected, rtol=1e-3, atol=0)
    low = torch.tensor([0.1])  # SNR 100
    torch.testing.assert_close(objective.weight(low, p), p.scalings(low).c_out ** 2 * 0.5)


def test_what_is_learned_of_the_posterior_comes_with_the_autoencoder(
    tiny_recipe: Recipe, tiny: Model, tmp_path: Path
) -> None:
    plain = with_(tiny_recipe, autoencoder={"posterior": None})
    assert build.posterior(plain) == "sample"
    learned = {"recipe": {"autoencoder": {"posterior": "mean"}}}
    save_model(dataclasses.replace(tiny, metadata=learned), tmp_path / "ours")
    save_model(tiny, tmp_path / "foreign")
    (tmp_path / "foreign" / "latentgen.json").unlink()
    for folder, own, expected in (
        ("ours", None, "mean"),
        ("ours", "sample", "sample"),
        ("foreign", None, "sample"),
        ("foreign", "mean", "mean"),
    ):
        recipe = with_(tiny_recipe, autoencoder={"source": str(tmp_path / folder), "posterior": own})
        assert build.posterior(recipe) == expected
        assert build.objective(recipe, tiny).posterior == expected


def test_new_model_predicts_what_is_asked(tiny_recipe: Recipe, tiny: Model) -> None:
    recipe = with_(tiny_recipe, diffusion={"target": "flow"})
    model = build.new_model(recipe, tiny.vae, tiny.towers)
    assert isinstance(model.parameterization(), Flow)
    assert model.unet.config["cross_attention_dim"] == 16
    model = build.new_model(tiny_recipe, tiny.vae, tiny.towers)
    assert isinstance(model.parameterization(), V)
    assert model.parameterization().table.kind == "scaled_linear"


def test_fine_tuning_keeps_the_process_of_the_start(
    tiny_recipe: Recipe, tiny_builder: Callable[..., Model], tmp_path: Path
) -> None:
    start = tiny_builder("eps")
    save_model(start, tmp_path / "start")
    recipe = with_(tiny_recipe, unet={"source": str(tmp_path / "start")})
    model = build.new_model(recipe, start.vae, start.towers)
    assert model.prediction == "eps"
    assert same(model.unet, start.unet)
    with pytest.raises(UserError, match=r"diffusion.target: v, but .* predicts eps"):
        build.new_model(with_(recipe, diffusion={"target": "v"}), start.vae, start.towers)
    other = build.new_vae(with_(tiny_recipe, autoencoder={"latent_channels": 3}))
    with pytest.raises(UserError, match=r"autoencoder: unet.from expects width 4, this one gives 3"):
        build.new_model(recipe, other, start.towers)


def test_previews_put_a_prompts_pictures_in_a_row(tiny_recipe: Recipe) -> None:
    requests = build.previews(with_(tiny_recipe, preview={"prompts": ("a", "b"), "num": 3, "seed": 5}))
    assert [(r.prompt, r.seed) for r in requests] == [("a", 5), ("a", 6), ("a", 7), ("b", 5), ("b", 6), ("b", 7)]
    assert {(r.height, r.width) for r in requests} == {(64, 64)}


def test_cut_of_a_stage(tiny_recipe: Recipe) -> None:
    recipe = with_(tiny_recipe, train={"micro_batch": 2})
    assert build.cut(recipe, "unet", 1, 2).rows() == [range(4, 6), range(6, 8)]
    assert build.cut(recipe, "clip", 1, 2).rows() == [range(4, 8)]


def test_false_captions_of_a_folder_are_ignored_aloud(
    tiny_recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build.check(with_(tiny_recipe, text_encoder={"contrasts": 2}), processes=1)
    assert "contrasts" not in caplog.text
    folder = {"source": "folder", "path": str(tmp_path)}
    build.check(with_(tiny_recipe, data=folder, text_encoder={"contrasts": 2}), processes=1)
    assert "text_encoder.contrasts is ignored" in caplog.text


def test_going_back_needs_spikes_to_go_back_for(tiny_recipe: Recipe) -> None:
    recipe = with_(tiny_recipe, train={"rollback_every": 5})
    build.check(recipe, 1)
    assert build.loop_settings(recipe, "vae").rollback_every == 5
    with pytest.raises(UserError, match=r"train\.rollback_every: .* give train\.spikes a number"):
        build.check(with_(tiny_recipe, train={"rollback_every": 5, "spikes": None}), 1)


def test_shapes_must_suit_both_networks(tiny_recipe: Recipe, tiny: Model) -> None:
    """The tiny autoencoder makes pictures 4 times smaller, the U-Net 2 times."""

    def check(shapes: tuple = ((48, 80),), **changes: object) -> None:
        recipe = with_(tiny_recipe, data={"buckets": 2, "bucket_step": 16}, autoencoder=changes)
        build.check_shapes(recipe, shapes, tiny.vae, tiny.unet)

    check()
    check(patch=48)
    with pytest.raises(UserError, match=r"autoencoder\.patch: 64 is larger than 48"):
        check(patch=64)
    with pytest.raises(UserError, match=r"autoencoder\.critic_weight: .* smallest side of data\.buckets is 16"):
        check(((64, 64), (16, 128)), critic_weight=1.0)
    recipe = with_(tiny_recipe, data={"buckets": 2, "bucket_step": 12})
    with pytest.raises(UserError, match=r"data\.bucket_step: 12 is not a multiple of 8"):
        build.check_shapes(recipe, [(48, 84)], tiny.vae, tiny.unet)
    with pytest.raises(ValueError, match=r"bucket_step: 128 is larger than data\.resolution, 64"):
        with_(tiny_recipe, data={"buckets": 2, "bucket_step": 128})


def test_settings_of_the_data_without_effect_are_told(tiny_recipe: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    build.check(tiny_recipe, 1)
    assert "ignored" not in caplog.text
    data = {"crop": "random", "buckets": 2, "mask": "alpha"}
    build.check(with_(tiny_recipe, data=data), 1)
    assert all(f"data.{key} is ignored: the pictures" in caplog.text for key in data)
    build.check(with_(tiny_recipe, data={"bucket_step": 16, "mask_floor": 0.5}), 1)
    assert "data.bucket_step is ignored without data.buckets" in caplog.text
    assert "data.mask_floor is ignored without data.mask" in caplog.text


EVERY_SOURCE = {"shapes", "folder", "table", "shards", "datasets", "mixture"}


@pytest.mark.parametrize(
    ("key", "value", "ignoring"),
    [
        ("path", "pictures", {"shapes", "mixture"}),
        ("validation", "pictures", {"shapes", "mixture"}),
        ("split", "test", {"table", "mixture"}),
        ("subset", "small", EVERY_SOURCE - {"datasets"}),
        ("streaming", True, EVERY_SOURCE - {"datasets"}),
        ("image_column", "file", EVERY_SOURCE - {"table", "datasets"}),
        ("caption_columns", ("words",), {"shapes"}),
        ("max_pixels", 1000, {"shapes"}),
        ("background", "black", {"shapes"}),
        ("size", 500, EVERY_SOURCE - {"shapes"}),
        ("window", 2, {"shapes", "folder", "mixture"}),
        ("local_gib", 1.0, EVERY_SOURCE - {"shards"}),
    ],
)
def test_settings_that_a_source_has_no_use_for_are_told(
    key: str, value: object, ignoring: set[str], tiny_recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = set()
    for source in sorted(EVERY_SOURCE):
        caplog.clear()
        data: dict[str, object] = {"source": source} if source == "shapes" else {"source": source, "path": "x"}
        if source == "mixture":
            data = {"source": source, "mixture": ({"source": "folder", "path": "x"},)}
        value = str(tmp_path) if key == "validation" else value
        build.check(with_(tiny_recipe, data={"size": Data().size, **data, key: value}), 1)
        told |= {source} if f"data.{key} is ignored" in caplog.text else set()
    assert told == ignoring
