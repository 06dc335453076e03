"""Every recipe that comes with the project loads, is planned, and trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from latentgen.recipe.finetune import makes_adapter
from latentgen.recipe.load import dump_recipe, load_recipe
from latentgen.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FINETUNE = [path for path in CONFIGS if load_recipe(path).unet.source is not None]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number, name in enumerate(["red heart", "blue star", "green tree", "pink cross", "grey cat", "white dog"]):
        colour = rng.integers(0, 255, 3, dtype=np.uint8)
        picture = Image.new("RGB", (96, 80), tuple(int(c) for c in colour))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {name}\n")
    return folder


def small(path: Path, model: Path, pictures: Path, folder: Path) -> list[str]:
    """Overrides that make a recipe as small as a test needs, and give it the data and models it lacks."""
    recipe = load_recipe(path)
    words = ["train.steps=2", "train.global_batch=2", "train.micro_batch=null", "train.warmup_steps=1"]
    words += ["train.processes=null", "train.save_every=2", "preview.num_inference_steps=1", "preview.num=1"]
    words += [f"data.cache={folder / 'cache'}", "data.size=8", "data.holdout=2", "data.workers=0"]
    words += ["autoencoder.perceptual_weight=0", "preview.prompts=[a red circle]", "preview.every=2"]
    if recipe.train.precision == "fp16":
        words += ["train.precision=fp32"]
    for section, train in (("autoencoder", recipe.autoencoder.train), ("text_encoder", recipe.text_encoder.train)):
        words += [f"{section}.train.steps=2", f"{section}.train.global_batch=2", f"{section}.train.warmup_steps=1"]
        if train.micro_batch is not None:
            words += [f"{section}.train.micro_batch=null"]
    if recipe.finetune is not None and recipe.finetune.prior is not None:
        words += ["finetune.prior.pictures=2"]
    if recipe.finetune is not None and recipe.finetune.tokens:
        words += [f"data.caption={' '.join(recipe.finetune.tokens)}, {{caption}}"]  # the words must be in captions
    if recipe.data.source == "folder":
        words += [f"data.path={pictures}", "data.split=null", "data.validation=null", "data.resolution=64"]
    for name, section in (("autoencoder", recipe.autoencoder), ("text_encoder", recipe.text_encoder),
                          ("unet", recipe.unet)):  # fmt: skip
        if section.source is not None:
            words += [f"{name}.from={model}"]
    if recipe.autoencoder.source is None:
        levels = len(recipe.autoencoder.channels)
        words += [f"autoencoder.channels={[8] * levels}", "autoencoder.norm_groups=4", "autoencoder.critic_channels=8"]
    if recipe.text_encoder.source is None:
        words += ["text_encoder.width=16", "text_encoder.layers=1", "text_encoder.heads=2", "text_encoder.embed_dim=16"]
        words += ["text_encoder.image.width=16", "text_encoder.image.layers=1", "text_encoder.image.heads=2"]
        words += ["text_encoder.vocab_size=514"]
    if recipe.unet.source is None:
        words += [f"unet.channels={[16] * len(recipe.unet.channels)}", "unet.heads=2", "unet.norm_groups=8"]
        words += ["unet.layers_per_block=1", "unet.transformer_layers=1"]
    return words


def made_by(recipe: Recipe) -> str:
    """The folder of a run that has its result."""
    if recipe.finetune is not None and recipe.finetune.control is not None:
        return "control"
    return "adapter" if makes_adapter(recipe) else "model"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_loads_and_survives_being_written_out(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_is_planned_and_trains(path, programs, model, pictures, tree, tmp_path):
    words = small(path, model, pictures, tmp_path)
    dry = programs("train", "--config", path, "--dry-run", *words, cwd=tmp_path)
    assert dry.code == 0, dry.err
    assert "total" in dry.out
    assert tree(tmp_path) == {}, "a dry run writes nothing"
    done = programs("train", "--config", path, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    recipe = load_recipe(path)
    index = {"adapter": "adapter.json", "model": "model_index.json", "control": "config.json"}
    assert (tmp_path / "runs" / recipe.name / made_by(recipe) / index[made_by(recipe)]).is_file()


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return {name: tiny.saved(name, tmp_path_factory.mktemp(name) / "model") for name in ("sd1", "sdxl")}


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: path.stem)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_finetuning_recipe_trains_models_of_others(family, path, programs, families, pictures, tmp_path):
    """The result draws something else than the model that it began from."""
    recipe, words = load_recipe(path), small(path, families[family], pictures, tmp_path)
    done = programs("train", "--config", path, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    result = tmp_path / "runs" / recipe.name / made_by(recipe)
    drawing = ["--controlnet", result, "--control", pictures / "0.png"] if result.name == "control" else []
    model = families[family] if drawing else result
    options = ["--num", 1, "--steps", 1, "--height", 64, "--width", 64, "--device", "cpu"]
    taught = next(iter(recipe.finetune.tokens), "circle") if recipe.finetune is not None else "circle"
    drawn = []
    for words in ([f"a red {taught}", "--model", model, *drawing], ["a red circle", "--model", families[family]]):
        done = programs("sample", *words, *options, cwd=tmp_path)
        assert done.code == 0, done.err
        drawn.append(np.asarray(Image.open(tmp_path / done.out.strip())))
    assert not np.array_equal(*drawn)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_is_planned_as_it_stands(path, programs, tmp_path):
    recipe = load_recipe(path)
    if recipe.data.source == "folder" or recipe.unet.source or recipe.autoencoder.source or recipe.text_encoder.source:
        pytest.skip("needs the user's own folder or a trained model")
    done = programs("train", "--config", path, "--dry-run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "total" in done.out
