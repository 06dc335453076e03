"""Every way in which a folder is no whole model gets one line that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentgen.core.errors import UserError
from latentgen.formats.folder_check import check_folder, check_safetensors
from latentgen.formats.model_folder import load_model

NEEDED = [
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "scheduler/scheduler_config.json",
]


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_folder_passes(saved: Path) -> None:
    assert check_folder(saved) == {
        "unet": ("UNet2DConditionModel", None),
        "vae": ("AutoencoderKL", None),
        "text_encoder": ("CLIPTextModel", None),
    }


@pytest.mark.parametrize("name", NEEDED)
def test_missing_files_are_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    assert f"{name} is missing" in refusal(copied)


@pytest.mark.parametrize("name", ["model_index.json", *NEEDED])
def test_files_cut_off_are_named(copied: Path, name: str) -> None:
    content = (copied / name).read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 3):
        (copied / name).write_bytes(content[:length])
        message = refusal(copied)
        assert name in message
        assert "cut off" in message


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_of_a_weight_file_is_seen(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = (saved / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))
    part = tmp_path / "part.safetensors"
    part.write_bytes(whole[:length])
    with pytest.raises(UserError, match=r"part\.safetensors"):
        check_safetensors(part)


def test_a_file_that_is_too_long_or_another_kind(copied: Path) -> None:
    weights = copied / "vae/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole + b"xx")
    assert "too long" in refusal(copied)
    weights.write_bytes((20).to_bytes(8, "little") + b"not json at all, but long enough")
    assert "not safetensors" in refusal(copied)


def test_the_tokenizer_may_be_old_or_new_but_not_absent(copied: Path) -> None:
    (copied / "tokenizer/tokenizer.json").unlink()
    assert "tokenizer/tokenizer.json is missing" in refusal(copied)
    (copied / "tokenizer/vocab.json").write_text("{}")
    assert "tokenizer/merges.txt is missing" in refusal(copied)


def test_what_is_not_a_model_folder_is_described(saved: Path, tmp_path: Path) -> None:
    assert "no model folder at" in refusal(tmp_path / "nowhere")
    assert "is a file" in refusal(saved / "model_index.json")
    assert "holds nothing" in refusal(tmp_path)
    for index in range(8):
        (tmp_path / f"picture{index}.png").touch()
    assert "picture0.png" in refusal(tmp_path)
    assert "and 2 more" in refusal(tmp_path)
    assert f"its model is {saved}" in refusal(saved.parent)


def test_other_pipelines_are_named(copied: Path) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    two = index | {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]}
    (copied / "model_index.json").write_text(json.dumps(two))
    assert "StableDiffusionXLPipeline" in refusal(copied)
    transformer = {key: value for key, value in index.items() if key != "unet"} | {"_class_name": "PixArtPipeline"}
    (copied / "model_index.json").write_text(json.dumps(transformer))
    assert "PixArtPipeline" in refusal(copied)
    assert "unet" in refusal(copied)
    (copied / "model_index.json").write_text("[]")
    assert "model_index.json" in refusal(copied)


def test_pickled_weights_are_refused(copied: Path) -> None:
    weights = copied / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "pickled" in refusal(copied)


def test_half_precision_names_are_understood(copied: Path) -> None:
    weights = copied / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert check_folder(copied)["unet"].variant == "fp16"
    assert load_model(copied).prediction == "eps"


def test_shards_are_checked_one_by_one(tiny_model, copied: Path) -> None:
    shutil.rmtree(copied / "unet")
    tiny_model().unet.save_pretrained(copied / "unet", max_shard_size="50KB")
    assert load_model(copied).prediction == "eps"
    shards = sorted((copied / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    assert f"unet/{shards[-1].name} is missing" in refusal(copied)
