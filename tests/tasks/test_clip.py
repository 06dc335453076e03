"""Contrastive training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from latentgen.core.rand import Draw
from latentgen.data.fetch import PictureBatches, from_bytes, to_bytes
from latentgen.formats.model import Model
from latentgen.models.clip import Clip
from latentgen.models.text import tokenize
from latentgen.tasks.clip import ClipTask


@pytest.fixture
def task(tiny: Model, clip_builder: Callable[[int], Clip], few: Callable) -> ClipTask:
    source = few(4, seed=3)
    held_out = to_bytes([source.image(i) for i in range(4)]), [source.captions(i)[0] for i in range(4)]
    return ClipTask(clip_builder(len(tiny.towers[0].tokenizer)), tiny.towers[0].tokenizer, held_out)


def test_losses_are_the_symmetric_cross_entropy(task: ClipTask, few: Callable, draw: Callable[..., Draw]) -> None:
    d = draw()
    batch = PictureBatches(few(8))(d)
    losses = task.losses("clip", batch, d)
    clip = task.modules["clip"].clip
    assert isinstance(clip, Clip)
    image = functional.normalize(clip.encode_image(from_bytes(batch["image"])), dim=-1)
    text = functional.normalize(clip.encode_text(tokenize(task.tokenizer, batch["caption"])), dim=-1)
    logits = clip.logit_scale.exp() * image @ text.T
    right = torch.arange(8)
    expected = (functional.cross_entropy(logits, right) + functional.cross_entropy(logits.T, right)) / 2
    torch.testing.assert_close(losses["loss"], expected)
    assert float(losses["accuracy"]) == float((logits.argmax(dim=1) == right).float().mean())


def test_false_captions_are_further_columns(task: ClipTask, few: Callable, draw: Callable[..., Draw]) -> None:
    d = draw()
    batch = PictureBatches(few(8), contrasts=2)(d)
    losses = task.losses("clip", batch, d)
    clip = task.modules["clip"].clip
    assert isinstance(clip, Clip)
    image = functional.normalize(clip.encode_image(from_bytes(batch["image"])), dim=-1)
    text = functional.normalize(clip.encode_text(tokenize(task.tokenizer, batch["caption"])), dim=-1)
    rows, right, scale = [], torch.arange(8), clip.logit_scale.exp()
    for picture, false in zip(image, batch["contrast"], strict=True):
        wrong = functional.normalize(clip.encode_text(tokenize(task.tokenizer, list(false))), dim=-1)
        rows.append(scale * torch.cat([text, wrong]) @ picture)
    backward = functional.cross_entropy(scale * text @ image.T, right)
    torch.testing.assert_close(losses["loss"], (functional.cross_entropy(torch.stack(rows), right) + backward) / 2)
    true_only = PictureBatches(few(8))(d)
    torch.testing.assert_close(losses["accuracy"], task.losses("clip", true_only, d)["accuracy"])


def test_the_late_loss_is_added_with_its_weight(
    tiny: Model, clip_builder: Callable[[int], Clip], few: Callable, draw: Callable[..., Draw]
) -> None:
    tokenizer, d = tiny.towers[0].tokenizer, draw()
    made = ClipTask(clip_builder(len(tokenizer)), tokenizer, (torch.zeros(0), []), late=0.5)
    batch = PictureBatches(few(8), contrasts=2)(d)
    losses = made.losses("clip", batch, d)
    plain = ClipTask(clip_builder(len(tokenizer)), tokenizer, (torch.zeros(0), [])).losses("clip", batch, d)
    torch.testing.assert_close(losses["loss"], plain["loss"] + 0.5 * losses["late"])
    losses["loss"].backward()
    assert all(p.grad is not None for p in made.modules["clip"].parameters())
    assert not any(name.startswith("late") for name in made.modules["clip"].clip.state_dict()), "no part of the towers"


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


def test_what_is_measured_of_each_pair_is_the_loss_and_leaves_the_average_alone(
    task: ClipTask, few: Callable, draw: Callable[..., Draw]
) -> None:
    d = draw()
    batch = PictureBatches(few(8))(d)
    clip = task.modules["clip"].clip.eval()
    assert isinstance(clip, Clip)
    with torch.no_grad():
        clip.logit_scale.fill_(5.0)  # beyond ln 100, as an average may be
        found = task.measure(task.modules, batch, d)["loss"]
        assert float(clip.logit_scale) == 5.0
        assert found.shape == (8,)
        torch.testing.assert_close(found.mean(), task.losses("clip", batch, d)["loss"])
    assert found.std() > 0
