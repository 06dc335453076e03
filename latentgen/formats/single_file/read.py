"""A single file, in the layout of the original programs, as `Parts`. Nothing is looked up in a network."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.noise_tables import NoiseTable
from latentgen.formats.component_configs import (
    CLIP_TOKENS,
    RULES,
    text_config,
    tiny_vae_config,
    unet_config,
    vae_config,
)
from latentgen.formats.families import part_names, recognise, said
from latentgen.formats.folder_parts import parts_of_folder
from latentgen.formats.found import Found
from latentgen.formats.headers import Header
from latentgen.formats.model_index import pipeline_of
from latentgen.formats.original.layouts import EMA, IGNORED, TITLES, Place
from latentgen.formats.original.renaming import PROJECTION, to_diffusers
from latentgen.formats.part_check import check_part
from latentgen.formats.parts import TOKENIZERS, Parts, State, canonical
from latentgen.formats.scheduler import read_schedule, scheduler_config
from latentgen.formats.single_file.vocabulary import tokenizer_files
from latentgen.formats.tensor_files import read_tensors

logger = logging.getLogger("latentgen.formats")

METADATA_ENTRY = "latentgen.json"
"""The entry of a file's metadata with what latentgen.json holds in a folder."""

V_WITNESS, V_SPREAD = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias", 0.09
"""Of Stable Diffusion 2: a tensor whose standard deviation is larger in the published models that predict v."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user says of a file, where it does not say it itself or says it wrongly.

    Attributes:
        family: one of `RULES`.
        prediction: "eps" or "v".
        base: a model folder whose configurations, tokenizers and missing networks are taken.
        ema: take the averaged weights of the U-Net, which some files of 2022 have besides the last ones.
        allow_pickle: open .ckpt, .pt and .bin files, as `read_tensors` does.
    """

    family: str | None = None
    prediction: str | None = None
    base: Path | None = None
    ema: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if self.family not in (None, *RULES):
            raise UserError(f"family {self.family} is unknown; it is one of {', '.join(RULES)}")
        if self.prediction not in (None, "eps", "v"):
            raise UserError(f"prediction {self.prediction} is unknown; a single file can have eps or v")


def read_single_file(path: Path, wishes: Wishes | None = None) -> Parts:
    """A Stable Diffusion model, or one of its networks, from a file.

    Args:
        path: .safetensors; with `wishes.allow_pickle` also .ckpt, .pt and .bin.
        wishes: what to do differently from what the file says.

    Raises:
        UserError: one line: no such file, cut off, a pickle, something else than a model, tensors missing.
    """
    path, wishes = Path(path), wishes or Wishes()
    header, tensors = read_tensors(path, allow_pickle=wishes.allow_pickle)
    found = _require_model(recognise(header), path)
    family, told = wishes.family or found.family, said(header)
    base = parts_of_folder(wishes.base) if wishes.base is not None else None
    if wishes.ema:
        tensors = _averaged(tensors, found.places.get("unet"), path)
    states, left = _states(tensors, found.places, family)
    scheduler = _scheduler(found, told, wishes, base, states, family, path)
    side = _side(header, family, scheduler)
    configs = {**_derived(states, found.places, family, side, told, base), **told.get("configs", {})}
    if base is not None:
        configs |= {part: config for part, config in base.configs.items() if part in states}
    for part, state in states.items():
        for name in check_part(part, configs[part], state, str(path)):
            left.append(f"{part}: {name}")
            del state[name]
    if left:
        logger.warning("%s: %d tensors are left out, no network has them; the first is %s", path, len(left), left[0])
    added = {part: state for part, state in base.states.items() if part not in states} if base is not None else {}
    return Parts(
        family=family,
        configs={**{part: base.configs[part] for part in added if base is not None}, **configs},
        states={**states, **added},
        scheduler=scheduler,
        pipeline=_pipeline(found, told, family),
        tokenizers=_tokenizers([*states, *added], configs, told, base, family, path),
        metadata=json.loads(header.metadata.get(METADATA_ENTRY, "{}")),
    )


def _require_model(found: Found, path: Path) -> Found:
    remedies = {
        "lora": "apply it to a model with `latentgen lora merge`, or convert it with `latentgen lora convert`",
        "embedding": "it belongs to the prompt of a model, not in a folder of its own",
        "controlnet": "it goes beside a model, and cannot be imported as one",
        "unknown": f"latentgen opens {', '.join(TITLES.values())}, their autoencoders and text encoders",
    }
    if found.kind in remedies:
        raise UserError(f"{path} holds no model but this: {found.title}; {remedies[found.kind]}")
    return found


def _averaged(tensors: Mapping[str, Tensor], place: Place | None, path: Path) -> dict[str, Tensor]:
    """The file's tensors with the U-Net's averages in place of its last weights."""
    changed = dict(tensors)
    names = part_names(tensors, place) if place is not None else []
    for name in names:
        average = EMA + name.removeprefix("model.").replace(".", "")
        if average not in tensors:
            raise UserError(f"{path} has no averaged weights ({average} is missing); leave --ema out")
        changed[name] = tensors[average]
    if not names:
        raise UserError(f"{path} has no U-Net, so no averaged weights of one; leave --ema out")
    return changed


def _states(
    tensors: Mapping[str, Tensor], places: Mapping[str, Place], family: str | None
) -> tuple[dict[str, State], list[str]]:
    """Each part's tensors under diffusers' names, and the names of those that belong to no part."""
    states: dict[str, State] = {}
    left = {name for name in tensors if not IGNORED.match(name)}
    unknown: list[str] = []
    for part, place in places.items():
        names = part_names(tensors, place)
        left -= set(names)
        own = {name.removeprefix(place.prefix): tensors[name] for name in names}
        state, rest = (own, []) if place.kind == "diffusers" else to_diffusers(place.kind, own)
        state = canonical(part, state)
        if family == "sd2" and place.kind == "open_clip" and PROJECTION in state:
            state = _without_last_layer(state)
        states[part] = state
        unknown += [place.prefix + name for name in rest]
    return states, [*unknown, *sorted(left)]


def _without_last_layer(state: State) -> State:
    """Stable Diffusion 2 reads the last layer but one: diffusers keeps the text encoder up to there.

    A file that has the projection has the whole tower; programs that write the shorter one leave both away.
    """
    last = max(int(name.split(".")[3]) for name in state if name.startswith("text_model.encoder.layers."))
    gone = (f"text_model.encoder.layers.{last}.", PROJECTION)
    return {name: value for name, value in state.items() if not name.startswith(gone)}


def _derived(
    states: Mapping[str, State],
    places: Mapping[str, Place],
    family: str | None,
    side: int | None,
    told: Mapping[str, Any],
    base: Parts | None,
) -> dict[str, dict[str, Any]]:
    """Configurations from shapes, of the parts of which neither the file nor the base says them."""
    known = {*told.get("configs", {}), *(base.configs if base is not None else ())}
    shapes = {part: {name: tuple(v.shape) for name, v in state.items()} for part, state in states.items()}
    configs: dict[str, dict[str, Any]] = {}
    for part, own in shapes.items():
        if part in known:
            continue
        if part == "unet":
            pooled = shapes.get("text_encoder_2", {}).get(PROJECTION, (None,))[0]
            configs[part] = unet_config(own, family or "sd1", pooled, side)
        elif part == "vae":
            tiny = "decoder.layers.0.weight" in own
            configs[part] = tiny_vae_config(own) if tiny else vae_config(own, family, side)
        else:
            configs[part] = text_config(own, quick_gelu=places[part].kind == "clip")
    return configs


def _side(header: Header, family: str | None, scheduler: Mapping[str, Any]) -> int | None:
    """Of the training pictures, where the file says it; None is the family's."""
    told = header.metadata.get("modelspec.resolution", "").lower().partition("x")[0]
    if told.isdigit():
        return int(told)
    # Stable Diffusion 2 learned to predict v on larger pictures than eps.
    return 768 if family == "sd2" and scheduler.get("prediction_type") == "v_prediction" else None


def _scheduler(
    found: Found,
    told: Mapping[str, Any],
    wishes: Wishes,
    base: Parts | None,
    states: Mapping[str, State],
    family: str | None,
    path: Path,
) -> Mapping[str, Any]:
    if "unet" not in states:
        return {}
    known: Mapping[str, Any] = told.get("scheduler") or {}
    if base is not None and not known and found.prediction is None:
        known = base.scheduler
    if known:
        prediction, schedule = read_schedule(known, str(path))
        if wishes.prediction in (None, prediction):
            return known
        return scheduler_config(wishes.prediction, schedule)
    prediction = wishes.prediction or found.prediction
    if prediction is None and family == "sd2":
        prediction = _guessed_prediction(states["unet"], found, path)
    return scheduler_config(prediction or "eps", asdict(NoiseTable(zero_terminal_snr=found.zero_terminal_snr)))


def _guessed_prediction(unet: State, found: Found, path: Path) -> str:
    """Stable Diffusion 2 came in both kinds with the same tensors: one of them is telling in the published models."""
    if found.in_channels == 9:
        return "eps"  # that was only published so
    witness = unet.get(V_WITNESS)
    guess = "v" if witness is not None and float(witness.float().std(correction=0)) > V_SPREAD else "eps"
    other = "eps" if guess == "v" else "v"
    logger.warning(
        "%s does not say what its U-Net predicts; by its weights it looks like %s. "
        "If pictures come out as noise, import it again with --prediction %s",
        path,
        guess,
        other,
    )
    return guess


def _pipeline(found: Found, told: Mapping[str, Any], family: str | None) -> Mapping[str, Any]:
    if found.in_channels is None or family is None:
        return {}
    return told.get("pipeline") or pipeline_of(family, found.in_channels)


def _tokenizers(
    parts: list[str],
    configs: Mapping[str, Mapping[str, Any]],
    told: Mapping[str, Any],
    base: Parts | None,
    family: str | None,
    path: Path,
) -> dict[str, Mapping[str, str]]:
    tokenizers: dict[str, Mapping[str, str]] = {}
    for part, name in TOKENIZERS.items():
        if part not in parts:
            continue
        if base is not None and name in base.tokenizers:
            tokenizers[name] = base.tokenizers[name]
        elif name in told.get("tokenizers", {}):
            tokenizers[name] = told["tokenizers"][name]
        elif configs[part]["vocab_size"] == CLIP_TOKENS:
            tokenizers[name] = tokenizer_files(family or "sd1", name)
        else:
            raise UserError(
                f"{path}: its text encoder knows {configs[part]['vocab_size']} tokens, CLIP's vocabulary has "
                f"{CLIP_TOKENS}, and the file brings no tokenizer; name a model folder that has it with --base FOLDER"
            )
    return tokenizers
