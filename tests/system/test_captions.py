"""Captions that are put together, drawn anew and longer than the text encoder reads: trained, stopped, gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from PIL import Image

from latentgen.formats.model_folder import load_model
from latentgen.formats.opening import open_model
from latentgen.pipelines.pictures import cells

STEP = "latentgen.engine.step:Stepper.__call__"
PROMPT = "a red circle above a (blue:1.5) square, drawn, small, plain and more"
WORDS = (
    "data.prefix=drawn",
    "data.suffix=small, plain, one, two, three",
    "data.trigger=sks",
    "data.tags={shuffle: true, keep: 1, dropout: 0.3}",
    "text_encoder.context_length=16",
    "text_encoder.vocab_size=700",
    "text_encoder.contrasts=1",
    "text_encoder.chunks=2",
    f'preview.prompts=["{PROMPT}"]',
)


def test_from_nothing_to_pictures(
    programs: Any, mini: Callable[[Path], Path], weights: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = programs("train", "--config", mini(whole), *WORDS, "data.workers=1", cwd=whole)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    assert "tokenizers" not in done.err
    assert "text_encoder.context_length: " in done.err, "what CLIP's training cuts"
    assert "text_encoder.chunks: 3 reads all" in done.err, "what the U-Net's training cuts"
    command = ("train", "--config", mini(parts), *WORDS)
    for step in (8, 8):  # in CLIP's training, and in the U-Net's
        stopped = programs(*command, cwd=parts, kill=[STEP, step, 15])
        assert stopped.code == 75, stopped.err
    assert programs(*command, cwd=parts).code == 0
    assert weights(parts / "runs/mini") == weights(whole / "runs/mini")

    run = whole / "runs/mini"
    assert load_model(run / "model").chunks == 2
    words = ("--num", 1, "--steps", 1, "--device", "cpu")
    drawn = programs("sample", PROMPT, *words, cwd=whole)
    assert drawn.code == 0, drawn.err
    picture = Image.open(whole / drawn.out.splitlines()[0])
    assert json.loads(picture.info["latentgen"])["prompt"] == PROMPT
    (previewed,) = cells(Image.open(run / "samples/unet/00000006.png"), 1, 1, captions=True)[0]
    assert np.array_equal(
        np.asarray(picture),
        np.asarray(previewed)[:: previewed.height // picture.height][:, :: previewed.width // picture.width],
    )
    cut = programs("sample", PROMPT, *words, "--chunks", 1, "--no-emphasis", cwd=whole)
    assert cut.code == 0, cut.err
    assert "prompt too long" in cut.err
    assert not np.array_equal(np.asarray(Image.open(whole / cut.out.splitlines()[0])), np.asarray(picture))


def test_an_adapter_remembers_the_pieces(programs: Any, tmp_path: Path) -> None:
    """Its text encoder runs in the step, because tags are drawn; a trigger is the word to be learned."""
    text = {"tokens": {"<thing>": {}}, "rank": 2, "prior": {"prompt": "a dog, one, two", "pictures": 4}}
    recipe: dict[str, Any] = {
        "name": "tuned",
        "data": {"size": 8, "cache": "cache", "trigger": "<thing>", "tags": {"shuffle": True}},
        "unet": {"from": str(tiny.saved("sd1", tmp_path / "model"))},
        "text_encoder": {"chunks": 2},
        "finetune": text,
        "train": {"steps": 2, "global_batch": 4, "validate_every": 0},
        "preview": {"every": 2, "num": 1, "num_inference_steps": 1, "prompts": ["a <thing>"]},
    }
    (tmp_path / "tuned.yaml").write_text(json.dumps(recipe))
    done = programs("train", "--config", "tuned.yaml", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "ignored" not in done.err
    assert json.loads((tmp_path / "runs/tuned/adapter/adapter.json").read_text())["chunks"] == 2
    assert open_model(tmp_path / "runs/tuned/adapter").model.chunks == 2
