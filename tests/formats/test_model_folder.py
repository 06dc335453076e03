"""Writing a model folder and reading it back."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentgen.core.errors import UserError
from latentgen.diffusion.noise_tables import NoiseTable
from latentgen.diffusion.parameterization import Flow
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model, quiet_libraries, save_model
from latentgen.formats.scheduler import parameterization, read_schedule, scheduler_config
from latentgen.models.clip import load_clip
from latentgen.models.text import tokenize

TABLES = [
    NoiseTable(),
    NoiseTable(kind="linear", num_timesteps=500, beta_start=0.0001, beta_end=0.02),
    NoiseTable(kind="cosine"),
    NoiseTable(zero_terminal_snr=True),
]


def networks(model: Model) -> dict[str, torch.nn.Module]:
    return {"unet": model.unet, "vae": model.vae, "text_encoder": model.towers[0].encoder}


def test_what_is_read_is_what_was_written(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("v", note="träin", steps=12, latents={"mean": [0.5, 1.0]})
    save_model(model, tmp_path / "deep" / "model")
    again = load_model(tmp_path / "deep" / "model")
    for name, network in networks(model).items():
        theirs = networks(again)[name]
        assert not theirs.training
        assert theirs.state_dict().keys() == network.state_dict().keys()
        assert all(torch.equal(theirs.state_dict()[key], value) for key, value in network.state_dict().items()), name
    captions = ["a blue star", "ß ☃"]
    assert torch.equal(tokenize(again.towers[0].tokenizer, captions), tokenize(model.towers[0].tokenizer, captions))
    assert (again.prediction, again.schedule, again.metadata) == ("v", model.schedule, model.metadata)
    assert again.parameterization() == model.parameterization()
    assert again.vae.config["scaling_factor"] == 1.0


def test_only_safetensors_and_json_are_written(saved: Path) -> None:
    kinds = {path.suffix for path in saved.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}
    assert [path.name for path in saved.parent.iterdir()] == ["model"], "nothing is left beside it"


def test_dtype_of_the_file_and_of_the_loaded_model(tiny_model, tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model, tmp_path / "half", dtype=torch.float16)
    for weights in (tmp_path / "half").rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}, weights
    assert {p.dtype for p in model.unet.parameters()} == {torch.float32}, "the model in memory is left alone"
    for dtype in (torch.float32, torch.bfloat16):
        for name, network in networks(load_model(tmp_path / "half", dtype=dtype)).items():
            assert {p.dtype for p in network.parameters()} == {dtype}, name


@pytest.mark.parametrize(("network", "value", "dtype"), [
    ("unet", float("nan"), None), ("vae", float("inf"), None), ("text_encoder", 1e5, torch.float16),
])  # fmt: skip
def test_numbers_that_are_not_finite_are_not_written(network, value, dtype, tiny_model, tmp_path: Path) -> None:
    """Nor those that would not be finite in the type of the file."""
    folder = tmp_path / "model"
    save_model(tiny_model(note="good"), folder)
    bad = tiny_model(note="bad")
    name, weight = list(networks(bad)[network].named_parameters())[-1]
    with torch.no_grad():
        weight.view(-1)[-1] = value
    with pytest.raises(FloatingPointError, match=f"model is refused: {network}/{name} not finite"):
        save_model(bad, folder, dtype=dtype)
    assert load_model(folder).metadata == {"note": "good"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_older_model_is_replaced_and_anything_else_is_not(tiny_model, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(tiny_model(note="first"), folder)
    (folder / "leftover.txt").write_text("old")
    save_model(tiny_model(note="second"), folder)
    assert load_model(folder).metadata == {"note": "second"}
    assert not (folder / "leftover.txt").exists()

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "cat.png").write_bytes(b"x")
    with pytest.raises(UserError, match="pictures exists and is not a model folder"):
        save_model(tiny_model(), pictures)
    assert (pictures / "cat.png").read_bytes() == b"x"


def test_a_failed_write_leaves_the_old_model(tiny_model, tmp_path: Path) -> None:
    save_model(tiny_model(note="first"), tmp_path / "model")
    with pytest.raises(TypeError):
        save_model(tiny_model(note=object()), tmp_path / "model")
    assert load_model(tmp_path / "model").metadata == {"note": "first"}


def test_both_towers_travel_along(tiny_model, clip_builder, tmp_path: Path) -> None:
    clip = clip_builder(20)
    save_model(tiny_model(), tmp_path / "model", clip=clip)
    assert load_clip(tmp_path / "model" / "clip").shape == clip.shape
    assert load_model(tmp_path / "model").prediction == "eps"


@pytest.mark.parametrize("table", TABLES, ids=str)
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_schedules_survive_the_scheduler_file(prediction: str, table: NoiseTable) -> None:
    config = json.loads(json.dumps(scheduler_config(prediction, asdict(table))))
    assert read_schedule(config, "here") == (prediction, asdict(table))


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_alpha_bar"])
@pytest.mark.parametrize("zero", [False, True])
def test_tables_that_others_have_no_name_for_survive_as_numbers(kind: str, zero: bool) -> None:
    table = NoiseTable(kind, 300, zero_terminal_snr=zero)
    config = json.loads(json.dumps(scheduler_config("v", asdict(table))))
    assert "beta_schedule" not in config
    prediction, schedule = read_schedule(config, "here")
    assert prediction == "v"
    torch.testing.assert_close(NoiseTable(**schedule).sigmas, table.sigmas, rtol=1e-9, atol=0)
    assert read_schedule(json.loads(json.dumps(scheduler_config("v", schedule))), "here") == (prediction, schedule)


def test_a_sigmoid_table_of_diffusers_is_ours() -> None:
    config = {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid", "beta_start": 0.001, "beta_end": 0.02}
    expected = NoiseTable("sigmoid", beta_start=0.001, beta_end=0.02)
    assert read_schedule(config, "here") == ("eps", asdict(expected))


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [
        ("edm", {"sigma_data": 0.7, "sigma_min": 0.01, "sigma_max": 50.0, "augmented_dim": None}),
        ("edm", {"sigma_data": 1.0, "sigma_min": 0.002, "sigma_max": 80.0, "augmented_dim": 128.0}),
        ("ve", {"sigma_min": 0.01, "sigma_max": 30.0}),
    ],
)
def test_ranges_of_sigma_survive_the_model_folder(prediction: str, schedule: dict, tiny_model, tmp_path: Path) -> None:
    save_model(tiny_model(prediction, schedule), tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert (again.prediction, again.schedule) == (prediction, schedule)
    assert again.parameterization() == parameterization(prediction, schedule)
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    known = schedule.get("augmented_dim", 0) is None
    assert index["scheduler"][0] == ("diffusers" if known else "latentgen"), "what they cannot draw they must refuse"


def test_numbers_left_out_are_written_down() -> None:
    assert scheduler_config("edm", {})["sigma_data"] == 1.0, "diffusers would take 0.5"
    assert read_schedule({"_class_name": "EDMEulerScheduler"}, "here")[1]["sigma_data"] == 0.5


def test_flow_survives_with_its_shift() -> None:
    config = scheduler_config("flow", {"shift": 3.0})
    assert read_schedule(config, "here") == ("flow", {"shift": 3.0})
    theirs = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}
    assert read_schedule(theirs, "here") == ("flow", {"shift": 2.0})


def test_flow_model_is_a_flow(tiny_model, tmp_path: Path) -> None:
    save_model(tiny_model("flow"), tmp_path / "model")
    assert load_model(tmp_path / "model").parameterization() == Flow()


def test_what_cannot_be_said_is_refused(tiny_model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='"score"'):
        save_model(tiny_model("score", {}), tmp_path / "model")
    with pytest.raises(UserError, match="betas"):
        save_model(tiny_model("eps", {"shift": 1.0}), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "EDMEulerScheduler"),
        ({"trained_betas": [0.1]}, "num_timesteps"),
        ({"trained_betas": [0.1, 2]}, "trained_betas"),
        ({"beta_schedule": "laplace"}, "laplace"),
        ({"prediction_type": "noise"}, "noise"),
    ],
)
def test_unknown_schedulers_are_named(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_schedule(config, "scheduler_config.json")


def test_parts_of_different_models_are_refused(saved: Path, tiny_model, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "text_encoder")
    encoder = tiny_model().towers[0].encoder
    config = encoder.config.to_dict() | {"hidden_size": 32, "num_attention_heads": 2}
    type(encoder)(type(encoder.config)(**config)).save_pretrained(folder / "text_encoder")
    with pytest.raises(UserError, match="width 16, the text encoder makes 32"):
        load_model(folder)


def test_weights_that_do_not_fit_their_config_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(saved, folder)
    for part, key in (("unet", "layers_per_block"), ("vae", "layers_per_block"), ("text_encoder", "num_hidden_layers")):
        original = (folder / part / "config.json").read_text()
        (folder / part / "config.json").write_text(json.dumps(json.loads(original) | {key: 2}))
        with pytest.raises(UserError, match=part) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
        (folder / part / "config.json").write_text(original)
    assert load_model(folder).prediction == "eps"


def test_loading_is_quiet_and_leaves_the_libraries_as_they_were(saved: Path, capfd, caplog, recwarn) -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = (diffusers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())
    with caplog.at_level(logging.WARNING):
        load_model(saved)
    out = capfd.readouterr()
    assert out.out == ""
    assert out.err == ""
    assert not caplog.records
    assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)]
    assert (diffusers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    with quiet_libraries():
        assert not transformers_logging.is_progress_bar_enabled()
    assert (diffusers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
