"""README.md of a model folder: what the model is, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from latentgen.formats.credits import Credits
from latentgen.formats.original.layouts import TITLES

if TYPE_CHECKING:
    from latentgen.formats.parts import Parts

TAGS: Mapping[str, tuple[str, ...]] = {
    "sd1": ("stable-diffusion",),
    "sd2": ("stable-diffusion",),
    "sdxl": ("stable-diffusion-xl",),
    "sdxl-refiner": ("stable-diffusion-xl",),
}


def model_card(parts: Parts, name: str, credits: Credits | None = None) -> str:
    """A model card: a YAML header, then what is known of the model.

    Args:
        parts: the model.
        name: its title where nobody gave one.
        credits: what a person says of it; the license by a name that the hub knows, such as "apache-2.0".
    """
    said = credits or Credits()
    trained: Any = parts.metadata.get("metadata", {})
    recipe: Mapping[str, Any] = trained.get("recipe", {}) if isinstance(trained, Mapping) else {}
    base = _base_model(recipe)
    header: dict[str, Any] = {
        **({"license": said.license} if said.license else {}),
        "library_name": "diffusers",
        "tags": ["text-to-image", "latentgen", *TAGS.get(parts.family or "", ())],
        **({"base_model": base} if base else {}),
        **({"pipeline_tag": "text-to-image"} if parts.whole else {}),
    }
    lines = [f"# {said.title or name}", "", *([said.description, ""] if said.description else []), _what(parts), ""]
    if said.trigger_phrase:
        lines += [f"Say `{said.trigger_phrase}` in the prompt.", ""]
    if said.author:
        lines += [f"Made by {said.author}.", ""]
    if recipe:
        lines += ["## Training", "", *_training(recipe), ""]
    if not said.license:
        lines += ["No license is stated. The license of the model that this one descends from applies to it.", ""]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n" + "\n".join(lines).rstrip() + "\n"


def _base_model(recipe: Mapping[str, Any]) -> str | None:
    unet = recipe.get("unet", {})
    source = str(unet.get("from") or "") if isinstance(unet, Mapping) else ""
    return source if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) else None  # the hub wants its own names only


def _what(parts: Parts) -> str:
    networks = ", ".join(
        f"{part} of {sum(value.numel() for value in state.values()):,} parameters"
        for part, state in parts.states.items()
    )
    kind = f"A model of the layout of {TITLES[parts.family]}" if parts.family else "A network"
    prediction = parts.scheduler.get("prediction_type")
    return f"{kind}: {networks}.{f' Its U-Net predicts {prediction}.' if prediction else ''}"


def _training(recipe: Mapping[str, Any]) -> list[str]:
    data, train = recipe.get("data", {}), recipe.get("train", {})
    lines = []
    if isinstance(data, Mapping) and data:
        where = Path(str(data.get("path") or data.get("source"))).name
        lines.append(f"- Data: {where}, {data.get('resolution')}x{data.get('resolution')} pixels.")
    if isinstance(train, Mapping) and train:
        lines.append(
            f"- {train.get('steps')} steps of {train.get('global_batch')} pictures, {train.get('optimizer')}, learning "
            f"rate {train.get('learning_rate')}."
        )
    return [*lines, "- The whole recipe is in `latentgen.json`."]
