"""From the recipe's section `data` to a patient of the doctor, and from its findings to a clean table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPTokenizer

from latentgen.core.errors import UserError
from latentgen.core.files import write_text
from latentgen.data.buckets import choose_shapes
from latentgen.data.doctor.checks import Patient
from latentgen.data.doctor.looking import Looked, look
from latentgen.data.doctor.page import Finding
from latentgen.data.fetch import from_bytes, squared, to_bytes
from latentgen.data.images import decode
from latentgen.data.sources.folder import FolderStore
from latentgen.data.sources.stored import Store
from latentgen.data.sources.table import TableStore
from latentgen.formats.model_folder import load_model
from latentgen.models.chunks import words_of
from latentgen.models.clip import Clip, load_clip
from latentgen.models.text import cut_tokens, tokenize
from latentgen.recipe.schema import Recipe
from latentgen.recipe.sources import reading, store_of

LICENCES = ("license", "licence", "license_url", "licence_url", "copyright")
"""Keys of metadata that name one."""


@dataclass(frozen=True)
class Case:
    """A set that was looked at: its files and what is known of them."""

    store: Store
    patient: Patient


def case_of(recipe: Recipe, against: str | None, clip: Path | None) -> Case:
    """Look at the pictures of a recipe.

    Args:
        against: pictures that it is validated on, of the same kind of source.
        clip: model folder whose `clip/` judges which captions fit.

    Raises:
        UserError: data are missing; there is no CLIP where one is named.
    """
    data = recipe.data
    if data.source in ("shapes", "mixture"):
        raise UserError(f"data.source: {data.source}: name a folder, a table, shards or a data set to be examined")
    store = store_of(data)
    looked, bad = look(store, data.max_pixels, "looking at pictures")
    others: Sequence[Looked] = ()
    if against is not None:
        other = store_of(data.model_copy(update={"path": against, "split": None}))
        others, _ = look(other, data.max_pixels, "looking at pictures of validation")
    cut = reading(data)
    if data.buckets is not None and looked:
        cut = cut.with_shapes(choose_shapes([p.size for p in looked], data.resolution, data.buckets, data.bucket_step))
    tokenizer, chunks = None, recipe.text_encoder.chunks
    if recipe.text_encoder.source is not None:
        model = load_model(Path(recipe.text_encoder.source))
        tokenizer, chunks = model.towers[0].tokenizer, max(chunks, model.chunks)
    patient = Patient(
        looked,
        [*store.skipped, *bad],
        others,
        cut.upscaling,
        data.max_upscale,
        None if tokenizer is None else _reader(tokenizer, chunks),
        None if clip is None else _scores(store, looked, clip),
        _from_names(store, looked),
        _stray(store),
        _licences(store, looked),
    )
    return Case(store, patient)


def write_clean(case: Case, findings: Sequence[Finding], target: Path) -> int:
    """Write a table of the pictures that are left when what is found is taken out; returns how many.

    The pictures themselves are not touched.

    Raises:
        UserError: the pictures are no files, or are not below the table's folder; the table is there already.
    """
    if target.exists():
        raise UserError(f"--fix {target}: is there already; choose another name")
    drop = {number for finding in findings for trouble in finding.troubles for number in trouble.drop}
    lines = []
    for picture in case.patient.looked:
        path = _path(case.store, picture.number)
        if path is None or not path.resolve().is_relative_to(target.parent.resolve()):
            raise UserError(f"--fix {target}: a table names files below its own folder; write it to where they are")
        if picture.number not in drop:
            name = path.resolve().relative_to(target.parent.resolve()).as_posix()
            row = {"file_name": name, "text": picture.captions[0], "captions": list(picture.captions[1:])}
            lines.append(json.dumps(row, ensure_ascii=False))
    write_text(target, "".join(f"{line}\n" for line in lines))
    return len(lines)


def _path(store: Store, number: int) -> Path | None:
    return store.path(number) if isinstance(store, FolderStore | TableStore) else None


def _reader(tokenizer: CLIPTokenizer, chunks: int) -> Callable[[Sequence[str]], list[tuple[int, list[str]]]]:
    """Of captions, how many tokens are cut, and which words of three letters or more are spelled by letters."""

    def read(captions: Sequence[str]) -> list[tuple[int, list[str]]]:
        known: dict[str, bool] = {}
        answers = []
        for caption, cut in zip(captions, cut_tokens(tokenizer, captions, chunks), strict=True):
            words = dict.fromkeys(word for word in caption.lower().split() if word.isalpha() and len(word) > 2)
            for word in words:
                if word not in known:
                    known[word] = sum(map(len, words_of(tokenizer, word))) < len(word.encode())
            answers.append((len(cut), [word for word in words if not known[word]]))
        return answers

    return read


@torch.no_grad()
def _scores(store: Store, looked: Sequence[Looked], folder: Path) -> list[float]:
    """How much better a picture's first caption fits it than the set's others do on average, in units of cosine."""
    if not (folder / "clip").is_dir():
        raise UserError(f"--clip {folder}: has no clip/; name a model folder that latentgen trained from nothing")
    clip: Clip = load_clip(folder / "clip").eval()
    tokenizer = load_model(folder).towers[0].tokenizer
    side = clip.shape.image_size
    image, text = [], []
    for at in range(0, len(looked), 64):
        some = looked[at : at + 64]
        pictures = [squared(_pixels(store, p), side) for p in some]
        image.append(torch.nn.functional.normalize(clip.encode_image(from_bytes(to_bytes(pictures))), dim=-1))
        tokens = tokenize(tokenizer, [p.captions[0] for p in some])
        text.append(torch.nn.functional.normalize(clip.encode_text(tokens), dim=-1))
    pictures, captions = torch.cat(image), torch.cat(text)
    own = (pictures * captions).sum(dim=1)
    return (own - pictures @ captions.mean(dim=0)).tolist()


def _pixels(store: Store, picture: Looked) -> NDArray[np.uint8]:
    return np.asarray(decode(store.content(picture.number)))


def _from_names(store: Store, looked: Sequence[Looked]) -> list[int]:
    if not isinstance(store, FolderStore):
        return []
    return [index for index, picture in enumerate(looked) if store.named_by_file(picture.number)]


def _stray(store: Store) -> list[str]:
    return store.stray_texts() if isinstance(store, FolderStore) else []


def _licences(store: Store, looked: Sequence[Looked]) -> list[bool] | None:
    """Of each picture whether its row of a metadata file names a licence; None where no row does."""
    if not isinstance(store, FolderStore | TableStore):
        return None
    named = store.rows_with(LICENCES)
    return None if not named else [store.name(picture.number) in named for picture in looked]
