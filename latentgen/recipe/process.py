"""From the recipe's `diffusion` section to a process, with plain words for what does not go together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from latentgen.core.errors import UserError
from latentgen.formats.scheduler import parameterization
from latentgen.recipe.schema import Diffusion, Recipe

logger = logging.getLogger(__name__)

OF_TABLES = ("eps", "v", "x0")


def process(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """What a new network predicts, and the numbers of its process, as `formats.scheduler` describes them.

    Raises:
        UserError: they describe no process.
    """
    d = recipe.diffusion
    prediction = d.target or "v"
    if prediction == "flow":
        # arXiv 2403.03206, eq. 23: the root of the ratio of the numbers of pixels, which is the ratio of the sides
        grown = recipe.data.resolution / d.shift_resolution if d.shift_resolution else 1.0
        return prediction, {"shift": d.shift * grown}
    if prediction in OF_TABLES:
        table = {"kind": d.schedule, "beta_start": d.beta_start, "beta_end": d.beta_end}
        return prediction, {**table, "zero_terminal_snr": d.zero_terminal_snr}
    given = {"sigma_min": d.sigma_min, "sigma_max": d.sigma_max}
    if prediction == "edm":
        given |= {"sigma_data": d.sigma_data, "augmented_dim": d.augmented_dim}
    return prediction, {key: value for key, value in given.items() if value is not None}


def check_process(recipe: Recipe) -> None:
    """Raise `UserError` for settings of `diffusion` that make no sense together; warn of those without effect."""
    d, new = recipe.diffusion, recipe.unet.source is None
    if new:
        if d.augmented_dim is not None and d.target != "edm":
            raise UserError("diffusion.augmented_dim: PFGM++ needs diffusion.target: edm, whose scalings fit any noise")
        if d.learned_variance and (d.target or "v") not in OF_TABLES:
            raise UserError(
                f"diffusion.learned_variance: {d.target} has no steps whose variance could be learned; choose "
                "diffusion.target eps, v or x0"
            )
        parameterization(*process(recipe))
    check_objective(d, d.learned_variance and new, new and d.augmented_dim is not None)
    prediction = (d.target or "v") if new else None
    default = Diffusion()
    for key, used in USED.items():
        if getattr(d, key) != getattr(default, key) and not used(d, prediction):
            reason = "is ignored with these other settings" if new else "is ignored, or comes with unet.from"
            logger.warning("diffusion.%s %s", key, reason)


def check_objective(d: Diffusion, learned_variance: bool, augmented: bool) -> None:
    """Raise `UserError` where the way of teaching does not fit the network and its process."""
    if d.density == "importance" and d.balanced:
        raise UserError(
            "diffusion.density: importance draws levels by their loss, which diffusion.balanced makes equal; choose one"
        )
    white = {"offset_noise": d.offset_noise, "pyramid_discount": d.pyramid_discount}
    if augmented:
        for key, value in white.items():
            if value > 0:
                raise UserError(f"diffusion.{key}: PFGM++ has its own kind of noise; leave augmented_dim or this out")
    if learned_variance:
        for key, value in {**white, "input_perturbation": d.input_perturbation}.items():
            if value > 0:
                raise UserError(
                    f"diffusion.{key}: the bound that teaches the variance holds for plain noise; leave it out"
                )


def _of_tables(d: Diffusion, prediction: str | None) -> bool:
    return prediction in OF_TABLES


def _of_betas(d: Diffusion, prediction: str | None) -> bool:
    return prediction in OF_TABLES and d.schedule in ("linear", "scaled_linear", "sigmoid")


def _of_flow(d: Diffusion, prediction: str | None) -> bool:
    return prediction == "flow"


def _of_sigmas(d: Diffusion, prediction: str | None) -> bool:
    return prediction in ("edm", "ve")


def _of_edm(d: Diffusion, prediction: str | None) -> bool:
    return prediction == "edm"


def _when(key: str, *values: Any) -> Callable[[Diffusion, str | None], bool]:
    return lambda d, prediction: getattr(d, key) in values


USED: Mapping[str, Callable[[Diffusion, str | None], bool]] = {
    "schedule": _of_tables,
    "beta_start": _of_betas,
    "beta_end": _of_betas,
    "zero_terminal_snr": _of_tables,
    "shift": _of_flow,
    "shift_resolution": _of_flow,
    "sigma_data": _of_edm,
    "sigma_min": _of_sigmas,
    "sigma_max": _of_sigmas,
    "augmented_dim": _of_edm,
    "learned_variance": _of_tables,
    "vlb_weight": lambda d, prediction: prediction is None or d.learned_variance,
    "density_mean": _when("density", "logit_normal", "log_normal"),
    "density_std": _when("density", "logit_normal", "log_normal"),
    "density_low": _when("density", "cosine_interpolated"),
    "density_high": _when("density", "cosine_interpolated"),
    "min_snr_gamma": _when("weight", "min_snr", "soft_min_snr"),
    "p2_k": _when("weight", "p2"),
    "p2_gamma": _when("weight", "p2"),
    "huber_c": _when("loss", "huber"),
    "huber_schedule": _when("loss", "huber"),
}
"""Settings that others may leave without effect: (section, prediction, or None where unet.from has it) -> used?"""
