"""Model folders as plain data: variants, shards, half downloads, pickles; and what is written."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import published
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from latentgen.core.errors import UserError
from latentgen.formats.credits import Credits
from latentgen.formats.folder_parts import parts_of_folder, write_folder_from
from latentgen.formats.model_folder import load_model
from latentgen.formats.parts import Parts, cast
from latentgen.formats.sources import open_source

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def assert_equal(one: Parts, other: Parts) -> None:
    assert one.states.keys() == other.states.keys()
    for part, state in one.states.items():
        assert state.keys() == other.states[part].keys()
        assert all(torch.equal(value, other.states[part][key]) for key, value in state.items())


def test_what_is_written_loads_as_a_model_with_the_same_tensors(saved: Path, tmp_path: Path) -> None:
    write_folder_from(parts_of_folder(saved), tmp_path / "again")
    first, second = load_model(saved), load_model(tmp_path / "again")
    for part in ("unet", "vae", "text_encoder"):
        one, other = first.networks()[part].state_dict(), second.networks()[part].state_dict()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert (first.prediction, first.schedule) == (second.prediction, second.schedule)


def test_half_precision_variants_and_shards_are_read(saved: Path, copied: Path) -> None:
    whole = parts_of_folder(saved)
    (copied / "unet" / WEIGHTS).rename(copied / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    tensors = load_file(copied / "vae" / WEIGHTS)
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, copied / "vae" / file)
    (copied / "vae" / WEIGHTS).unlink()
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (copied / "vae" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert_equal(whole, parts_of_folder(copied))
    (copied / "vae" / next(iter(shards))).unlink()
    with pytest.raises(UserError, match=r"is not complete: vae/.*00001-of.*one of 2 shards; copy or download it"):
        parts_of_folder(copied)


def test_names_that_diffusers_had_before_are_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published.saved("sd1"), tmp_path / "old"))
    vae = load_file(folder / "vae" / WEIGHTS)
    former = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for new, old in former.items():
        vae = {name.replace(new, old) if "attentions" in name else name: value for name, value in vae.items()}
    save_file(vae, folder / "vae" / WEIGHTS)
    text = load_file(folder / "text_encoder" / "model.safetensors")
    text = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in text.items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(text, folder / "text_encoder" / "model.safetensors")
    assert_equal(parts_of_folder(published.saved("sd1")), parts_of_folder(folder))


def test_pickled_weights_are_opened_only_when_allowed(saved: Path, copied: Path) -> None:
    torch.save(load_file(copied / "unet" / WEIGHTS), copied / "unet" / "diffusion_pytorch_model.bin")
    (copied / "unet" / WEIGHTS).unlink()
    with pytest.raises(UserError, match="--allow-pickle"):
        parts_of_folder(copied)
    assert_equal(parts_of_folder(saved), parts_of_folder(copied, allow_pickle=True))


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (f"unet/{WEIGHTS}", r"is not complete: unet/.* is missing"),
        ("unet/config.json", r"unet/config.json"),
        ("tokenizer/tokenizer.json", r"tokenizer/tokenizer.json is missing"),
        ("model_index.json", r"no model_index.json"),
        ("scheduler/scheduler_config.json", r"scheduler_config.json"),
    ],
)
def test_what_lacks_is_named_in_one_line(gone: str, said: str, copied: Path) -> None:
    (copied / gone).unlink()
    with pytest.raises(UserError, match=said) as caught:
        parts_of_folder(copied)
    assert "\n" not in str(caught.value)


def test_other_networks_are_refused(copied: Path) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    index["unet"] = ["diffusers", "Transformer2DModel"]
    (copied / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="Transformer2DModel; only UNet2DConditionModel"):
        parts_of_folder(copied)


def test_nothing_else_is_overwritten(saved: Path, tmp_path: Path) -> None:
    parts = parts_of_folder(saved)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(UserError, match="is left as it is"):
        write_folder_from(parts, tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    two = replace(parts, states={part: parts.states[part] for part in ("vae", "text_encoder")})
    with pytest.raises(UserError, match="only vae and text_encoder"):
        write_folder_from(two, tmp_path / "two")


def test_damaged_weights_are_refused(saved: Path) -> None:
    parts = parts_of_folder(saved)
    vae = {**parts.states["vae"], "decoder.conv_in.bias": torch.full((8,), float("nan"))}
    with pytest.raises(UserError, match=r"vae/decoder.conv_in.bias.*damaged"):
        cast(replace(parts, states={**parts.states, "vae": vae}), None)


def test_the_model_card_says_what_is_known(saved: Path, tmp_path: Path, caplog) -> None:
    recipe = {
        "data": {"path": "/home/me/cats", "resolution": 64},
        "train": {"steps": 5, "global_batch": 2, "optimizer": "adamw", "learning_rate": 1e-4},
        "unet": {"from": "someone/model"},
    }
    parts = replace(parts_of_folder(saved), metadata={"latentgen": "1", "metadata": {"recipe": recipe}}, card=None)
    credits = Credits(license="apache-2.0", author="Ann", title="Cats", trigger_phrase="a sks cat")
    write_folder_from(parts, tmp_path / "out", credits=credits)
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["base_model"]) == ("apache-2.0", "someone/model")
    assert header["pipeline_tag"] == "text-to-image"
    for said in ("# Cats", "Ann", "a sks cat", "Data: cats, 64x64", "5 steps of 2 pictures"):
        assert said in card
    assert "/home" not in card
    again = parts_of_folder(tmp_path / "out")
    assert again.metadata == parts.metadata
    with caplog.at_level(logging.WARNING):
        write_folder_from(again, tmp_path / "copy", credits=Credits(license="mit"))
    assert (tmp_path / "copy" / "README.md").read_text() == card
    assert "it is kept" in caplog.text


def test_sources_are_folders_runs_files_and_the_hub(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copytree(saved, tmp_path / "run" / "model")
    assert_equal(open_source(str(saved)), open_source(str(tmp_path / "run")))
    with pytest.raises(UserError, match=r"org/name-1\.0.*Hugging Face hub.*check the spelling") as caught:
        open_source("org/name-1.0")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"there is no file runs/x\.safetensors"):
        open_source("runs/x.safetensors")
    from latentgen.formats.single_file.read import Wishes

    with pytest.raises(UserError, match="--prediction is for single files"):
        open_source(str(saved), Wishes(prediction="v"))
