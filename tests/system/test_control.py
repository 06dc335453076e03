"""ControlNet and inpainting fine-tuning, from a model folder to pictures."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionInpaintPipeline
from PIL import Image
from safetensors.torch import load_file

STEP = "latentgen.engine.step:Stepper.__call__"
KILL, INT = int(signal.SIGKILL), int(signal.SIGINT)

RECIPE = """\
name: tuned
data: {size: 24, captions: 2, holdout: 4, flip: true, cache: CACHE}
unet: {from: MODEL}
finetune: FINETUNE
train: {steps: 6, global_batch: 8, learning_rate: 1.0e-2, warmup_steps: 2, log_every: 2, save_every: 3,
  validate_every: 3, ema_lengths: [0.1], ema_snapshots: 2, ema_precision: fp32}
preview: {every: 3, num: 1, num_inference_steps: 1}
"""
FEW = ("train.steps=2", "train.warmup_steps=1", "train.validate_every=0", "preview.every=2")
CONTROL, INPAINTING = "{method: none, control: edge}", "{method: full, inpainting: true}"
KINDS = {"control": CONTROL, "inpainting": INPAINTING}


def recipe(folder: Path, model: Path, finetune: str) -> Path:
    text = RECIPE.replace("CACHE", str(folder / "cache")).replace("MODEL", str(model)).replace("FINETUNE", finetune)
    (folder / "tuned.yaml").write_text(text)
    return folder / "tuned.yaml"


@pytest.fixture(scope="module")
def tuned(programs, model, tmp_path_factory):
    """Kind -> a run folder of it, trained without interruption."""
    runs = {}
    for kind, finetune in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        done = programs("train", "--config", recipe(folder, model, finetune), cwd=folder)
        assert done.code == 0, done.err
        runs[kind] = folder / "runs/tuned"
    return runs


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    picture = np.full((64, 64, 3), 255, dtype=np.uint8)
    picture[16:48, 16:40] = (200, 30, 30)
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(picture).save(folder / "picture.png")
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def drawn(programs, cwd: Path, *words: object) -> Path:
    done = programs("sample", "a red square", "--num", 1, "--steps", 2, "--device", "cpu", *words, cwd=cwd)
    assert done.code == 0, done.err
    return cwd / done.out.strip()


def test_a_controlnet_is_the_result_and_draws(programs, tuned, model, scene, tmp_path):
    run = tuned["control"]
    assert {path.name for path in (run / "control").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "latentgen.json",
    }  # fmt: skip
    assert not (run / "model").exists(), "the model stays what it was"
    control = run / "control"
    words = ("--model", model, "--controlnet", control, "--control", scene / "picture.png")
    plain, whole = drawn(programs, tmp_path, "--model", model), drawn(programs, tmp_path, *words)
    assert abs(pixels(plain) - pixels(whole)).max() > 1, "it says something"
    assert (pixels(drawn(programs, tmp_path, *words)) == pixels(whole)).all()
    assert (pixels(drawn(programs, tmp_path, *words, "--control-scale", 0)) == pixels(plain)).all()
    lines = drawn(programs, tmp_path, *words, "--control-edges", "--control-end", 0.5)
    text = Image.open(lines).text  # type: ignore[attr-defined]
    told = json.loads(text["latentgen"])
    assert (told["control"], told["controlnet"]) == (str(scene / "picture.png"), str(control))
    assert (told["control_scale"], told["control_end"], told["control_edges"]) == (1.0, 0.5, True)
    assert len(told["controlnet_sha256"]) == 64
    assert "Control: picture.png" in text["parameters"]


def test_diffusers_opens_it(tuned, model):
    theirs = ControlNetModel.from_pretrained(tuned["control"] / "control")
    stored = load_file(tuned["control"] / "control/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in theirs.state_dict().items())
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(model, controlnet=theirs)
    pipeline.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (64, 64))
    found = pipeline("a star", picture, num_inference_steps=1, height=64, width=64, output_type="np").images
    assert found.shape == (1, 64, 64, 3)
    assert np.isfinite(found).all()


def test_it_is_measured_and_previewed(tuned, measured):
    for run in tuned.values():
        found = measured(run)
        assert {step for _, kind, step in found if kind == "validation"} == {0, 3, 6}
        first, last = (found["unet", "validation", step]["held_out/loss"] for step in (0, 6))
        assert first != last
        assert {path.name for path in (run / "samples/unet").glob("*.png")} == {f"0000000{n}.png" for n in (0, 3, 6)}
        assert "<svg" in (run / "report.html").read_text()


def test_an_inpainting_model_is_the_result_and_draws(programs, tuned, scene, tmp_path):
    folder = tuned["inpainting"] / "model"
    assert json.loads((folder / "unet/config.json").read_text())["in_channels"] == 9
    weight = load_file(folder / "unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert weight[:, 4:].any(), "the new channels have learned"
    words = ("--model", folder, "--image", scene / "picture.png")
    one = drawn(programs, tmp_path, *words, "--mask", scene / "mask.png")
    assert abs(pixels(one) - pixels(drawn(programs, tmp_path, "--model", folder))).max() > 1
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    picture, mask = Image.open(scene / "picture.png"), Image.open(scene / "mask.png")
    given = {"image": picture, "mask_image": mask, "height": 64, "width": 64}
    found = pipeline("a star", num_inference_steps=1, output_type="np", **given).images
    assert found.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_it_ends_in_the_same_bytes(kind, programs, model, tuned, weights, measured, tree, tmp_path):
    command = ("train", "--config", recipe(tmp_path, model, KINDS[kind]))
    for calls, number, code in ((5, KILL, -KILL), (1, INT, 75)):  # a checkpoint is of step 3; then one of step 4
        done = programs(*command, cwd=tmp_path, kill=[STEP, calls, number])
        assert done.code == code, done.err
    done = programs(*command, cwd=tmp_path)
    assert done.code == 0, done.err
    run = tmp_path / "runs/tuned"
    assert weights(run) == weights(tuned[kind])
    assert measured(run) == measured(tuned[kind])
    name = "control" if kind == "control" else "model"
    stored = [tree(folder / name) for folder in (run, tuned[kind])]
    for files in stored:
        files.pop("latentgen.json")  # the recipe names the folder of its cache
    assert stored[0] == stored[1]
    before = tree(run)
    again = programs(*command, cwd=tmp_path)
    assert again.code == 0
    assert "is finished" in again.err
    assert tree(run) == before


@pytest.mark.parametrize("kind", KINDS)
def test_how_it_is_computed_changes_nothing_but_rounding(kind, programs, model, tuned, tmp_path):
    how = ("unet.gradient_checkpointing=true", "train.micro_batch=2", "data.workers=1")
    done = programs("train", "--config", recipe(tmp_path, model, KINDS[kind]), *how, cwd=tmp_path)
    assert done.code == 0, done.err
    file = next((tmp_path / "runs/tuned/stages/unet").glob("*.safetensors"))
    ours, theirs = load_file(file), load_file(tuned[kind] / "stages/unet" / file.name)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_averages_of_other_lengths(kind, programs, tuned, model, tmp_path):
    run = tuned[kind]
    done = programs("ema", run, "--length", 0.1, "--out", tmp_path / "average", cwd=tmp_path)
    assert done.code == 0, done.err
    folder, name = (tmp_path / "average", "control") if kind == "control" else (tmp_path / "average/unet", "unet")
    found = load_file(folder / "diffusion_pytorch_model.safetensors")
    tracked = load_file(run / f"checkpoints/unet/00000006/ema-{name}-0.1.safetensors")
    for key, value in tracked.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)


def test_a_controlnet_for_sdxl(programs, model, scene, tmp_path):
    base = tiny.saved("sdxl", tmp_path / "sdxl")
    done = programs("train", "--config", recipe(tmp_path, base, CONTROL), *FEW, cwd=tmp_path)
    assert done.code == 0, done.err
    control = tmp_path / "runs/tuned/control"
    words = ("--controlnet", control, "--control", scene / "picture.png", "--control-edges")
    path = drawn(programs, tmp_path, "--model", base, "--height", 64, "--width", 64, *words)
    assert pixels(path).shape == (64, 64, 3)
    done = programs("sample", "a star", "--model", model, *words, cwd=tmp_path)
    assert done.code == 2
    (line,) = done.errors
    assert "control: a ControlNet of another family than the model: text states of width 96, not 16; take one" in line


def test_an_inpainting_base_learns_on(programs, scene, tmp_path):
    """As it is, with or without a word in the recipe; and a ControlNet can be trained beside it."""
    base = tiny.saved("sd1-inpaint", tmp_path / "base")
    for name, finetune in (("plain", "null"), ("said", INPAINTING), ("beside", CONTROL)):
        done = programs("train", "--config", recipe(tmp_path, base, finetune), *FEW, f"name={name}", cwd=tmp_path)
        assert done.code == 0, done.err
    one, two = (tmp_path / f"runs/{name}/stages/unet" for name in ("plain", "said"))
    ours, theirs = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (one, two))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    words = ["--control", scene / "picture.png", "--image", scene / "picture.png", "--mask", scene / "mask.png"]
    words += ["--controlnet", tmp_path / "runs/beside/control", "--height", 64, "--width", 64]
    assert pixels(drawn(programs, tmp_path, "--model", base, *words)).shape == (64, 64, 3)


def test_second_pictures_of_a_folder(programs, model, tmp_path):
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for number in range(12):
        for end in (".png", ".control.png"):
            levels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(levels).save(folder / f"{number:02d}{end}")
        (folder / f"{number:02d}.txt").write_text(f"a picture of number {number}")
    own = ["data.source=folder", f"data.path={folder}", "finetune.control=picture"]
    command = ("train", "--config", recipe(tmp_path, model, CONTROL), *own, *FEW)
    done = programs(*command, cwd=tmp_path)
    assert done.code == 0, done.err
    run = tmp_path / "runs/tuned"
    assert (run / "control/config.json").is_file()
    shown = {path.read_bytes() for path in folder.glob("*.control.png")}
    first = Image.open(run / "samples/unet/inputs/0-control.png")
    assert any(np.array_equal(np.asarray(first), np.asarray(Image.open(path))) for path in folder.glob("*.control.png"))
    assert len(shown) == 12
    Image.new("RGB", (64, 64)).save(folder / "03.control.png")
    changed = programs(*command, cwd=tmp_path)
    assert changed.code == 2
    assert "other data" in changed.errors[-1]
    (folder / "05.control.png").unlink()
    missing = programs(*command, "name=other", cwd=tmp_path)
    assert missing.code == 2
    assert "have none to follow, the first is 05.png; put 05.control.png beside it" in missing.errors[-1]
    assert not (tmp_path / "runs/other").exists()


MISTAKES = {
    "no ControlNet": (["--control", "SCENE"], ["--control", "nothing would look at it", "--controlnet FOLDER"]),
    "no picture": (["--controlnet", "CONTROL"], ["--controlnet", "add --control FILE"]),
    "no such picture": (["--controlnet", "CONTROL", "--control", "gone.png"], ["--control gone.png", "no such file"]),
    "no such ControlNet": (["--controlnet", "gone", "--control", "SCENE"], ["there is no ControlNet at gone"]),
    "a model": (["--controlnet", "MODEL", "--control", "SCENE"], ["a model folder, not a ControlNet's"]),
    "a run": (["--controlnet", "RUN", "--control", "SCENE"], ["is a run folder; its ControlNet is", "control"]),
    "edges of nothing": (["--control-edges"], ["--control-edges", "add --control FILE"]),
    "scale": (["--controlnet", "CONTROL", "--control", "SCENE", "--control-scale", "-1"], ["--control-scale -1"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_sampling_refuses(mistake, programs, tuned, model, scene, tmp_path):
    words, expected = MISTAKES[mistake]
    run = tuned["control"]
    names = {"SCENE": scene / "picture.png", "CONTROL": run / "control", "MODEL": model, "RUN": run}
    done = programs("sample", "a star", "--model", model, *(names.get(word, word) for word in words), cwd=tmp_path)
    assert done.code == 2
    (line,) = done.errors
    assert all(word in line for word in expected), line
    assert not list(tmp_path.iterdir())


REFUSED = {
    "{method: full, control: edge}": ["finetune.control", "method: none"],
    "{method: none, control: picture}": ["finetune.control: picture", "a second picture"],
    "{method: lora, inpainting: true}": ["finetune.inpainting", "no channels for a mask", "finetune.method: full"],
    "{method: none, control: edge, inpainting: true}": ["finetune.inpainting", "no channels for a mask"],
}


@pytest.mark.parametrize("finetune", REFUSED)
def test_training_refuses(finetune, programs, model, tmp_path):
    path = recipe(tmp_path, model, finetune)
    for words in (["--dry-run"], []):
        done = programs("train", "--config", path, *words, cwd=tmp_path)
        assert done.code == 2
        assert all(word in done.errors[-1] for word in REFUSED[finetune]), done.errors
        assert {entry.name for entry in tmp_path.iterdir()} == {"tuned.yaml"}
