"""docs/finetune.md: every command on it is run, in order, and every mistake says what the page says.

Small stand-ins lie where the page has a person's own files, and training and drawing are made short.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from latentgen.formats.folder_parts import parts_of_folder
from latentgen.formats.lora.families import family_shapes, shapes_of
from latentgen.formats.lora.file import LoraFile, read_lora
from latentgen.formats.lora.keys import Shapes
from latentgen.formats.lora.writing import to_tensors
from latentgen.formats.model_folder import load_model
from latentgen.formats.opening import open_model
from latentgen.formats.single_file.write import write_single_file
from latentgen.models.deltas import Factors

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
SHORT = {
    "train": [
        "train.steps=2",
        "train.global_batch=2",
        "train.micro_batch=null",
        "train.warmup_steps=1",
        "train.trackers=[]",
        "data.resolution=16",
        "preview.num_inference_steps=1",
        "preview.num=1",
        "--device=cpu",
    ],
    "sample": ["--num=1", "--steps=1", "--device=cpu"],
}
"""What is added to a command of the page."""
WITH_PRIOR = ("finetune-lora", "finetune-dreambooth", "rex.yaml")
"""Recipes that make class pictures."""


@dataclass(frozen=True)
class Command:
    """One of the page, and the line that it ends with where it is a mistake; "…" stands for anything."""

    line: str
    said: str | None = None

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line)


def on_the_page() -> list[Command]:
    found = []
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        if kind == "bash":
            found += [Command(line) for line in lines]
        elif kind == "console":
            found += [Command(one[2:], said) for one, said in zip(lines[::2], lines[1::2], strict=True)]
    return found


COMMANDS = on_the_page()


def test_the_page_is_read_whole() -> None:
    kinds = ("bash", "console", "text", "yaml")
    assert sum(PAGE.count(f"```{kind}\n") for kind in kinds) == PAGE.count("```") // 2
    assert len(COMMANDS) > 20
    assert all(command.said is None or command.said.startswith("error: ") for command in COMMANDS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the page takes for granted."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "configs").symlink_to(ROOT / "configs")
    write_single_file(parts_of_folder(published.saved("sd1")), folder / "sd15.safetensors")
    whole = (folder / "sd15.safetensors").read_bytes()
    (folder / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": load_file(folder / "sd15.safetensors")}, folder / "old.ckpt")
    lora(shapes_of({"unet": published.unet("sd1")}), folder / "style.safetensors")
    lora(family_shapes("sdxl"), folder / "sdxl-style.safetensors")
    for name, recipe in re.findall(r"^```yaml\n# (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        (folder / name).write_text(recipe)
    (folder / "my_pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        picture = np.kron(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8), np.ones((8, 8, 1), dtype=np.uint8))
        Image.fromarray(picture).save(folder / "my_pictures" / f"{number:02}.png")
        (folder / "my_pictures" / f"{number:02}.txt").write_text(f"a photo of <rex> dog, {number}\n")
    for name in ("loras", "embeddings", "checkpoints"):
        (folder / "ComfyUI" / "models" / name).mkdir(parents=True)
    return folder


def lora(shapes: Shapes, path: Path) -> None:
    """A file of random matrices of rank 1 where the U-Net reads text, in kohya's layout."""
    generator, own = torch.Generator().manual_seed(0), {}
    for name, shape in shapes["unet"].items():
        if name.endswith("attn2.to_k"):
            factors = {"down": torch.randn(1, shape[1], generator=generator), "up": torch.ones(shape[0], 1)}
            own[name] = Factors("lora", factors, torch.tensor(0.1))
    tensors, metadata = to_tensors(LoraFile(modules={"unet": own}), "kohya", shapes)
    save_file(tensors, path, metadata)


@pytest.fixture(scope="module")
def done(programs: Any, place: Path) -> list[tuple[int, str]]:
    """Exit code, and what was said on standard error, of every command of the page."""
    ends = []
    for command in COMMANDS:
        words = command.words
        if words[:2] == ["python", "sample.py"]:
            words = ["latentgen", "sample", *words[2:]]
        if words[0] != "latentgen":
            assert words[0] == "cp", "the page uses no other program"
            ended = subprocess.run(words, cwd=place, capture_output=True, text=True)
            ends.append((ended.returncode, ended.stderr))
            continue
        few = ["finetune.prior.pictures=2"] if any(recipe in command.line for recipe in WITH_PRIOR) else []
        ended = programs(*words[1:], *SHORT.get(words[1], []), *few, cwd=place, timeout=600)
        ends.append((ended.code, "\n".join(ended.errors)))
    return ends


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=lambda number: COMMANDS[number].line[:60])
def test_a_command_of_the_page(number: int, done: list[tuple[int, str]]) -> None:
    (code, err), said = done[number], COMMANDS[number].said
    assert "Traceback" not in err
    if said is None:
        assert code == 0, err
    else:
        pattern = ".*".join(re.escape(part) for part in said.split("…"))
        assert code == 2
        assert re.fullmatch(pattern, err.splitlines()[-1]), err


def test_what_is_given_away(done: list[tuple[int, str]], place: Path) -> None:
    """ComfyUI's folders have what the page promises, and diffusers opens the rest."""
    comfy = place / "ComfyUI" / "models"
    networks = load_model(place / "models" / "sd15").networks()
    file = read_lora(comfy / "loras" / "rex.safetensors", networks)
    assert file.layout == "kohya"
    (word,) = load_file(comfy / "embeddings" / "rex.safetensors").values()
    assert word.shape == (4, published.WIDTH)
    merged, single = open_model(place / "models" / "rex").model, open_model(comfy / "checkpoints/rex.safetensors").model
    theirs = StableDiffusionPipeline.from_pretrained(place / "out" / "rex")
    for name, network in merged.networks().items():
        for key, value in network.state_dict().items():
            assert torch.equal(theirs.components[name].state_dict()[key], value)
            assert torch.equal(single.networks()[name].state_dict()[key], value.half().float())


def test_pictures_are_where_the_page_says(done: list[tuple[int, str]], place: Path) -> None:
    drawn = {name: np.asarray(Image.open(next((place / name).glob("*.png")))) for name in ("pictures", "weaker")}
    assert not np.array_equal(drawn["pictures"], drawn["weaker"])
    assert list((place / "runs" / "rex" / "samples" / "unet").glob("*.png"))
