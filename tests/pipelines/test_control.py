"""Pictures to follow."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.data.edges import edges
from latentgen.formats.model import Model
from latentgen.models.control import build_control
from latentgen.models.unet import counted_rows
from latentgen.pipelines.control import Control, control_of, shown_to_it
from latentgen.pipelines.generate import Request, check, generate, parameters_line


@pytest.fixture(scope="module")
def follower(tiny_builder: Callable[..., Model]) -> Model:
    model = tiny_builder()
    torch.manual_seed(4)
    control = build_control(model.unet, 4, 4)
    with torch.no_grad():
        for convolution in (*control.controlnet_down_blocks, control.controlnet_mid_block):
            convolution.weight.normal_(std=0.5)
        control.controlnet_cond_embedding.conv_out.weight.normal_(std=0.5)
    return dataclasses.replace(model, control=control.eval())


@pytest.fixture
def picture(tmp_path: Path) -> str:
    coarse = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(np.kron(coarse, np.ones((4, 4, 1), dtype=np.uint8))).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def ask(**changes: Any) -> Request:
    return Request(**{"prompt": "a star", "num_inference_steps": 4, "height": 16, "width": 16} | changes)


def draw(model: Model, request: Request) -> np.ndarray:
    return np.asarray(next(generate(model, [request])), dtype=np.int16)


def test_scale_zero_draws_as_without(follower: Model, tiny: Model, picture: str) -> None:
    plain = draw(tiny, ask())
    assert np.array_equal(draw(follower, ask(control=picture, control_scale=0.0)), plain)
    distances = [np.abs(draw(follower, ask(control=picture, control_scale=s)) - plain).mean() for s in (0.1, 0.5, 1.0)]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_the_picture_counts(follower: Model, picture: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "white").save(tmp_path / "white.png")
    one, other = (draw(follower, ask(control=path)) for path in (picture, str(tmp_path / "white.png")))
    assert np.abs(one - other).max() > 1
    found = shown_to_it(ask(control=picture, control_edges=True))
    assert np.array_equal(found, edges(np.asarray(Image.open(picture))))
    Image.fromarray(found).save(tmp_path / "edges.png")
    drawn = draw(follower, ask(control=picture, control_edges=True))
    assert np.array_equal(drawn, draw(follower, ask(control=str(tmp_path / "edges.png"))))
    assert np.abs(drawn - one).max() > 1


def test_one_of_another_size_is_cut_in_the_middle_before_edges_are_found(picture: str, tmp_path: Path) -> None:
    levels = np.asarray(Image.open(picture))
    Image.fromarray(np.concatenate([levels[:, :4] * 0, levels, levels[:, :4] * 0], axis=1)).save(tmp_path / "wide.png")
    for found in (False, True):
        one, other = (
            shown_to_it(ask(control=path, control_edges=found)) for path in (picture, str(tmp_path / "wide.png"))
        )
        assert np.array_equal(one, other)


@pytest.mark.parametrize("sampler", ["heun", "parallel", "dpm_adaptive", "dpmpp_2m_sde"])
def test_every_picture_of_a_batch_follows(sampler: str, follower: Model, picture: str) -> None:
    requests = [ask(control=picture, sampler=sampler, seed=seed) for seed in (1, 2)]
    together = [np.asarray(p, dtype=np.int16) for p in generate(follower, requests)]
    for request, found in zip(requests, together, strict=True):
        assert np.abs(draw(follower, request) - found).max() <= (3 if sampler == "dpm_adaptive" else 1)


def test_neighbours_with_other_pictures_do_not_mix(follower: Model, picture: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "white").save(tmp_path / "white.png")
    requests = [ask(control=picture), ask(control=str(tmp_path / "white.png")), ask(control=picture, control_scale=0.3)]
    together = [np.asarray(p, dtype=np.int16) for p in generate(follower, requests)]
    for request, found in zip(requests, together, strict=True):
        assert np.abs(draw(follower, request) - found).max() <= 1


@pytest.mark.parametrize(
    ("start", "end", "counting"),
    [
        (0, 1, [1, 1, 1, 1]),
        (0.5, 1, [0, 0, 1, 1]),
        (0, 0.5, [1, 1, 0, 0]),
        (0.2, 0.8, [0, 1, 1, 0]),
        (0.3, 0.6, [0] * 4),
    ],
)
def test_the_share_of_the_steps(start: float, end: float, counting: list[int], follower: Model, picture: str) -> None:
    sigmas = torch.tensor([9.0, 5.0, 2.0, 1.0, 0.0])
    control = control_of(follower, [ask(control=picture, control_start=start, control_end=end)], sigmas)
    assert control is not None
    assert control.scales(sigmas[:-1]).tolist() == counting


def test_above_and_below_the_levels_it_counts_to_the_ends() -> None:
    """Samplers may add noise to the first level, or look below the last."""
    control = Control(torch.zeros(1, 3, 8, 8), 0.5, -1.0, math.inf)
    assert control.scales(torch.tensor([30.0, 0.0])).tolist() == [0.5, 0.5]


def test_nothing_is_computed_that_does_not_count(follower: Model, picture: str) -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    assert follower.control is not None
    hook = follower.control.register_forward_hook(count)
    with counted_rows() as rows:
        draw(follower, ask(control=picture, control_start=0.5, sampler="euler"))
    hook.remove()
    assert rows.count == 8
    assert calls == 2


def test_what_the_picture_says_of_itself(picture: str) -> None:
    request = ask(control=picture, control_scale=0.5)
    assert "Control: picture.png, Control scale: 0.5, Model hash" in parameters_line(request, "m", "0" * 64)
    assert json.loads(json.dumps(dataclasses.asdict(request)))["control"] == picture


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"^--controlnet: it needs a picture to follow; add --control FILE"),
        ({"control": "gone.png"}, r"^--control gone.png: no such file; name a picture"),
        ({"control": "TEXT"}, r"^--control .*words.png: .*; name another picture"),
        ({"control": "PICTURE", "control_scale": -0.5}, r"^--control-scale -0.5: must not be negative"),
        ({"control": "PICTURE", "control_scale": math.nan}, r"^--control-scale nan"),
        ({"control": "PICTURE", "control_start": 0.5, "control_end": 0.5}, r"^--control-start 0.5, --control-end 0.5"),
        ({"control": "PICTURE", "control_end": 1.5}, r"--control-end 1.5: shares of the steps"),
        ({"control": "PICTURE", "control_end": 0.5, "sampler": "dpm_adaptive"}, r"chooses its steps itself; leave"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, follower: Model, picture: str, tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("no picture")
    files = {"PICTURE": picture, "TEXT": str(tmp_path / "words.png")}
    known = {name: files.get(value, value) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        check(ask(**known), follower)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": "a.png"}, r"^--control a.png: nothing would look at it; name a ControlNet: --controlnet FOLDER"),
        ({"control_scale": 0.5}, r"^--control-scale: says how to follow a picture; add --control FILE"),
        ({"control_start": 0.5}, r"^--control-start: says how"),
        ({"control_end": 0.5}, r"^--control-end: says how"),
        ({"control_edges": True}, r"^--control-edges: says how"),
    ],
)
def test_refusals_of_a_model_without(changes: dict[str, Any], message: str, tiny: Model) -> None:
    with pytest.raises(UserError, match=message):
        check(ask(**changes), tiny)
