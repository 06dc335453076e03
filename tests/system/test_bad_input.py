"""Mistakes: one clear line on standard error, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentgen.cli import drawing
from latentgen.cli.main import app
from latentgen.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

TRAIN = {
    # words of the command line -> words that the line must hold
    "unknown key in the file": (["--config", "unknown.yaml"], ["unknown.yaml", "train.lerning_rate", "learning_rate"]),
    "unknown key": (["--config", "mini.yaml", "train.lr=1"], ["train.lr", "train.learning_rate"]),
    "unknown section": (["--config", "mini.yaml", "nonsense.x=1"], ["nonsense.x"]),
    "not an override": (["--config", "mini.yaml", "steps"], ["steps", "section.key=value"]),
    "wrong type": (["--config", "mini.yaml", "train.steps=many"], ["train.steps", "many"]),
    "out of range": (["--config", "mini.yaml", "train.steps=0"], ["train.steps", "greater"]),
    "no such recipe": (["--config", "absent.yaml"], ["absent.yaml", "no such recipe"]),
    "a folder as recipe": (["--config", "."], ["no such recipe"]),
    "broken YAML": (["--config", "broken.yaml"], ["broken.yaml", "not valid YAML"]),
    "a list as recipe": (["--config", "list.yaml"], ["list.yaml", "mapping"]),
    "a key twice": (["--config", "twice.yaml"], ["twice.yaml", "given twice"]),
    "missing folder": (
        ["--config", "mini.yaml", "data.source=folder", "data.path=absent"],
        ["absent", "no such folder"],
    ),
    "no folder named": (["--config", "mini.yaml", "data.source=folder"], ["data.path"]),
    "empty folder": (["--config", "mini.yaml", "data.source=folder", "data.path=empty"], ["empty", "is empty"]),
    "no captions": (["--config", "mini.yaml", "data.source=folder", "data.path=mute"], ["mute", "no captions found"]),
    "a file as folder": (["--config", "mini.yaml", "data.source=folder", "data.path=mini.yaml"], ["not a folder"]),
    "no such model": (["--config", "mini.yaml", "unet.from=absent"], ["absent"]),
    "batch does not divide": (["--config", "mini.yaml", "train.micro_batch=3"], ["train.micro_batch", "3"]),
    "processes": (["--config", "mini.yaml", "train.processes=2"], ["train.processes", "two-cpu.yaml"]),
    "half precision on the CPU": (["--config", "mini.yaml", "train.precision=fp16", "--device", "cpu"], ["fp16"]),
    "unknown sampler": (["--config", "mini.yaml", "preview.sampler=magic"], ["magic", "euler"]),
    "preview guidance": (["--config", "mini.yaml", "preview.guidance=[magic]"], ["magic", "interval"]),
    "unknown option": (["--config", "mini.yaml", "--stepz", "3"], ["--stepz"]),
    "unknown device": (["--config", "mini.yaml", "--device", "toaster"], ["toaster"]),
    "resolution": (["--config", "mini.yaml", "data.resolution=65"], ["data.resolution"]),
}

SAMPLE = {
    "no prompt": (["--model", "MODEL"], ["no prompt"]),
    "no prompt file": (["--prompts", "absent.txt", "--model", "MODEL"], ["absent.txt", "no such file"]),
    "empty prompt file": (["--prompts", "empty.txt", "--model", "MODEL"], ["no prompt"]),
    "no model folder": (["a star", "--model", "absent"], ["absent", "no model folder"]),
    "not a model folder": (["a star", "--model", "empty"], ["empty", "model_index.json"]),
    "a run folder": (["a star", "--model", "RUN"], ["run folder", "model"]),
    "cut weights": (["a star", "--model", "cut"], ["unet", "cut off", "copy it again"]),
    "weights missing": (["a star", "--model", "without"], ["vae", "missing", "copy or download it again"]),
    "no tokenizer": (
        ["a star", "--model", "wordless"],
        ["tokenizer/tokenizer.json is missing", "copy or download it again"],
    ),
    "channels that do not fit": (
        ["a star", "--model", "seven"],
        ["seven", "the U-Net takes 7 channels, the autoencoder has 4", "take a model of such a kind"],
    ),
    "a broken autoencoder": (["a star", "--model", "infinite"], ["the autoencoder gives", "fetch the model again"]),
    "broken index": (["a star", "--model", "scrambled"], ["model_index.json"]),
    "no steps": (["a star", "--model", "MODEL", "--steps", "0"], ["--steps 0"]),
    "height": (["a star", "--model", "MODEL", "--height", "60"], ["--height 60", "multiple of 8"]),
    "width": (["a star", "--model", "MODEL", "--width", "-8"], ["--width -8", "multiple of 8"]),
    "height zero": (["a star", "--model", "MODEL", "--height", "0"], ["--height 0"]),
    "no pictures": (["a star", "--model", "MODEL", "--num", "0"], ["--num 0"]),
    "batch size": (["a star", "--model", "MODEL", "--batch-size", "0"], ["--batch-size 0"]),
    "guidance": (["a star", "--model", "MODEL", "--guidance-scale", "-1"], ["--guidance-scale"]),
    "guidance name": (["a star", "--model", "MODEL", "--guidance", "magic"], ["--guidance", "magic", "interval"]),
    "guidance pair": (
        ["a star", "--model", "MODEL", "--guidance", "pag", "--guidance", "compose"],
        ["pag and compose", "every prompt"],
    ),
    "sampler": (["a star", "--model", "MODEL", "--sampler", "magic"], ["magic", "euler"]),
    "sampler's knob": (["a star", "--model", "MODEL", "--sampler", "ddim,etta=1"], ["etta", "did you mean 'eta'"]),
    "sampler's knob too large": (["a star", "--model", "MODEL", "--sampler", "ddim,eta=2"], ["eta 2", "between 0"]),
    "schedule": (["a star", "--model", "MODEL", "--schedule", "magic"], ["magic"]),
    "dtype": (["a star", "--model", "MODEL", "--dtype", "fp7"], ["--dtype fp7", "bf16"]),
    "fp16 on the CPU": (["a star", "--model", "MODEL", "--dtype", "fp16", "--device", "cpu"], ["fp16"]),
    "device": (["a star", "--model", "MODEL", "--device", "toaster"], ["--device toaster"]),
    "no GPU": (["a star", "--model", "MODEL", "--device", "cuda"], ["--device cuda"]),
    "number expected": (["a star", "--model", "MODEL", "--steps", "few"], ["--steps", "valid integer"]),
    "out is a file": (
        ["a star", "--model", "MODEL", "--num", "1", "--steps", "1", "--out", "empty.txt"],
        ["empty.txt"],
    ),
}


@pytest.fixture(scope="module")
def place(mini, model, tmp_path_factory):
    """A folder with broken things in it; no program may change it."""
    folder = tmp_path_factory.mktemp("place")
    mini(folder)
    (folder / "unknown.yaml").write_text("train: {lerning_rate: 1e-3}\n")
    (folder / "broken.yaml").write_text("train: {steps: 3\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "twice.yaml").write_text("train: {steps: 1}\ntrain: {steps: 2}\n")
    (folder / "empty").mkdir()
    (folder / "empty.txt").write_text("# nothing\n\n")
    (folder / "mute").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "mute" / "IMG_0001.png")
    for name in ("cut", "without", "scrambled", "wordless", "seven", "infinite"):
        shutil.copytree(model, folder / name)
    weights = folder / "cut/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (folder / "without/vae/diffusion_pytorch_model.safetensors").unlink()
    (folder / "scrambled/model_index.json").write_text("{")
    (folder / "wordless/tokenizer/tokenizer.json").unlink()
    change(folder / "seven/unet", "conv_in.weight", lambda w: w[:, :1].repeat(1, 7, 1, 1), in_channels=7)
    change(folder / "infinite/vae", "decoder.conv_in.weight", lambda w: 1e38 * w)
    return folder


def change(network: Path, name: str, how: Callable[[Tensor], Tensor], **config: object) -> None:
    """Change a tensor in a network's folder, and entries of its configuration."""
    weights = network / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, name: how(tensors[name]).contiguous()}, weights, {"format": "pt"})
    told = json.loads((network / "config.json").read_text())
    (network / "config.json").write_text(json.dumps({**told, **config}))


def refused(code: int | None, err: list[str], words: list[str]) -> None:
    assert code == 2, err
    assert not any("Traceback" in line for line in err)
    said = [line for line in err if line.lower().startswith("error: ")]
    assert len(said) == 1, err
    for word in words:
        assert word in said[0], said[0]


@pytest.mark.parametrize("mistake", TRAIN)
def test_training_refuses(mistake, programs, place, tree):
    words, expected = TRAIN[mistake]
    before = tree(place)
    done = programs("train", *words, cwd=place)
    refused(done.code, done.errors, expected)
    assert done.out == ""
    assert tree(place) == before


@pytest.mark.parametrize("mistake", SAMPLE)
def test_sampling_refuses(mistake, programs, place, model, tree):
    words, expected = SAMPLE[mistake]
    names = {"MODEL": str(model), "RUN": str(model.parent)}
    before = tree(place)
    done = programs("sample", *(names.get(word, word) for word in words), cwd=place)
    refused(done.code, done.errors, expected)
    assert done.out == ""
    assert tree(place) == before


def test_an_autoencoder_that_overflows_in_float16(model, tmp_path, monkeypatch):
    """Drawing in float16 needs a GPU; here the name of another type stands for it."""
    shutil.copytree(model, tmp_path / "model")
    change(tmp_path / "model/vae", "decoder.conv_in.weight", lambda w: 1e6 * w, force_upcast=False)
    words = ["sample", "a star", "--model", str(tmp_path / "model"), "--num", "1", "--steps", "1", "--out"]
    app([*words, str(tmp_path / "fp32")], standalone_mode=False)
    monkeypatch.setitem(drawing.DTYPES, "bf16", torch.float16)
    with pytest.raises(UserError) as caught:
        app([*words, str(tmp_path / "fp16"), "--dtype", "bf16"], standalone_mode=False)
    text = str(caught.value)
    assert "\n" not in text
    assert "the autoencoder gives numbers that are not finite in float16: say --dtype bf16, or fp32" in text
    assert not list((tmp_path / "fp16").glob("*"))


def test_no_model_at_all(programs, place, tree):
    before = tree(place)
    done = programs("sample", "a star", "--runs", "empty", cwd=place)
    if done.code == 0:
        pytest.skip("a model comes with this checkout")
    refused(done.code, done.errors, ["no model", "--model"])
    assert tree(place) == before


def test_a_full_disk_stops_training_and_more_room_lets_it_go_on(programs, mini, trained, weights, tmp_path):
    command = ("train", "--config", mini(tmp_path))
    done = programs(*command, cwd=tmp_path, free_bytes=1 << 20)
    refused(done.code, done.errors, ["disk nearly full", "run the same command again"])
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
    assert programs(*command, cwd=tmp_path).code == 0
    assert weights(tmp_path / "runs/mini") == weights(trained / "runs/mini")


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("train.py", ["--config", "absent.yaml"], ["absent.yaml", "no such recipe"]),
        ("sample.py", ["a star", "--model", "absent"], ["absent", "no model folder"]),
    ],
)
def test_the_scripts_themselves_refuse(script, words, expected, environment, place, tree):
    before = tree(place)
    command = [sys.executable, str(ROOT / script), *words]
    done = subprocess.run(command, cwd=place, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    for word in expected:
        assert word in line
    assert tree(place) == before
