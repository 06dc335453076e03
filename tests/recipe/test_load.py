"""What a recipe may say, and the one line that answers each mistake."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from latentgen.core.errors import UserError
from latentgen.diffusion.losses import LOSSES, WEIGHTS
from latentgen.diffusion.noise_levels import DENSITIES
from latentgen.diffusion.noise_tables import BETAS
from latentgen.diffusion.parameterization import PARAMETERIZATIONS
from latentgen.engine.settings import LoopSettings
from latentgen.recipe.load import dump_recipe, load_recipe, recipe_schema, valid_keys
from latentgen.recipe.schema import Recipe

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))


def written(folder: Path, text: str) -> Path:
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    return folder / "r.yaml"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train.lr", "train.learning_rate"),
        ("lr", "train.learning_rate"),
        ("autoencoder.train.lr", "autoencoder.train.learning_rate"),
        ("train.step", "train.steps"),
        ("steps", "train.steps"),
        ("train.gobal_batch", "train.global_batch"),
        ("unet.chanels", "unet.channels"),
        ("autoencoder.forme", "autoencoder.from"),
        ("text_encoder.image.patches", "text_encoder.image.patch"),
        ("data.res", "data.resolution"),
        ("diffusion.targets", "diffusion.target"),
        ("trian.steps", "train.steps"),
        ("guidance_scale", "preview.guidance_scale"),
    ],
)
def test_an_unknown_key_names_the_nearest(typed: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        load_recipe(None, [f"{typed}=1"])
    assert str(told.value) == f"command line: unknown key `{typed}`; did you mean `{meant}`?"
    value: Any = 1
    for part in reversed(typed.split(".")):
        value = {part: value}
    path = written(tmp_path, yaml.safe_dump(value))
    with pytest.raises(UserError) as told:
        load_recipe(path)
    first = typed if typed.split(".")[0] in Recipe.model_fields or "." not in typed else typed.split(".")[0]
    assert str(told.value).startswith(
        f"{path}: unknown key `{first}`; did you mean `" if first == typed else f"{path}: "
    )


def test_a_key_unlike_any_other_lists_the_sections() -> None:
    with pytest.raises(UserError) as told:
        load_recipe(None, ["zzz=1"])
    assert str(told.value) == (
        "command line: unknown key `zzz`; the sections are name, seed, data, autoencoder, text_encoder, unet, "
        "diffusion, finetune, train, preview"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: many}", "`train.steps`: Input should be a valid integer"),
        ("train: {steps: 0}", "`train.steps`: Input should be greater than or equal to 1 (found 0)"),
        ("train: {learning_rate: -1e-3}", "`train.learning_rate`: Input should be greater than 0 (found -0.001)"),
        (
            "diffusion: {target: noise}",
            "`diffusion.target`: Input should be 'eps', 'v', 'x0', 'flow', 'edm' or 've' (found 'noise')",
        ),
        ("data: 3", "`data`: Input should be a valid dictionary or instance of Data (found 3)"),
        ("name: a/b", "`name`: String should match pattern"),
        ("[1, 2]", "a recipe is a mapping of sections, found list"),
        ("train: {steps: 1, steps: 2}", "not valid YAML: key 'steps' given twice"),
        ("train: {steps: 1}\ntrain: {steps: 1}", "not valid YAML: key 'train' given twice"),
        ("name: {{x}}", "not valid YAML: a key must be a word"),
        ("train: {steps: 1", "not valid YAML"),
        ("name: !!python/object:os.system x", "not valid YAML"),
        ("data: {source: folder}", "`data`: path: say where the pictures are"),
        (
            "text_encoder: {train: {micro_batch: 2}}",
            "text_encoder.train.micro_batch: the contrastive loss needs its whole batch at once",
        ),
        ("train: {micro_batch: 0}", "`train.micro_batch`: Input should be greater than or equal to 1 (found 0)"),
        ("unet: {channels: [32]}", "unet.attention: give one true/false for each of unet.channels"),
        ("data: {resolution: 20}", "data.resolution: must be a multiple of 8"),
    ],
)
def test_mistakes_in_the_file(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as told:
        load_recipe(path)
    assert str(told.value).startswith(f"{path}: {message}")
    assert "\n" not in str(told.value)


def test_mistakes_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`train.steps` is not an override; write section.key=value"):
        load_recipe(None, ["train.steps"])
    with pytest.raises(UserError, match=r"command line, train.steps: not valid YAML"):
        load_recipe(None, ["train.steps={"])
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UserError, match="not a text file in UTF-8"):
        load_recipe(tmp_path / "picture.yaml")


def test_overrides_win_and_the_last_of_them_most(tmp_path: Path) -> None:
    path = written(tmp_path, "train: {steps: 5, learning_rate: 2e-4}\nautoencoder: {from: old}")
    recipe = load_recipe(path, ["train.steps=6", "autoencoder.from=new", "preview.prompts=[a, b]", "train.steps=7"])
    assert (recipe.train.steps, recipe.train.learning_rate, recipe.autoencoder.source) == (7, 2e-4, "new")
    assert recipe.preview.prompts == ("a", "b")
    assert load_recipe(path).train.steps == 5


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "# nothing yet\n")) == load_recipe(None) == Recipe()


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().train.steps = 3  # type: ignore[misc]


@settings(max_examples=30)
@given(
    prompts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12), min_size=1, max_size=3
    ),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,6}", fullmatch=True),
    rate=st.floats(1e-12, 1e3),
    seed=st.integers(0, 2**40),
)
def test_dump_and_load_are_inverse(
    prompts: list[str], name: str, rate: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = Recipe().model_dump()
    base.update(name=name, seed=seed)
    base["preview"]["prompts"] = tuple(prompts)
    base["train"]["learning_rate"] = rate
    recipe = Recipe(**base)
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@pytest.mark.parametrize("name", ["1e5", "12", "yes", "null", "1.5"])
def test_a_name_like_a_number_stays_a_name(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, dump_recipe(Recipe(name=name)))
    assert load_recipe(path).name == name


def test_the_dump_says_from_and_every_default() -> None:
    values = yaml.safe_load(dump_recipe(Recipe()))
    assert values["autoencoder"]["from"] is None
    assert values["train"]["steps"] == 1000
    assert set(values) == set(Recipe.model_fields)


def test_valid_keys_are_the_typed_ones() -> None:
    keys = valid_keys()
    assert {"autoencoder.from", "text_encoder.image.patch", "autoencoder.train.steps", "train", "name"} <= set(keys)
    assert "autoencoder.source" not in keys
    assert len(keys) == len(set(keys))


def test_stage_train_takes_its_own_where_given() -> None:
    recipe = load_recipe(
        None,
        [
            "train={steps: 10, learning_rate: 0.5, micro_batch: 4, global_batch: 8, save_every: 3}",
            "autoencoder.train={steps: 20, beta1: 0.0}",
            "text_encoder.train={learning_rate: 0.25}",
        ],
    )
    vae, clip, unet = (recipe.stage_train(stage) for stage in ("vae", "clip", "unet"))
    assert (vae.steps, vae.learning_rate, vae.beta1, vae.micro_batch, vae.save_every) == (20, 0.5, 0.0, 4, 3)
    assert (clip.steps, clip.learning_rate, clip.micro_batch) == (10, 0.25, None)
    assert unet == recipe.train


def test_the_loop_has_a_setting_for_each_of_its_fields() -> None:
    fields = {field.name for field in dataclasses.fields(LoopSettings)} - {"preview_every", "fit_micro_batch"}
    assert fields <= set(type(Recipe().train).model_fields)


def test_the_schema_describes_every_key() -> None:
    schema = json.loads(recipe_schema())
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Recipe.model_fields)
    sections = schema["$defs"]
    assert "from" in sections["Autoencoder"]["properties"]
    assert "source" not in sections["Autoencoder"]["properties"]
    assert sections["Train"]["properties"]["steps"]["minimum"] == 1
    choices = sections["Diffusion"]["properties"]
    assert set(choices["weight"]["enum"]) == set(WEIGHTS)
    assert set(choices["loss"]["enum"]) == set(LOSSES)
    assert set(choices["density"]["enum"]) == {*DENSITIES, "importance"}
    assert set(choices["schedule"]["enum"]) == set(BETAS) - {"squaredcos_cap_v2"}
    assert set(choices["target"]["anyOf"][0]["enum"]) == set(PARAMETERIZATIONS)
    assert all(section["additionalProperties"] is False for section in sections.values())


def test_the_schema_file_is_up_to_date() -> None:
    path = CONFIGS / "recipe.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(recipe_schema()), "run `latentgen recipe schema`"


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_of_the_project_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name
    first = path.read_text(encoding="utf-8").splitlines()[0]
    _, equals, schema = first.partition("$schema=")
    assert first.startswith("# yaml-language-server: $schema=")
    assert equals
    assert (path.parent / schema.strip()).is_file()


def test_there_are_recipes() -> None:
    assert RECIPES
