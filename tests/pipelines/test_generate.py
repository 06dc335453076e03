"""A picture is a function of the weights and its own request."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.diffusion.schedules import find_schedule
from latentgen.formats.model import Model
from latentgen.models.text import encode_text
from latentgen.pipelines import generate as module
from latentgen.pipelines.generate import Request, check, generate, parameters_line, start_noise, steps_of


def ask(prompt: str = "a red circle", **changes: Any) -> Request:
    return Request(prompt, **{"num_inference_steps": 3, "height": 16, "width": 16, **changes})


def distance(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


class Calls:
    """Counts the U-Net's calls and remembers what it was given."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        self.contexts: list[torch.Tensor] = []
        self.inputs: list[torch.Tensor] = []
        forward = model.unet.forward

        def spy(sample: torch.Tensor, time: torch.Tensor, encoder_hidden_states: torch.Tensor, **rest: Any) -> Any:
            self.batches.append(len(sample))
            self.contexts.append(encoder_hidden_states)
            self.inputs.append(sample)
            return forward(sample, time, encoder_hidden_states=encoder_hidden_states, **rest)

        monkeypatch.setattr(model.unet, "forward", spy)


@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_a_picture_does_not_depend_on_its_batch(prediction: str, tiny_builder: Callable[..., Model]) -> None:
    model = tiny_builder(prediction)
    requests = [ask(seed=3), ask("a blue star", seed=4), ask("", seed=3), ask(seed=5, negative_prompt="a blue star")]
    together = list(generate(model, requests, batch_size=8))
    for size in (1, 3):
        apart = list(generate(model, requests, batch_size=size))
        assert max(distance(a, b) for a, b in zip(together, apart, strict=True)) <= 1
    assert min(distance(together[0], other) for other in together[1:]) > 1, "seed and prompts matter"


def test_the_noise_belongs_to_the_picture(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_inputs(requests: list[Request]) -> torch.Tensor:
        with monkeypatch.context() as patch:
            calls = Calls(tiny, patch)
            list(generate(tiny, requests))
        return calls.inputs[0][: len(requests)]

    alone, batch = first_inputs([ask(seed=7)]), first_inputs([ask(seed=1), ask("x", seed=7), ask(seed=7)])
    assert torch.equal(batch[1], alone[0])
    assert torch.equal(batch[2], alone[0])
    assert not torch.equal(batch[0], alone[0])
    noise = start_noise(ask(seed=7), 4, 4)
    assert noise.shape == (1, 4, 4, 4)
    torch.testing.assert_close(alone[0] / alone[0].std(), noise[0] / noise.std(), rtol=1e-4, atol=1e-5)


def test_many_steps_at_once_keep_each_picture_its_prompt(tiny: Model) -> None:
    """The network then sees the window's steps one after another, each a whole batch."""
    asked = [ask(seed=1, num_inference_steps=6), ask("a blue star", seed=2, num_inference_steps=6)]
    sequential = list(generate(tiny, [dataclasses.replace(r, sampler="euler") for r in asked]))
    parallel = list(generate(tiny, [dataclasses.replace(r, sampler="parallel") for r in asked]))
    assert max(distance(a, b) for a, b in zip(sequential, parallel, strict=True)) <= 1


def test_the_global_stream_plays_no_part(tiny: Model) -> None:
    torch.manual_seed(1)
    first = list(generate(tiny, [ask()]))
    torch.manual_seed(2)
    assert distance(first[0], next(generate(tiny, [ask()]))) == 0


@pytest.mark.parametrize(("scale", "times"), [(1.0, 1), (4.0, 2), (0.0, 2)])
def test_calls_of_the_unet(scale: float, times: int, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(tiny, monkeypatch)
    list(generate(tiny, [ask(seed=n, guidance_scale=scale) for n in range(3)], batch_size=2))
    assert calls.batches == [2 * times] * 3 + [1 * times] * 3


def test_the_negative_prompt_takes_the_empty_captions_place(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(tiny, monkeypatch)
    list(generate(tiny, [ask("a star", negative_prompt="a blue star"), ask("a circle")]))
    with torch.no_grad():
        expected = encode_text(tiny.towers, ["a star", "a circle", "a blue star", ""]).states
    torch.testing.assert_close(calls.contexts[0], expected)


def test_guidance_one_ignores_the_negative_prompt(tiny: Model) -> None:
    plain, negative = generate(tiny, [ask(guidance_scale=1.0), ask(guidance_scale=1.0, negative_prompt="a blue star")])
    assert distance(plain, negative) <= 1


def test_requests_of_many_settings_come_back_in_their_order(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(tiny, monkeypatch)
    steps: list[int] = []
    requests = [
        ask(),
        ask(width=32, num_inference_steps=2),
        ask(seed=1, width=32, num_inference_steps=2),
        ask(sampler="euler"),
    ]
    drawn = list(generate(tiny, requests, on_step=steps.append))
    assert [picture.size for picture in drawn] == [(16, 16), (32, 16), (32, 16), (16, 16)]
    assert steps == [1, 1, 1, 2, 2, 1, 1, 1]
    assert calls.batches == [2, 2, 2, 4, 4, 2, 2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 18}, "--height 18: must be a multiple of 4"),
        ({"width": 0}, "--width 0: must be a multiple of 4"),
        ({"num_inference_steps": 0}, "--steps 0: the number of sampling steps must be at least 1"),
        ({"guidance_scale": -1.0}, "--guidance-scale -1.0: must not be negative"),
        ({"sampler": "dpmpp"}, "dpmpp_2m"),
        ({"schedule": "karas"}, "karras"),
        ({"seed": 2**64}, "--seed 18446744073709551616: choose one of 64 bits"),
        ({"seed": -(2**63) - 1}, "--seed -9223372036854775809: choose one of 64 bits"),
        (
            {"negative_prompt": "blur", "guidance": ("autoguidance,model=x",)},
            "--negative-prompt with --guidance autoguidance: the worse model takes its place",
        ),
        ({"sampler": "ddim,eta=2"}, "--sampler ddim,eta=2: eta 2.0: choose it between 0"),
        ({"sampler": "parallel", "guidance": ("adaptive",)}, "it remembers earlier steps"),
        ({"sampler": "ddim,eta=0.5", "guidance": ("cfgpp",), "guidance_scale": 0.5}, "without noise.*; choose euler"),
    ],
)
def test_check_refuses(changes: dict, message: str, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=message):
        check(ask(**changes), tiny)
    calls = Calls(tiny, monkeypatch)
    with pytest.raises(UserError, match=message):
        list(generate(tiny, [ask(), ask(**changes)]))
    assert calls.batches == [], "nothing is drawn before all requests are checked"


@pytest.mark.parametrize("seed", [2**64 - 1, 1 - 2**63, -1])  # torch looks at the last 32 bits
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_any_seed_of_64_bits_draws(seed: int, sampler: str, tiny: Model) -> None:
    one, other = generate(tiny, [ask(seed=seed, sampler=sampler), ask(sampler=sampler)])
    assert distance(one, other) > 1


def test_a_batch_of_none(tiny: Model) -> None:
    with pytest.raises(UserError, match="--batch-size 0"):
        list(generate(tiny, [ask()], batch_size=0))


def test_parameters_line() -> None:
    request = ask("a star", negative_prompt="blur", seed=9, guidance_scale=4.0, sampler="euler")
    assert parameters_line(request, "run", "0123456789abcdef") == (
        "a star\nNegative prompt: blur\n"
        "Steps: 3, Sampler: euler, CFG scale: 4, Seed: 9, Size: 16x16, Model hash: 0123456789, Model: run"
    )
    assert "Negative" not in parameters_line(ask(), "run", "0" * 10)


def test_the_parameters_line_holds_the_knobs_and_the_schedule() -> None:
    line = parameters_line(ask(sampler="ddim,eta=0.5", schedule="karras"), "run", "0" * 10)
    assert ', Sampler: "ddim,eta=0.5", Schedule type: karras, CFG scale: 4, ' in line


def test_a_samplers_knobs_count(tiny: Model) -> None:
    plain, still, noisy, other = generate(
        tiny,
        [ask(sampler=sampler) for sampler in ("ddim", "DDIM, eta=0", "ddim,eta=0.5", "ddim,eta=1")],
    )
    assert distance(plain, still) == 0
    assert distance(plain, noisy) > 1
    assert distance(noisy, other) > 1


def test_a_sampler_of_its_own_steps_does_not_look_at_their_number(tiny: Model) -> None:
    few, many = (ask(sampler="dpm_adaptive,rtol=0.5", num_inference_steps=n) for n in (1, 9))
    one, other = generate(tiny, [few, many])
    assert distance(one, other) == 0
    assert distance(one, next(generate(tiny, [ask(num_inference_steps=1)]))) > 1
    assert steps_of([few]) is None, "nor can anyone tell how many it takes"
    assert steps_of([ask(), ask(sampler="heun", num_inference_steps=5)]) == 8


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "Euler a", "restart", "DPM++ SDE Karras"])
def test_the_noise_of_a_stochastic_sampler_belongs_to_the_picture(sampler: str, tiny: Model) -> None:
    """Same seed, same picture, in any batch; another seed, another; and the global stream plays no part."""
    requests = [ask(seed=seed, sampler=sampler) for seed in (3, 4, 3)]
    together = list(generate(tiny, requests))
    torch.manual_seed(1)
    apart = list(generate(tiny, requests, batch_size=1))
    assert max(distance(a, b) for a, b in zip(together, apart, strict=True)) <= 1
    assert distance(together[0], together[2]) <= 1
    assert distance(together[0], together[1]) > 1
    plain = next(generate(tiny, [ask(seed=3, sampler="ddim")]))
    assert distance(together[0], plain) > 1, "it adds noise"


def test_a_name_may_say_the_schedule(tiny: Model) -> None:
    named, spelt, other = generate(
        tiny,
        [
            ask(sampler="DPM++ 2M Exponential"),
            ask(sampler="dpmpp_2m", schedule="exponential"),
            ask(sampler="DPMSolverMultistepScheduler"),
        ],
    )
    assert distance(named, spelt) == 0
    assert distance(named, other) > 0
    with pytest.raises(UserError, match="means the schedule 'karras': leave out --schedule beta"):
        check(ask(sampler="DPM++ 2M Karras", schedule="beta"), tiny)


def test_a_schedule_takes_knobs(tiny: Model) -> None:
    plain, same, other = generate(tiny, [ask(schedule=text) for text in ("karras", "karras,rho=7", "karras,rho=3")])
    assert distance(plain, same) == 0
    assert distance(plain, other) > 0
    assert 'Schedule type: "karras,rho=3", ' in parameters_line(ask(schedule="karras,rho=3"), "run", "0" * 10)
    with pytest.raises(UserError, match="did you mean 'rho'"):
        check(ask(schedule="karras,roh=3"), tiny)


def test_the_default_schedule_follows_the_process(
    tiny_builder: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def spy(text: str) -> Any:
        asked.append(text)
        return find_schedule(text)

    monkeypatch.setattr(module, "find_schedule", spy)
    for prediction in ("v", "flow"):
        list(generate(tiny_builder(prediction), [ask()]))
        asked.append("|")
    assert [name for name, _ in itertools.groupby(asked)] == ["karras", "|", "flow", "|"]


@pytest.mark.parametrize(("part", "said"), [("unet", "the U-Net gives"), ("vae", "the autoencoder gives")])
@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(torch.bfloat16, "in bfloat16: say --dtype bf16"), (torch.float32, "fetch the model")],
)
def test_no_picture_of_numbers_that_are_not_finite(
    part: str, said: str, dtype: torch.dtype, remedy: str, tiny_builder: Callable[..., Model]
) -> None:
    model = tiny_builder()
    for network in model.networks().values():
        network.to(dtype)
    broken = model.unet.conv_out if part == "unet" else model.vae.decoder.conv_out
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=f"{said} numbers that are not finite.*{remedy}"):
        next(generate(model, [ask()]))
