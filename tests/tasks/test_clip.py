"""Contrastive training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from latentgen.core.rand import Draw
from latentgen.data.fetch import PictureBatches, to_tensor
from latentgen.formats.model_folder import Model
from latentgen.models.clip import Clip, load_clip
from latentgen.models.text import encode_text, tokenize
from latentgen.tasks.clip import ClipTask, finish_clip


@pytest.fixture
def task(tiny: Model, clip_builder: Callable[[int], Clip], few: Callable) -> ClipTask:
    source = few(4, seed=3)
    held_out = to_tensor([source.image(i) for i in range(4)]), [source.captions(i)[0] for i in range(4)]
    return ClipTask(clip_builder(len(tiny.tokenizer)), tiny.tokenizer, held_out)


def test_losses_are_the_symmetric_cross_entropy(task: ClipTask, few: Callable, draw: Callable[..., Draw]) -> None:
    d = draw()
    batch = PictureBatches(few(8))(d)
    losses = task.losses("clip", batch, d)
    clip = task.modules["clip"].clip
    assert isinstance(clip, Clip)
    image = functional.normalize(clip.encode_image(batch["image"]), dim=-1)
    text = functional.normalize(clip.encode_text(tokenize(task.tokenizer, batch["caption"])), dim=-1)
    logits = clip.logit_scale.exp() * image @ text.T
    right = torch.arange(8)
    expected = (functional.cross_entropy(logits, right) + functional.cross_entropy(logits.T, right)) / 2
    torch.testing.assert_close(losses["loss"], expected)
    assert float(losses["accuracy"]) == float((logits.argmax(dim=1) == right).float().mean())


def test_a_few_steps_learn_the_pairs(task: ClipTask, few: Callable, draw: Callable[..., Draw]) -> None:
    optimizer = torch.optim.AdamW(task.modules["clip"].parameters(), lr=3e-3)
    source = few(8)
    history = []
    for step in range(25):
        d = draw(step=step)
        loss = task.losses("clip", PictureBatches(source, captions=1)(d), d)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.6 * history[0]


def test_preview_counts_retrieval_by_caption(task: ClipTask, tmp_path: Path) -> None:
    share = task.preview(task.modules, 0, tmp_path)["retrieval"]
    assert share in (0.0, 0.25, 0.5, 0.75, 1.0)
    task.held_out = (task.held_out[0], ["same"] * 4)
    assert task.preview(task.modules, 0, tmp_path) == {"retrieval": 1.0}, "equal captions are equally right"


def test_finish_writes_what_the_unet_needs(task: ClipTask, tmp_path: Path) -> None:
    finish_clip(task.modules["clip"].eval(), task.tokenizer, tmp_path / "clip")
    text = CLIPTextModel.from_pretrained(tmp_path / "clip" / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "clip" / "tokenizer")
    towers = load_clip(tmp_path / "clip" / "clip")
    captions = ["a red circle", "picture 3 two"]
    assert torch.equal(tokenize(tokenizer, captions), tokenize(task.tokenizer, captions))
    clip = task.modules["clip"].clip
    assert isinstance(clip, Clip)
    assert all(torch.equal(a, b) for a, b in zip(towers.parameters(), clip.parameters(), strict=True))
    with torch.no_grad():
        states = encode_text(text, tokenizer, captions)
        at = (tokenize(tokenizer, captions) == tokenizer.eos_token_id).int().argmax(dim=1)
        pooled = states[torch.arange(2), at] @ clip.text_projection
        torch.testing.assert_close(pooled, clip.encode_text(tokenize(tokenizer, captions)), rtol=1e-4, atol=1e-5)
