"""A ControlNet's folder: written whole, and what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.formats.control import load_control, save_control, with_control
from latentgen.formats.model import Model
from latentgen.formats.model_folder import save_model
from latentgen.models.control import build_control


@pytest.fixture
def folder(tiny: Model, tmp_path: Path) -> Path:
    save_control(build_control(tiny.unet, 4, 4), tmp_path / "control", {"steps": 3})
    return tmp_path / "control"


def test_there_and_back(tiny: Model, folder: Path, tmp_path: Path) -> None:
    control = load_control(folder)
    assert not control.training
    save_control(control, tmp_path / "again", {})
    back = load_control(tmp_path / "again").state_dict()
    assert all(torch.equal(back[key], value) for key, value in control.state_dict().items())
    assert json.loads((folder / "latentgen.json").read_text())["metadata"] == {"steps": 3}
    assert with_control(tiny, folder).networks().keys() == tiny.networks().keys() | {"control"}
    assert not list(tmp_path.rglob("*.partial"))


def test_a_model_folder_leaves_the_controlnet_out(tiny: Model, folder: Path, tmp_path: Path) -> None:
    save_model(with_control(tiny, folder), tmp_path / "model")
    save_model(tiny, tmp_path / "plain")
    names = [{str(p.relative_to(tmp_path / name)) for p in (tmp_path / name).rglob("*")} for name in ("model", "plain")]
    assert names[0] == names[1]


def test_what_is_not_finite_is_not_written(tiny: Model, tmp_path: Path) -> None:
    control = build_control(tiny.unet, 4, 4)
    with torch.no_grad():
        control.conv_in.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"the ControlNet .*conv_in.weight not finite"):
        save_control(control, tmp_path / "control", {})
    assert not (tmp_path / "control").exists()


def test_something_else_is_not_replaced(tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"mine exists and is not a ControlNet: it is left as it is; choose"):
        save_control(build_control(tiny.unet, 4, 4), tmp_path / "mine", {})


def cut(folder: Path) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def missing(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def other_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DConditionModel"}))


def other_widths(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "block_out_channels": [16, 32]}))


def scrambled(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, r"control/diffusion_pytorch_model.safetensors is cut off: .*; copy it again"),
        (missing, r"control/diffusion_pytorch_model.safetensors is missing; copy or download it again"),
        (other_class, r"control holds a UNet2DConditionModel, not a ControlNetModel; name another folder"),
        (other_widths, r"control: weights and config.json do not make a ControlNetModel"),
        (scrambled, r"control/config.json is cut off or not JSON"),
        (no_config, r"control is no ControlNet: no config.json; name a folder with config.json and diffusion_pytorch"),
    ],
)
def test_harm_is_named(harm: Callable[[Path], None], message: str, folder: Path) -> None:
    harm(folder)
    with pytest.raises(UserError, match=message):
        load_control(folder)


def test_other_folders(tiny: Model, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no ControlNet at .*gone; name a folder with config.json and"):
        load_control(tmp_path / "gone")
    save_model(tiny, tmp_path / "model")
    with pytest.raises(UserError, match=r"model is a model folder, not a ControlNet's; name a folder with config.json"):
        load_control(tmp_path / "model")
    with pytest.raises(UserError, match=r"is a run folder; its ControlNet is .*control"):
        load_control(tmp_path)
