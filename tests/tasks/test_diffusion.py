"""The U-Net's task: its draws, its loss, its preview."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentgen.core.rand import Draw
from latentgen.data.fetch import CachedBatches
from latentgen.diffusion.losses import min_snr, unit
from latentgen.diffusion.noise_levels import uniform
from latentgen.diffusion.parameterization import Flow, V
from latentgen.formats.model_folder import Model
from latentgen.pipelines.generate import Request
from latentgen.tasks.diffusion import DiffusionTask, Objective

DrawOf = Callable[..., Draw]


def cached(dropout: float = 0.3) -> CachedBatches:
    source = np.random.default_rng(0)
    moments = source.standard_normal((8, 2, 4, 4, 4)).astype(np.float16)
    moments[:, 1] = np.abs(moments[:, 1])
    states = source.standard_normal((17, 10, 16)).astype(np.float16)
    return CachedBatches(moments, states, [(2 * i + 1, 2 * i + 2) for i in range(8)], dropout)


def objective(model: Model, weight: Callable[..., Tensor] = unit) -> Objective:
    return Objective(model.parameterization(), uniform, weight)


def task(model: Model, weight: Callable[..., Tensor] = unit) -> DiffusionTask:
    request = Request("a red circle", num_inference_steps=2, height=16, width=16)
    requests = [dataclasses.replace(request, seed=n) for n in range(2)]
    return DiffusionTask(model, objective(model, weight), requests, columns=2)


def test_draws_are_those_of_the_names(tiny: Model, draw: DrawOf) -> None:
    d = draw(step=4)
    batch = cached()(d)
    drawn = task(tiny).draws(batch, d)
    z = batch["mean"] + batch["std"] * d.normal("posterior", (4, 4, 4))
    torch.testing.assert_close(drawn.x0, z)
    assert torch.equal(drawn.noise, d.normal("noise", (4, 4, 4)))
    u = (d.permutation("stratum") + d.uniform("level")) / 8
    torch.testing.assert_close(drawn.sigma, tiny.parameterization().sigma_of_fraction(u))
    assert torch.equal(drawn.context, batch["context"])
    strata = tiny.parameterization().sigma_of_fraction(torch.arange(9) / 8)
    counts = [int(((drawn.sigma >= a) & (drawn.sigma < b)).sum()) for a, b in itertools.pairwise(strata)]
    assert counts == [1] * 8, "one level in each eighth"


def test_the_posterior_mean_may_be_learned_instead(tiny: Model, draw: DrawOf) -> None:
    d, made = draw(step=4), task(tiny)
    made.objective = dataclasses.replace(made.objective, posterior="mean")
    batch = cached()(d)
    torch.testing.assert_close(made.draws(batch, d).x0, batch["mean"])


def test_a_foreign_autoencoders_scaling_is_applied(tiny_builder: Callable[..., Model], draw: DrawOf) -> None:
    model, d = tiny_builder(), draw()
    model.vae.register_to_config(scaling_factor=0.25, shift_factor=0.5)
    batch = cached()(d)
    z = batch["mean"] + batch["std"] * d.normal("posterior", (4, 4, 4))
    torch.testing.assert_close(task(model).draws(batch, d).x0, (z - 0.5) * 0.25)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_draws_do_not_depend_on_the_micro_batch(size: int, tiny: Model, draw: DrawOf) -> None:
    made, fetch = task(tiny), cached()
    whole = made.draws(fetch(draw()), draw())
    parts = [made.draws(fetch(d), d) for d in (draw(range(at, at + size)) for at in range(0, 8, size))]
    for name in ("x0", "noise", "sigma", "context"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_micro_batches_give_the_whole_loss(tiny: Model, draw: DrawOf) -> None:
    made, fetch = task(tiny, min_snr), cached()
    with torch.no_grad():
        whole = made.losses("unet", fetch(draw()), draw())
        parts = [made.losses("unet", fetch(d), d) for d in (draw(range(at, at + 2)) for at in range(0, 8, 2))]
    for name, value in whole.items():
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).mean(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_the_loss_is_that_of_the_prediction(prediction: str, tiny_builder: Callable[..., Model], draw: DrawOf) -> None:
    """Written out for v (arXiv 2202.00512) and flow (arXiv 2209.03003), with the network called by hand."""
    model, d = tiny_builder(prediction), draw()
    made, batch = task(model), cached()(draw())
    drawn = made.draws(batch, d)
    x0, noise, sigma = drawn.x0, drawn.noise, drawn.sigma.view(-1, 1, 1, 1)
    p = model.parameterization()
    if prediction == "v":
        assert isinstance(p, V)
        alpha, beta = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        x, time, target = alpha * x0 + beta * noise, p.table.t_of_sigma(drawn.sigma), alpha * noise - beta * x0
    else:
        assert isinstance(p, Flow)
        t = sigma / (1 + sigma)
        x, time, target = (1 - t) * x0 + t * noise, 1000 * t.flatten(), noise - x0
    with torch.no_grad():
        out = model.unet(x, time, encoder_hidden_states=drawn.context).sample
        losses = made.losses("unet", batch, d)
    torch.testing.assert_close(losses["error"], (out - target).square().mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["loss"], losses["error"])


def test_weights_are_applied_to_each_example(tiny: Model, draw: DrawOf) -> None:
    fetch = cached()
    with torch.no_grad():
        each = [task(tiny).losses("unet", fetch(d), d)["error"] for d in (draw(range(i, i + 1)) for i in range(8))]
        weighted = task(tiny, min_snr).losses("unet", fetch(draw()), draw())
    sigma = task(tiny).draws(fetch(draw()), draw()).sigma
    snr = 1 / sigma**2
    weight = snr.clamp(max=5) / (snr + 1)  # arXiv 2303.09556 for v
    torch.testing.assert_close(weighted["loss"], (weight * torch.stack(each)).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weighted["error"], torch.stack(each).mean(), rtol=1e-4, atol=1e-6)
    assert float(weight.max() - weight.min()) > 0.1


def test_balanced_levels_are_divided_by_their_learned_error(tiny: Model, draw: DrawOf) -> None:
    fetch, made = cached(), task(tiny)
    made = DiffusionTask(tiny, dataclasses.replace(made.objective, balanced=True), made.previews, columns=2)
    assert made.phases()[0].trains == ("unet", "log_variance")
    assert made.averaged == ("unet",), "it is no part of the model"
    with torch.no_grad():
        first = made.losses("unet", fetch(draw()), draw())
    torch.testing.assert_close(first["loss"], first["error"])  # u begins at 0
    u, d = made.modules["log_variance"], draw()
    series = u.get_parameter("series")
    torch.nn.init.normal_(series, std=0.05)
    with torch.no_grad():
        each = [task(tiny).losses("unet", fetch(e), e)["error"] for e in (draw(range(i, i + 1)) for i in range(8))]
    expected = u(made.draws(fetch(d), d).sigma)
    loss = made.losses("unet", fetch(d), d)["loss"]
    torch.testing.assert_close(loss, (torch.stack(each) * torch.exp(-expected) + expected).mean(), rtol=1e-4, atol=1e-5)


def test_neither_autoencoder_nor_text_encoder_runs(
    tiny_builder: Callable[..., Model], draw: DrawOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_builder()

    def fail(*inputs: Any, **named: Any) -> Any:
        raise AssertionError("a frozen network ran in a training step")

    for network, names in ((model.vae, ("forward", "encode", "decode")), (model.text_encoder, ("forward",))):
        for name in names:
            monkeypatch.setattr(network, name, fail)
    monkeypatch.setattr(type(model.tokenizer), "__call__", fail)
    losses = task(model).losses("unet", cached()(draw()), draw())
    losses["loss"].backward()
    with pytest.raises(AssertionError, match="frozen network"):
        model.vae.encode(torch.zeros(1, 3, 16, 16))
    assert all(p.grad is None for p in model.vae.parameters())
    assert all(p.grad is None for p in model.text_encoder.parameters())
    assert all(p.grad is not None for p in model.unet.parameters())


def test_training_lowers_the_loss(tiny_builder: Callable[..., Model], draw: DrawOf) -> None:
    made, fetch = task(tiny_builder()), cached(0.0)
    optimizer = torch.optim.AdamW(made.modules["unet"].parameters(), lr=5e-3)
    history = []
    for _ in range(25):
        loss = made.losses("unet", fetch(draw()), draw())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]


def test_preview_draws_with_the_averaged_unet(tiny_builder: Callable[..., Model], tmp_path: Path) -> None:
    made, other = task(tiny_builder()), tiny_builder(seed=5)
    assert made.preview({"unet": made.model.unet}, 6, tmp_path / "a") == {}
    made.preview({"unet": other.unet}, 6, tmp_path / "b")
    with Image.open(tmp_path / "a" / "00000006.png") as one, Image.open(tmp_path / "b" / "00000006.png") as two:
        assert one.width == 2 * (128 + 4) + 4
        assert np.asarray(one).tobytes() != np.asarray(two).tobytes(), "the averaged weights draw, not the trained ones"
