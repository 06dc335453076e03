"""Fine-tuning, whole: trained, stopped and gone on with, drawn from, given to diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from latentgen.data.sources.shapes import ShapesSource
from latentgen.formats.model_folder import load_model
from latentgen.formats.opening import open_model
from latentgen.formats.parts import canonical
from latentgen.pipelines.pictures import cells

STEP = "latentgen.engine.step:Stepper.__call__"
RECIPE = """\
name: tuned
data: {{source: folder, path: {pictures}, resolution: 64, flip: true, cache: {cache}}}
unet: {{from: {model}}}
finetune: {finetune}
diffusion: {{caption_dropout: 0.3}}
train: {{steps: 6, global_batch: 8, learning_rate: 1.0e-2, warmup_steps: 2, log_every: 2, save_every: 3,
  validate_every: 3, ema_decay: 0.5}}
preview: {{every: 3, num: 2, num_inference_steps: 2, prompts: ["{prompt}"]}}
"""
METHODS = {
    "full": "{method: full}",
    "full with text": "{method: full, text_encoders: true, text_learning_rate: 1.0e-3}",
    "lora": "{rank: 2}",
    "lora everywhere": "{rank: 2, alpha: 1.0, targets: [all], rank_pattern: {attn1: 1}, text_encoders: true}",
    "dora": "{method: dora, rank: 2}",
    "lokr": "{method: lokr, rank: 2}",
    "loha": "{method: loha, rank: 2, targets: [attention, convolution]}",
    "word": "{method: none, tokens: {<thing>: {start: circle, vectors: 2}}}",
    "word and lora": "{rank: 2, tokens: {<thing>: {}}, token_learning_rate: 1.0e-2}",
    "full with prior": "{method: full, prior: {prompt: ['', a red circle, a star], pictures: 4}}",
}


def recipe(folder: Path, model: Path, method: str) -> Path:
    text = METHODS[method]
    prompt = "a red <thing>" if "tokens" in text else "a red circle"
    pictures = folder.parent / "pictures"
    if not pictures.is_dir():
        world = ShapesSource(seed=1, size=24, split="train", resolution=64)
        pictures.mkdir()
        for number in range(len(world)):
            Image.fromarray(world.image(number)).save(pictures / f"{number:02}.png")
            (pictures / f"{number:02}.txt").write_text(f"a <thing> and {world.captions(number)[0]}")
    path = folder / "tuned.yaml"
    path.write_text(
        RECIPE.format(cache=folder.parent / "cache", pictures=pictures, model=model, finetune=text, prompt=prompt)
    )
    return path


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny.saved(name, tmp_path_factory.mktemp(name) / "model") for name in ("sd1", "sdxl")}


def trained(programs: Any, path: Path, **hooks: Any) -> Path:
    """The result of the run, a model folder or an adapter folder."""
    done = programs("train", "--config", path, cwd=path.parent, **hooks)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    return path.parent / "runs/tuned"


def result(run: Path) -> Path:
    return run / "adapter" if (run / "adapter").is_dir() else run / "model"


def last_preview(run: Path) -> list[np.ndarray]:
    sheet = Image.open(run / "samples/unet/00000006.png")
    return [np.asarray(cell) for cell in cells(sheet, 1, 2, captions=True)[0]]


def drawn(programs: Any, model: Path, cwd: Path, prompt: str, *more: Any) -> list[np.ndarray]:
    words = ("--num", 2, "--steps", 2, "--device", "cpu", "--height", 64, "--width", 64, *more)
    done = programs("sample", prompt, "--model", model, *words, cwd=cwd)
    assert done.code == 0, done.err
    return [np.asarray(Image.open(cwd / line)) for line in done.out.splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_the_last_preview_is_what_users_draw(method: str, programs: Any, model: Path, tmp_path: Path) -> None:
    run = trained(programs, recipe(tmp_path, model, method))
    prompt = "a red <thing>" if "word" in method else "a red circle"
    pictures = drawn(programs, result(run), tmp_path, prompt)
    scale = last_preview(run)[0].shape[0] // 64
    for ours, previewed in zip(pictures, last_preview(run), strict=True):
        assert np.array_equal(ours, previewed[::scale, ::scale])
    before = drawn(programs, model, tmp_path, "a red circle")
    assert not np.array_equal(before[0], pictures[0])


@pytest.mark.parametrize("method", ["lora everywhere", "word and lora", "full with text", "full with prior"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_other_families(family: str, method: str, programs: Any, families: dict[str, Path], tmp_path: Path) -> None:
    run = trained(programs, recipe(tmp_path, families[family], method))
    prompt = "a red <thing>" if "word" in method else "a red circle"
    pictures = drawn(programs, result(run), tmp_path, prompt)
    scale = last_preview(run)[0].shape[0] // 64
    for ours, previewed in zip(pictures, last_preview(run), strict=True):
        assert np.array_equal(ours, previewed[::scale, ::scale])


@pytest.mark.parametrize("method", ["lora everywhere", "word and lora", "full with text"])
def test_stopped_at_any_step_and_gone_on_with(method: str, programs: Any, model: Path, tmp_path: Path) -> None:
    whole = trained(programs, recipe(_made(tmp_path / "whole"), model, method))
    expected = _weights(result(whole))
    path = recipe(_made(tmp_path / "parts"), model, method)
    for step in (2, 3):  # each counted from its start: in the second step, and in the fifth
        done = programs("train", "--config", path, cwd=path.parent, kill=[STEP, step, 15])
        assert done.code == 75, done.err
    assert _weights(result(trained(programs, path))) == expected


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _weights(folder: Path) -> dict[str, Any]:
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found[str(file.relative_to(folder))] = {key: value.numpy().tobytes() for key, value in load_file(file).items()}
    assert found
    return found


def test_a_lora_opens_in_diffusers(programs: Any, families: dict[str, Path], tmp_path: Path) -> None:
    run = trained(programs, recipe(tmp_path, families["sd1"], "lora everywhere"))
    files = json.loads((run / "adapter/adapter.json").read_text())["lora"]
    assert set(files) == {"diffusers", "kohya"}
    ours = open_model(run / "adapter").model
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5.0])
    with torch.no_grad():
        context = ours.encode(["a red circle"])
        expected = ours.unet(x, t, **context.inputs()).sample
        for file in files.values():
            pipeline = StableDiffusionPipeline.from_pretrained(families["sd1"])
            pipeline.load_lora_weights(run / "adapter", weight_name=file)
            states = pipeline.encode_prompt("a red circle", "cpu", 1, do_classifier_free_guidance=False)[0]
            torch.testing.assert_close(states, context.states, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(pipeline.unet(x, t, states).sample, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_whole_model_opens_in_diffusers(
    family: str, programs: Any, families: dict[str, Path], tmp_path: Path
) -> None:
    """As its folder, and as the single file that is exported of it."""
    folder = trained(programs, recipe(tmp_path, families[family], "full with text")) / "model"
    done = programs("export", folder, tmp_path / "file.safetensors", cwd=tmp_path)
    assert done.code == 0, done.err
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    offline: dict[str, Any] = {"config": str(folder), "local_files_only": True}
    opened = (kind.from_pretrained(folder), kind.from_single_file(tmp_path / "file.safetensors", **offline))
    model, before = load_model(folder), load_model(families[family])
    for name, network in model.networks().items():
        state = network.state_dict()
        for pipeline in opened:
            theirs = canonical(name, pipeline.components[name].state_dict())
            assert all(torch.equal(theirs[key], value) for key, value in canonical(name, state).items())
        same = [torch.equal(value, before.networks()[name].state_dict()[key]) for key, value in state.items()]
        assert all(same) == (name == "vae"), "all but the autoencoder was trained"


def test_strength_of_a_lora(programs: Any, model: Path, tmp_path: Path) -> None:
    run = trained(programs, recipe(tmp_path, model, "lora"))
    file = run / "adapter/tuned.safetensors"
    base, off, half, full = (
        drawn(programs, model, tmp_path, "a red circle", *more)[0].astype(int)
        for more in ((), ("--lora", f"{file}:0"), ("--lora", f"{file}:0.5"), ("--lora", file))
    )
    assert np.array_equal(base, off)
    assert 0 < np.abs(half - base).mean() < np.abs(full - base).mean()
    assert np.array_equal(full, drawn(programs, run / "adapter", tmp_path, "a red circle")[0])


def test_frozen_weights_are_in_no_checkpoint(programs: Any, model: Path, tmp_path: Path) -> None:
    run = trained(programs, recipe(tmp_path, model, "lora"))
    size = sum(file.stat().st_size for file in (run / "checkpoints/unet/000006").rglob("*") if file.is_file())
    unet = sum(p.numel() for p in load_model(model).unet.parameters()) * 4
    assert size < unet


@pytest.mark.parametrize("method", ["lora everywhere", "word", "word and lora", "full with text"])
def test_averages_of_other_lengths(method: str, programs: Any, model: Path, tmp_path: Path) -> None:
    """A length that was tracked comes out as it was tracked, and is drawn from; another one is another."""
    path = recipe(tmp_path, model, method)
    settings = ("train.ema_lengths=[0.05,0.2]", "train.ema_snapshots=2", "train.ema_precision=fp32")
    done = programs("train", "--config", path, *settings, cwd=tmp_path)
    assert done.code == 0, done.err
    run = tmp_path / "runs/tuned"
    for length in (0.05, 0.1):
        made = programs("ema", run, "--length", length, "--out", tmp_path / str(length), cwd=tmp_path)
        assert made.code == 0, made.err
    assert _weights(tmp_path / "0.05") != _weights(tmp_path / "0.1")
    prompt = "a red <thing>" if "word" in method else "a red circle"
    one, other = (drawn(programs, tmp_path / name, tmp_path, prompt)[0] for name in ("0.05", "0.1"))
    assert not np.array_equal(one, other)
    tracked = load_file(next((run / "checkpoints/unet/00000006").glob("ema-*-0.05.safetensors")))
    if method == "word":
        found = load_file(tmp_path / "0.05/thing.safetensors")["<thing>"]
        torch.testing.assert_close(found, tracked["rows.text_encoder"], rtol=0, atol=1e-6)


def test_a_word_that_no_caption_has(programs: Any, model: Path, tmp_path: Path) -> None:
    done = programs("train", "--config", recipe(tmp_path, model, "word"), "finetune.tokens={<toy>: {}}", cwd=tmp_path)
    assert done.code == 2
    assert done.errors[-1] == (
        "error: finetune.tokens: <toy> is in no caption, so nothing would teach it; say data.trigger: <toy>, or "
        "write it into the captions, such as `a photo of <toy>`"
    )
