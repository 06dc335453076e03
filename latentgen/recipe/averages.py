"""A model folder whose network is an average of another length, put together from a run's snapshots."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from latentgen.core.errors import UserError
from latentgen.core.runfolder import RunFolder
from latentgen.engine.ema_profiles import LONGEST
from latentgen.engine.ema_snapshots import Rebuilt, rebuild
from latentgen.formats.control import save_control
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model, quiet_libraries, save_model
from latentgen.models.autoencoder import AutoencoderForTraining, fold_whitening
from latentgen.models.clip import Clip, load_clip, to_transformers
from latentgen.models.text import Tower
from latentgen.recipe import build
from latentgen.recipe.finetune import finished, makes_adapter, prepare, write_result
from latentgen.recipe.load import load_recipe
from latentgen.recipe.schema import Recipe

logger = logging.getLogger(__name__)

STAGES = ("vae", "clip", "unet")
POOR, LOUD = 0.05, 5.0
"""A fit that leaves more than this share of its profile, or adds up this many times the snapshots' rounding, is
worth a warning."""


def export_average(
    run: Path, length: float, folder: Path, *, stage: str = "unet", step: int | None = None
) -> tuple[Path, Rebuilt]:
    """Write a model folder whose `stage`'s network has the average of relative `length` after `step` steps; of a run
    that trains a ControlNet, a ControlNet's folder.

    Of a run that fine-tunes, what it trains is averaged; where its result is an adapter folder, so is this.

    The other networks are the run's own. An autoencoder is whitened by the statistics of the run's own, so that the
    U-Net finds the latents where it learned them.

    Args:
        run: the run's folder. Its U-Net stage need not be finished.
        length: above 0, up to 0.28.
        step: one that has a snapshot; None is the last.

    Raises:
        UserError: no such run, stage or snapshot; a stage that is needed is not finished; `folder` is something else.
    """
    if not 0 < length <= LONGEST:
        raise UserError(f"--length {length}: relative lengths are above 0, up to {LONGEST}; 0.05 to 0.15 is usual")
    if stage not in STAGES:
        raise UserError(f"--stage {stage}: choose one of {', '.join(STAGES)}")
    files = RunFolder(Path(run))
    if not files.recipe.is_file():
        raise UserError(f"{run}: no run is there (recipe.yaml is missing); give a folder such as runs/NAME")
    recipe = load_recipe(files.recipe)
    network = _named(recipe) if stage == "unet" else stage
    found = rebuild(files.ema(stage), network, length, step)
    _warn(found)
    model, clip = _model(files, recipe)
    about = {"stage": stage, "length": length, "step": found.step, "residual": found.fit.residual}
    model = dataclasses.replace(model, metadata={**model.metadata, "average": about})
    if stage == "unet":
        training = prepare(recipe, model)
        trained = {name: network for name, network in training.model.networks().items() if name in training.trains}
        for name, own in trained.items():
            _fill(own, found.tensors if name == network else rebuild(files.ema(stage), name, length, step).tensors)
        if makes_adapter(recipe):
            write_result(recipe, training, trained, folder, about)
            return folder, found
        model = finished(recipe, training, trained)
        if model.control is not None:
            save_control(model.control, folder, model.metadata)
            return folder, found
    elif stage == "vae":
        model = dataclasses.replace(model, vae=_whitened(files, recipe, found.tensors))
    else:
        assert clip is not None
        clip.load_state_dict(_inside(found.tensors, "clip."))
        tokenizer = model.towers[0].tokenizer
        ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        tower = Tower("text_encoder", to_transformers(clip, **ids), tokenizer)  # type: ignore[arg-type]
        model = dataclasses.replace(model, towers=(tower,))
    save_model(model, folder, clip=clip)
    return folder, found


def _named(recipe: Recipe) -> str:
    """The network of the U-Net's stage whose average is reported on."""
    if recipe.finetune is None or recipe.finetune.method != "none":
        return "unet"
    return "tokens" if recipe.finetune.control is None else "control"


def _fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a network what changed of it; what was frozen is as it is."""
    own = network.state_dict()
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)


def _warn(found: Rebuilt) -> None:
    noise = math.sqrt(sum(factor**2 for factor in found.fit.factors))
    if found.fit.residual > POOR:
        logger.warning(
            "%.0f%% of this average's profile cannot be made from the snapshots: choose a length nearer to those of "
            "train.ema_lengths, or train with more snapshots",
            100 * found.fit.residual,
        )
    if noise > LOUD:
        logger.warning(
            "so short a length adds up %.0f times the snapshots' rounding; train with a shorter one in "
            "train.ema_lengths, or train.ema_precision=fp32",
            noise,
        )


def _model(files: RunFolder, recipe: Recipe) -> tuple[Model, Clip | None]:
    """The run's model, or what it is as long as its U-Net stage goes on."""
    if recipe.finetune is None and (files.model / "model_index.json").is_file():
        towers = files.model / "clip"
        return load_model(files.model), load_clip(towers) if towers.is_dir() else None
    results = {"vae": recipe.autoencoder.source, "clip": recipe.text_encoder.source}
    for stage, source in results.items():
        if source is None and not files.result(stage).is_dir():
            raise UserError(f"{files.path}: its stage {stage} is not finished, and a model folder needs it; train on")
    clip, zero_empty = None, False
    with quiet_libraries():
        if recipe.autoencoder.source is None:
            vae = AutoencoderKL.from_pretrained(files.result("vae"))
        else:
            vae = load_model(Path(recipe.autoencoder.source)).vae
        if recipe.text_encoder.source is None:
            result = files.result("clip")
            text_encoder = CLIPTextModel.from_pretrained(result / "text_encoder")
            tokenizer, clip = CLIPTokenizer.from_pretrained(result / "tokenizer"), load_clip(result / "clip")
            towers = (Tower("text_encoder", text_encoder, tokenizer),)
        else:
            there = load_model(Path(recipe.text_encoder.source))
            towers, zero_empty = there.towers, there.zero_empty
    assert not isinstance(vae, dict)
    model = build.new_model(recipe, vae, towers, zero_empty)
    values = recipe.model_dump(mode="json", by_alias=True)
    values["autoencoder"]["posterior"] = build.posterior(recipe)
    return dataclasses.replace(model, metadata={"recipe": values}), clip


def _whitened(files: RunFolder, recipe: Recipe, tensors: Mapping[str, Tensor]) -> AutoencoderKL:
    measured = files.result("vae") / "latent_statistics.json"
    statistics = json.loads(measured.read_text())
    trained = AutoencoderForTraining(build.new_vae(recipe))
    trained.load_state_dict(tensors)
    mean, std = (torch.tensor(statistics[name], dtype=torch.float64) for name in ("mean", "std"))
    fold_whitening(trained.vae, mean, std)
    return trained.vae.eval()


def _inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
