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
from latentgen.data.captions import CachedWords
from latentgen.data.fetch import CachedBatches
from latentgen.data.latents import of_one_shape
from latentgen.diffusion.losses import huber, l1, min_snr, mse, unit
from latentgen.diffusion.noise import student
from latentgen.diffusion.noise_levels import uniform
from latentgen.diffusion.parameterization import EDM, Flow, V, to_x0
from latentgen.diffusion.variational import bound_term, interpolated_log_variance
from latentgen.formats.model import Model
from latentgen.models.context import join
from latentgen.models.unet import build_unet
from latentgen.pipelines.generate import Request
from latentgen.tasks.caching import Share, cache_latents
from latentgen.tasks.diffusion import DiffusionTask, Objective

DrawOf = Callable[..., Draw]


def cached(dropout: float = 0.3) -> CachedBatches:
    source = np.random.default_rng(0)
    moments = source.standard_normal((8, 2, 4, 4, 4)).astype(np.float16)
    moments[:, 1] = np.abs(moments[:, 1])
    states = source.standard_normal((17, 10, 16)).astype(np.float16)
    words = CachedWords({"context": states}, [(2 * i + 1, 2 * i + 2) for i in range(8)], dropout)
    return CachedBatches(of_one_shape(moments), words)


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
    assert torch.equal(drawn.context.states, batch["context"])
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


def changed(model: Model, **objective: Any) -> DiffusionTask:
    made = task(model)
    return DiffusionTask(model, dataclasses.replace(made.objective, **objective), made.previews, columns=2)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "other noise": {"offset_noise": 0.1, "pyramid_discount": 0.5, "input_perturbation": 0.1},
    "pfgm++": {"parameterization": EDM(augmented_dim=8.0)},
    "by loss": {"density": None},
}


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_draws_do_not_depend_on_the_micro_batch(kind: str, size: int, tiny: Model, draw: DrawOf) -> None:
    made, fetch = changed(tiny, **KINDS[kind]), cached()
    if kind == "by loss":
        torch.nn.init.normal_(made.modules["log_variance"].get_parameter("series"), std=0.1)
    whole = made.draws(fetch(draw()), draw())
    parts = [made.draws(fetch(d), d) for d in (draw(range(at, at + size)) for at in range(0, 8, size))]
    assert torch.equal(join([part.context for part in parts]).states, whole.context.states)
    for name in ("x0", "noise", "x", "sigma", "share", "quantile"):
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
        out = model.unet(x, time, **drawn.context.inputs()).sample
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


@pytest.mark.parametrize("balanced", [False, True])
def test_the_weights_that_a_batch_brings_are_applied(balanced: bool, tiny: Model, draw: DrawOf) -> None:
    made, fetch, d = changed(tiny, balanced=balanced), cached(), draw()
    batch, weight = fetch(d), torch.tensor([1.0, 0.5] * 4)
    with torch.no_grad():
        plain = made.losses("unet", batch, d)
        weighted = made.losses("unet", {**batch, "weight": weight}, d)
        same = made.losses("unet", {**batch, "weight": torch.ones(8)}, d)
        rows = [({k: v[i : i + 1] for k, v in batch.items()}, draw(range(i, i + 1))) for i in range(8)]
        each = torch.stack([made.losses("unet", part, row)["loss"] for part, row in rows])
    torch.testing.assert_close(weighted["loss"], (weight * each).mean(), rtol=1e-4, atol=1e-6)
    assert torch.equal(weighted["error"], plain["error"])
    assert torch.equal(same["loss"], plain["loss"])


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


def test_only_the_input_is_perturbed_and_only_by_what_is_asked(tiny: Model, draw: DrawOf) -> None:
    batch, d = cached()(draw()), draw()
    plain = task(tiny).draws(batch, d)
    moved = changed(tiny, input_perturbation=0.25).draws(batch, d)
    assert torch.equal(moved.noise, plain.noise)
    fresh = d.normal("perturbation", (4, 4, 4))
    sigma = plain.sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(moved.x - plain.x, 0.25 * sigma * fresh, rtol=1e-4, atol=1e-4)
    offset = changed(tiny, offset_noise=0.1).draws(batch, d)
    torch.testing.assert_close(
        offset.noise - plain.noise, (0.1 * d.normal("offset", (4, 1, 1))).expand_as(offset.noise)
    )
    heavy = changed(tiny, parameterization=EDM(augmented_dim=3.0)).draws(batch, d)
    torch.testing.assert_close(heavy.noise, student(plain.noise, d.uniform("radius"), 3.0))
    far = changed(tiny, parameterization=EDM(augmented_dim=1e12)).draws(batch, d)
    torch.testing.assert_close(far.x, changed(tiny, parameterization=EDM()).draws(batch, d).x, rtol=1e-4, atol=1e-4)
    assert not torch.equal(changed(tiny, pyramid_discount=0.5).draws(batch, d).noise, plain.noise)


@pytest.mark.parametrize("cuts", [[8], [4, 4], [1, 2, 5]])
def test_errors_by_level_are_the_means_of_each_quarter(cuts: list[int], tiny: Model, draw: DrawOf) -> None:
    """However the batch is cut: the loop averages micro-batches by their size, as it does the loss."""
    made, fetch = task(tiny), cached()
    with torch.no_grad():
        each = torch.stack(
            [made.losses("unet", fetch(d), d)["error"] for d in (draw(range(i, i + 1)) for i in range(8))]
        )
        order = made.draws(fetch(draw()), draw()).sigma.argsort()
        expected = each[order].reshape(4, 2).mean(1)  # two of eight examples in each quarter
        starts = [sum(cuts[:i]) for i in range(len(cuts))]
        parts = [draw(range(at, at + n)) for at, n in zip(starts, cuts, strict=True)]
        found = [(len(d.rows), made.losses("unet", fetch(d), d)) for d in parts]
    for k in range(4):
        mean = sum(n * losses[f"error/{k + 1}"] for n, losses in found) / 8
        torch.testing.assert_close(mean, expected[k], rtol=1e-4, atol=1e-6)


def test_levels_drawn_by_their_loss_resume_from_what_was_learned(
    tiny_builder: Callable[..., Model], draw: DrawOf
) -> None:
    """The draws are a function of the step and of learned weights, which a checkpoint holds; nothing else is kept."""
    fetch, model = cached(0.0), tiny_builder()
    made = changed(model, density=None)
    assert made.phases()[0].trains == ("unet", "log_variance")
    before = made.draws(fetch(draw()), draw())
    torch.testing.assert_close(before.sigma, task(model).draws(fetch(draw()), draw()).sigma, rtol=1e-4, atol=0)
    torch.testing.assert_close(before.share, torch.ones(8))
    optimizer = torch.optim.AdamW(made.modules["log_variance"].parameters(), lr=5e-3)
    for step in range(60):
        loss = made.losses("unet", fetch(draw(step=step)), draw(step=step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = made.draws(fetch(draw()), draw())
    assert (after.sigma - before.sigma).abs().max() > 0.05
    fresh = changed(model, density=None)
    fresh.modules["log_variance"].load_state_dict(made.modules["log_variance"].state_dict())
    again = fresh.draws(fetch(draw()), draw())
    assert torch.equal(again.sigma, after.sigma)
    assert torch.equal(again.share, after.share)
    with torch.no_grad():
        values = made.losses("unet", fetch(draw()), draw())
        each = [made.losses("unet", fetch(d), d)["error"] for d in (draw(range(i, i + 1)) for i in range(8))]
    expected = (torch.stack(each) * again.share).mean()  # what teaches the density adds nothing to the loss's value
    torch.testing.assert_close(values["loss"], expected, rtol=1e-4, atol=1e-5)


def test_the_density_is_taught_by_the_loss_and_the_network_is_not_by_it(tiny: Model, draw: DrawOf) -> None:
    fetch, made = cached(), changed(tiny, density=None)
    made.losses("unet", fetch(draw()), draw())["loss"].backward()
    with_density = {name: p.grad.clone() for name, p in tiny.unet.named_parameters() if p.grad is not None}
    assert made.modules["log_variance"].get_parameter("series").grad is not None
    tiny.unet.zero_grad(set_to_none=True)
    task(tiny).losses("unet", fetch(draw()), draw())["loss"].backward()
    for name, p in tiny.unet.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(with_density[name], p.grad, rtol=1e-2, atol=1e-5)
    tiny.unet.zero_grad(set_to_none=True)


def with_variance(build: Callable[..., Model]) -> Model:
    torch.manual_seed(0)
    unet = build_unet(
        latent_size=4, latent_channels=4, channels=(8, 16), layers_per_block=1, attention=(False, True), heads=2,
        context_dim=16, norm_groups=4, learned_variance=True,
    )  # fmt: skip
    return dataclasses.replace(build(), unet=unet)


def test_the_bound_teaches_the_variance_and_not_the_mean(tiny_builder: Callable[..., Model], draw: DrawOf) -> None:
    model, fetch = with_variance(tiny_builder), cached()
    assert model.learned_variance
    made = changed(model, vlb_weight=1.0)
    last = model.unet.conv_out.weight
    losses = made.losses("unet", fetch(draw()), draw())
    assert losses["loss"].item() == pytest.approx(losses["error"].item() + losses["vlb"].item(), rel=1e-4)
    losses["vlb"].backward()
    assert last.grad is not None
    assert last.grad[:4].abs().max() == 0, (
        "the mean learns from the squared error alone (arXiv 2102.09672, section 3.1)"
    )
    assert last.grad[4:].abs().max() > 0


def test_the_logged_bound_is_the_sum_over_the_table(tiny_builder: Callable[..., Model], draw: DrawOf) -> None:
    """Written out for one example at a time: T times the term from its time to the one before."""
    model, fetch = with_variance(tiny_builder), cached()
    made, p = changed(model), model.parameterization()
    assert isinstance(p, V)
    with torch.no_grad():
        found = made.losses("unet", fetch(draw()), draw())["vlb"]
        d = made.draws(fetch(draw()), draw())
        t = p.table.t_of_sigma(d.sigma)
        out = model.unet(p.scalings(d.sigma).c_in.view(-1, 1, 1, 1) * d.x, t, **d.context.inputs()).sample
    below = torch.where(t >= 1, p.table.sigma_of_t(t - 1), 0.0)
    spread = interpolated_log_variance(out[:, 4:], d.sigma, below)
    terms = bound_term(d.x0, d.x, to_x0(p, out[:, :4], d.x, d.sigma), spread, d.sigma, below)
    torch.testing.assert_close(found, 1000 * terms.mean(), rtol=1e-4, atol=1e-4)


def test_neither_autoencoder_nor_text_encoder_runs(
    tiny_builder: Callable[..., Model], draw: DrawOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_builder()

    def fail(*inputs: Any, **named: Any) -> Any:
        raise AssertionError("a frozen network ran in a training step")

    for network, names in ((model.vae, ("forward", "encode", "decode")), (model.towers[0].encoder, ("forward",))):
        for name in names:
            monkeypatch.setattr(network, name, fail)
    monkeypatch.setattr(type(model.towers[0].tokenizer), "__call__", fail)
    losses = task(model).losses("unet", cached()(draw()), draw())
    losses["loss"].backward()
    with pytest.raises(AssertionError, match="frozen network"):
        model.vae.encode(torch.zeros(1, 3, 16, 16))
    assert all(p.grad is None for p in model.vae.parameters())
    assert all(p.grad is None for p in model.towers[0].encoder.parameters())
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


def measured(made: DiffusionTask, d: Draw) -> dict[str, Tensor]:
    return made.measure(made.modules, cached(0.0)(d), d)


@pytest.mark.parametrize("kind", ["plain", "balanced", "by loss"])
def test_what_is_measured_does_not_depend_on_what_is_learned_along(kind: str, tiny: Model, draw: DrawOf) -> None:
    """Each part is a quarter of the levels, one in each eighth of it; the loss is the weighted error at those."""
    changes = {"plain": {}, "balanced": {"balanced": True}, "by loss": {"density": None}}[kind]
    made, p = changed(tiny, weight=min_snr, **changes), tiny.parameterization()
    if kind != "plain":
        torch.nn.init.normal_(made.modules["log_variance"].get_parameter("series"))
    for part in range(4):
        d = draw(step=part, stage="x validation")
        u = (part + (d.permutation("stratum") + d.uniform("level")) / 8) / 4
        assert torch.equal((u * 4).long(), torch.full((8,), part))
        assert torch.equal((u * 32).long().sort().values, torch.arange(8) + 8 * part)
        batch = cached(0.0)(d)
        sigma = p.sigma_of_fraction(u)
        x0 = batch["mean"] + batch["std"] * d.normal("posterior", (4, 4, 4))
        noise, c = d.normal("noise", (4, 4, 4)), p.scalings(sigma)
        s = sigma.view(-1, 1, 1, 1)
        with torch.no_grad():
            x = c.c_in.view(-1, 1, 1, 1) * (x0 + s * noise)
            out = tiny.unet(x, c.c_noise, encoder_hidden_states=batch["context"]).sample
        error = (out - p.target(x0, noise, sigma)).square().flatten(1).mean(1)
        found = measured(made, d)
        torch.testing.assert_close(found["error"], error, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["loss"], error * min_snr(sigma, p), rtol=1e-4, atol=1e-5)
        assert not found["loss"].requires_grad


def test_the_same_is_measured_however_a_batch_is_cut(tiny: Model, draw: DrawOf) -> None:
    made = task(tiny)
    whole = measured(made, draw(step=2))
    parts = [measured(made, draw(range(at, at + 3), step=2)) for at in (0, 3)] + [
        measured(made, draw(range(6, 8), step=2))
    ]
    for name, value in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, rtol=1e-4, atol=1e-5)


def test_latents_encoded_in_the_step_are_those_of_the_cache(
    tiny: Model, few: Callable, draw: DrawOf, tmp_path: Path
) -> None:
    source, d, made = few(8, shapes=((16, 24),)), draw(), task(tiny)
    kept = cache_latents(tiny, source, tmp_path, flip=True, share=Share())
    there, live = (
        dataclasses.replace(cached(), latents=latents, **more)
        for latents, more in ((kept, {}), (None, {"pictures": source, "flip": True}))
    )
    with torch.autocast("cpu", torch.bfloat16):  # of the U-Net alone
        one, other = (made.draws(fetch(d), d) for fetch in (there, live))
    assert one.x0.shape == (8, 4, 4, 6)
    torch.testing.assert_close(other.x0, one.x0, rtol=2e-3, atol=2e-3)  # the cache is float16
    assert torch.equal(other.noise, one.noise)
    assert not other.x0.requires_grad


@pytest.mark.parametrize("loss", [mse, l1, huber])
def test_masked_pixels_count_by_the_mean_of_their_mask(loss: Callable, tiny: Model, draw: DrawOf) -> None:
    d, made = draw(), task(tiny, min_snr)
    made.objective = dataclasses.replace(made.objective, loss=loss, mask_floor=0.25)
    batch = cached()(d)
    mask = torch.zeros(8, 1, 16, 16, dtype=torch.uint8)
    mask[:, :, :, :6] = 255  # the second pixel of the latents is half covered
    with torch.no_grad():
        plain, masked = (made.losses("unet", {**batch, **more}, d) for more in ({}, {"loss_mask": mask}))
        drawn = made.draws({**batch, "loss_mask": mask}, d)
        out = made._predict(made._networks(), drawn)
        p = made.objective.parameterization
        target = p.target(drawn.x0, drawn.noise, drawn.sigma)
        counts = (1.0, 0.5, 0.25, 0.25)
        each = [
            count * loss(out[..., k : k + 1], target[..., k : k + 1], p.fraction_of_sigma(drawn.sigma), drawn.sigma) / 4
            for k, count in enumerate(counts)
        ]
    assert torch.equal(masked["error"], plain["error"]), "as it is without masks"
    expected = (sum(each) * min_snr(drawn.sigma, p)).mean()
    torch.testing.assert_close(masked["loss"], expected)
    assert float(masked["loss"]) < float(plain["loss"])
    white = {**batch, "loss_mask": torch.full_like(mask, 255)}
    torch.testing.assert_close(made.losses("unet", white, d)["loss"], plain["loss"])
