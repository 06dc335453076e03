"""Likelihood along the probability flow, against densities that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.likelihood import PROBES, draw_probes, log_likelihood
from latentgen.formats.model import Model
from latentgen.models.text import encode_text

RANGE = {"sigma_min": 0.03, "sigma_max": 40.0}
SHAPE = (2, 1, 3)
D = math.prod(SHAPE)


class Mixture:
    """Gaussians of any mean [k, d] and covariance [k, d, d]: exact denoiser and density, by matrices."""

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        self.weights, self.means, self.covariances = weights, means, covariances

    def noised(self, sigma: float) -> torch.distributions.MultivariateNormal:
        eye = torch.eye(self.means.shape[1], dtype=torch.float64)
        return torch.distributions.MultivariateNormal(self.means, self.covariances + sigma**2 * eye)

    def log_prob(self, x: Tensor, sigma: float) -> Tensor:
        each = self.noised(sigma).log_prob(x.flatten(1)[:, None])
        return torch.logsumexp(each + self.weights.log(), dim=1)

    def sample(self, count: int) -> Tensor:
        """Equally many from each component, at the noise level where the tests begin."""
        generator = torch.Generator().manual_seed(9)
        noise = torch.randn(count, len(self.means), D, 1, dtype=torch.float64, generator=generator)
        drawn = self.means + (self.noised(RANGE["sigma_min"]).scale_tril @ noise)[..., 0]
        return drawn.reshape(-1, *SHAPE)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Tweedie: x + sigma^2 * score, the score written out for each component."""
        assert (sigma == sigma[0]).all()
        level, flat = float(sigma[0]), x.flatten(1)
        noised = self.noised(level)
        share = torch.softmax(noised.log_prob(flat[:, None]) + self.weights.log(), dim=1)
        offset = self.means[None] - flat[:, None]
        scores = torch.linalg.solve(noised.covariance_matrix, offset[..., None])[..., 0]
        return (flat + level**2 * (share[..., None] * scores).sum(dim=1)).reshape(x.shape)


def random_mixture(k: int, size: float) -> Mixture:
    generator = torch.Generator().manual_seed(k)
    factor = torch.randn(k, D, D, dtype=torch.float64, generator=generator) / math.sqrt(D)
    covariances = size**2 * (factor @ factor.mT + 0.1 * torch.eye(D, dtype=torch.float64))
    means = torch.randn(k, D, dtype=torch.float64, generator=generator)
    means -= means.mean(dim=0)
    return Mixture(torch.linspace(1, 2, k, dtype=torch.float64).softmax(0), means, covariances)


def points(batch: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, *SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(9))


def white(x: Tensor, sigma: Tensor) -> Tensor:
    """Exact denoiser of Normal(0, 1). Elementwise."""
    return x / (1 + sigma.to(x.dtype).reshape(-1, 1, 1, 1) ** 2)


def test_exact_on_white_data() -> None:
    x = points()
    found = log_likelihood(white, x, **RANGE, steps=64)
    variance = 1 + RANGE["sigma_min"] ** 2
    expected = -0.5 * x.flatten(1).square().sum(dim=1) / variance - 0.5 * D * math.log(2 * math.pi * variance)
    torch.testing.assert_close(found.nats, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.bits_per_dim, -expected / D / math.log(2), rtol=0, atol=1e-4)
    assert (found.step_error < 1e-4).all()
    scale = math.sqrt((1 + RANGE["sigma_max"] ** 2) / variance)
    torch.testing.assert_close(found.noise, x * scale, rtol=1e-4, atol=1e-3)


def test_exact_on_a_correlated_gaussian() -> None:
    """At sigma_max it is not quite the sphere that is assumed there, so that end is set far away."""
    data = random_mixture(1, 0.7)
    x = data.sample(3)
    found = log_likelihood(data.denoise, x, sigma_min=0.03, sigma_max=2000.0, steps=64)
    torch.testing.assert_close(found.nats, data.log_prob(x, 0.03), rtol=0, atol=1e-4)


def test_exact_on_a_mixture_and_the_step_error_is_honest() -> None:
    data = random_mixture(3, 0.7)
    x = data.sample(1)
    exact = data.log_prob(x, 0.03)
    found = log_likelihood(data.denoise, x, sigma_min=0.03, sigma_max=2000.0, steps=96)
    torch.testing.assert_close(found.nats, exact, rtol=0, atol=1e-3)
    assert (found.probe_error == 0).all()
    rough = log_likelihood(data.denoise, x, sigma_min=0.03, sigma_max=2000.0, steps=24)
    error = (rough.nats - exact).abs()
    assert (error < 3 * rough.step_error).all()
    assert (rough.step_error < 0.5).all()


@pytest.mark.parametrize("kind", sorted(PROBES))
def test_probes_estimate_the_exact_trace(kind: str) -> None:
    data = random_mixture(1, 0.7)
    x = data.sample(2)
    generators = [torch.Generator().manual_seed(i) for i in range(len(x))]
    probes = draw_probes(kind, SHAPE, generators, 200)
    exact = log_likelihood(data.denoise, x, **RANGE, steps=4)
    found = log_likelihood(data.denoise, x, **RANGE, steps=4, probes=probes)
    assert ((found.nats - exact.nats).abs() < 4 * found.probe_error).all()
    assert (found.probe_error < 1.2).all()
    assert (found.probe_error > 0).all()
    torch.testing.assert_close(found.noise, exact.noise)


def test_signs_are_exact_where_the_jacobian_is_diagonal() -> None:
    """Their squares are 1; a normal probe's are not."""
    x = points(2)
    exact = log_likelihood(white, x, **RANGE, steps=8).nats
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    signs = log_likelihood(white, x, **RANGE, steps=8, probes=draw_probes("rademacher", SHAPE, generators))
    torch.testing.assert_close(signs.nats, exact, rtol=1e-9, atol=1e-9)
    assert signs.probe_error.isnan().all()
    normal = log_likelihood(white, x, **RANGE, steps=8, probes=draw_probes("gaussian", SHAPE, generators))
    assert ((normal.nats - exact).abs() > 1e-3).all()


def test_a_picture_does_not_depend_on_its_batch() -> None:
    x = points(3, torch.float32)
    probes = draw_probes("rademacher", SHAPE, [torch.Generator().manual_seed(i) for i in range(3)], 2)
    own = draw_probes("rademacher", SHAPE, [torch.Generator().manual_seed(2)], 2)
    assert torch.equal(probes[:, 2:], own)
    together = log_likelihood(white, x, **RANGE, steps=4, probes=probes)
    alone = log_likelihood(white, x[2:], **RANGE, steps=4, probes=own)
    assert torch.equal(together.nats[2:], alone.nats)
    assert torch.equal(together.step_error[2:], alone.step_error)


def test_the_scale_of_the_data_is_an_offset_in_bits() -> None:
    """Shrinking data by 127.5 adds log 127.5 to the log density of each value; counting values takes it away again."""
    x = points(2)
    wide = log_likelihood(white, x, **RANGE, steps=64)
    scale = 1 / 127.5

    def narrow(x: Tensor, sigma: Tensor) -> Tensor:
        return scale * white(x / scale, sigma / scale)

    small = {name: value * scale for name, value in RANGE.items()}
    shrunk = log_likelihood(narrow, x * scale, **small, sigma_data=scale, values_per_unit=127.5, steps=64)
    torch.testing.assert_close(shrunk.nats, wide.nats + D * math.log(127.5))
    torch.testing.assert_close(shrunk.bits_per_dim, wide.bits_per_dim)


def test_latents_of_a_model(tiny: Model) -> None:
    """The whole network differentiates, also where the caller has switched gradients off."""
    from latentgen.diffusion.parameterization import denoiser

    p = tiny.parameterization()
    context = encode_text(tiny.towers, ["a red circle"]).states

    def network(x_in: Tensor, c_noise: Tensor) -> Tensor:
        states = context.expand(len(x_in), -1, -1)
        return tiny.unet(x_in, c_noise, encoder_hidden_states=states, return_dict=False)[0]

    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    probes = draw_probes("rademacher", (4, 4, 4), [torch.Generator().manual_seed(i) for i in range(2)])
    sizes = {"sigma_min": p.sigma_min, "sigma_max": p.sigma_max, "steps": 4}
    with torch.no_grad():
        both = log_likelihood(denoiser(p, network), x, **sizes, probes=probes)
        alone = log_likelihood(denoiser(p, network), x[1:], **sizes, probes=probes[:, 1:])
    assert both.nats.isfinite().all()
    assert not both.noise.requires_grad
    torch.testing.assert_close(both.nats[1:], alone.nats, rtol=1e-4, atol=1e-2)


def test_mistakes() -> None:
    x = points(1)
    with pytest.raises(UserError, match="sigma_min"):
        log_likelihood(white, x, sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(UserError, match="even"):
        log_likelihood(white, x, **RANGE, steps=3)
    with pytest.raises(UserError, match="probes of shape"):
        log_likelihood(white, x, **RANGE, probes=torch.ones(1, 2, 2, 3))
    with pytest.raises(UserError, match="values_per_unit"):
        log_likelihood(white, x, **RANGE, values_per_unit=0)
    with pytest.raises(UserError, match="rademacher"):
        draw_probes("rademacker", SHAPE, [torch.Generator()])
    with pytest.raises(UserError, match="at least 1"):
        draw_probes("gaussian", SHAPE, [torch.Generator()], 0)
