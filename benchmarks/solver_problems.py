"""What `solvers.py` solves: an analytic mixture, and the model that comes with the project."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from latentgen.diffusion.parameterization import Denoiser, Parameterization, V, per_example

PROMPTS = (
    "a red circle",
    "two green stars",
    "a blue square above a yellow heart",
    "a large pink cross",
    "a small blue triangle",
    "three yellow circles",
    "a green square left of a red star",
    "an orange heart",
)
FITTING_PROMPTS = (
    "a blue circle",
    "two yellow squares",
    "a red star below a green cross",
    "a small orange heart",
    "a large purple triangle",
    "three pink stars",
    "a yellow circle right of a blue triangle",
    "a green square",
    "a red heart",
    "two purple circles",
    "a pink square above an orange star",
    "a large green cross",
    "a small yellow star",
    "three red triangles",
    "an orange circle left of a blue heart",
    "a blue cross",
)
OF_EACH = 6
"""Pictures of each fitting prompt."""


@dataclass(frozen=True)
class Problem:
    """One thing to sample from.

    denoiser(test) and noise(test) serve the pictures that are measured (True) or others that schedules are fitted to
    (False): noise [b, c, h, w] is standard normal, and the denoiser knows that batch's conditioning.
    """

    name: str
    title: str
    parameterization: Parameterization
    denoiser: Callable[[bool], Denoiser]
    noise: Callable[[bool], Tensor]


@dataclass(frozen=True)
class Mixture:
    """Eight Gaussians in 64 dimensions with their own spread in each; about unit variance in all. float64."""

    means: Tensor = field(init=False)  # [8, 64]
    stds: Tensor = field(init=False)  # [8, 64]
    log_shares: Tensor = field(init=False)  # [8]

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(8)
        draw = {"dtype": torch.float64, "generator": generator}
        object.__setattr__(self, "means", 0.9 * torch.randn(8, 64, **draw))
        object.__setattr__(self, "stds", 0.05 * 10 ** torch.rand(8, 64, **draw))  # 0.05 to 0.5
        object.__setattr__(self, "log_shares", torch.arange(2, 10, dtype=torch.float64).log().log_softmax(0))

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The exact mean of x0 given x: each component's own, weighted with its chance."""
        flat = x.double().flatten(1)[:, None]  # [b, 1, 64]
        variance = self.stds**2 + sigma.double().reshape(-1, 1, 1) ** 2  # [b, 8, 64]
        offset = flat - self.means
        log_chance = self.log_shares - 0.5 * (offset**2 / variance + variance.log()).sum(dim=2)
        each = self.means + self.stds**2 / variance * offset
        return (torch.softmax(log_chance, dim=1)[..., None] * each).sum(dim=1).reshape(x.shape).to(x.dtype)


def mixture(pictures: int, first: int = 0) -> Problem:
    """Sampled with Stable Diffusion's table of noise levels. first: other pictures for another number."""
    data = Mixture()

    def noise(test: bool) -> Tensor:
        generator = torch.Generator().manual_seed(int(test) + first)
        return torch.randn(pictures, 4, 4, 4, dtype=torch.float64, generator=generator)

    title = "analytic mixture of 8 Gaussians in 64 dimensions"
    return Problem("mixture", title, V(), lambda test: data.denoise, noise)


def shapes(folder: Path, pictures: int, guidance_scale: float, first: int = 0) -> Problem:
    """Latents of the shipped model under classifier-free guidance. first: the seed of the first picture."""
    from latentgen.diffusion.guidance import CFG, batched, bind
    from latentgen.diffusion.parameterization import denoiser as make_denoiser
    from latentgen.formats.model_folder import load_model
    from latentgen.models.text import encode_text

    model = load_model(folder)
    p = model.parameterization()
    side, channels = model.unet.config["sample_size"], model.unet.config["in_channels"]

    def denoiser(test: bool) -> Denoiser:
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(pictures)] if test else OF_EACH * list(FITTING_PROMPTS)
        texts = {"cond": prompts, "uncond": [""] * len(prompts)}
        states = {kind: encode_text(model.towers, text).states for kind, text in texts.items()}

        def denoise_rows(x: Tensor, sigma: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
            context = torch.cat([states[kind][at % len(prompts)] for kind, at in rows.items()])

            def network(x_in: Tensor, c_noise: Tensor) -> Tensor:
                return model.unet(x_in, c_noise, encoder_hidden_states=context, return_dict=False)[0]

            return make_denoiser(p, network)(x, sigma)

        return bind(CFG(guidance_scale), batched(denoise_rows))

    def noise(test: bool) -> Tensor:
        seeds = range(first, first + pictures) if test else range(1000, 1000 + OF_EACH * len(FITTING_PROMPTS))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return torch.cat([torch.randn(1, channels, side, side, generator=own) for own in generators])

    title = f"latents of {folder.name} with classifier-free guidance {guidance_scale:g}"
    return Problem("shapes", title, p, denoiser, noise)


class Counted:
    """A denoiser that counts the evaluations each picture costs."""

    def __init__(self, denoise: Denoiser, pictures: int) -> None:
        self.denoise, self.pictures, self.rows = denoise, pictures, 0

    @property
    def calls(self) -> float:
        return self.rows / self.pictures

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.rows += len(x)
        return self.denoise(x, sigma)


def network_in_their_space(denoise: Denoiser, parameterization: V) -> Callable[[Tensor, Tensor], Tensor]:
    """The v prediction that a scheduler of diffusers expects from network(x_vp, t): the change of variables back."""

    def network(x_vp: Tensor, t: Tensor) -> Tensor:
        sigma = parameterization.table.sigma_of_t(t.to(torch.float64)).expand(len(x_vp))
        x = x_vp * per_example((1 + sigma**2).sqrt(), x_vp).to(x_vp.dtype)
        x0 = denoise(x, sigma.to(x.dtype))
        noise = (x - x0) / per_example(sigma, x).to(x.dtype)
        return parameterization.target(x0, noise, sigma.to(x.dtype))

    return network
