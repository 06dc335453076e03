"""Whatever people name as a model: a folder, a run, a file, a repository of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from latentgen.core.errors import UserError
from latentgen.formats.folder_check import INDEX
from latentgen.formats.folder_parts import parts_of_folder
from latentgen.formats.headers import HALF, PICKLED, SUFFIX
from latentgen.formats.parts import Parts
from latentgen.formats.single_file.read import Wishes, read_single_file

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WANTED, UNWANTED = ("*/*.safetensors", "*.json", "*.txt", "*.md"), ("safety_checker/*", "*non_ema*")
"""Files of a repository that are fetched: of the folder layout; no pickles, no code, no second copy in one file."""


def open_source(source: str, wishes: Wishes | None = None) -> Parts:
    """The model that `source` names.

    Args:
        source: a model folder, a run folder with one, a single file, or "org/name" of the Hugging Face hub where no
            folder has that name.
        wishes: what to do differently from what the source says.

    Raises:
        UserError: one line that says what is wrong and what to do.
    """
    wishes, path = wishes or Wishes(), Path(source)
    if path.is_dir():
        inner = path / "model"
        folder = inner if not (path / INDEX).is_file() and (inner / INDEX).is_file() else path
        _refuse_wishes(wishes, folder)
        return parts_of_folder(folder, allow_pickle=wishes.allow_pickle)
    if not path.exists() and HUB_NAME.fullmatch(source) and path.suffix not in (SUFFIX, *PICKLED, *HALF):
        folder = fetch_repository(source)
        _refuse_wishes(wishes, folder)
        return parts_of_folder(folder)
    return read_single_file(path, wishes)


def _refuse_wishes(wishes: Wishes, folder: Path) -> None:
    given = [name for name in ("family", "prediction", "base", "ema") if getattr(wishes, name)]
    if given:
        raise UserError(f"--{given[0]} is for single files; {folder} is a model folder, which says that itself")


def fetch_repository(name: str) -> Path:
    """A repository of the Hugging Face hub as a local folder, downloaded where it is not there yet.

    Raises:
        UserError: it cannot be had: no network, no such repository, no permission.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError) as error:
        raise UserError(
            f"{name}: there is no folder of that name, and it cannot be had from the Hugging Face hub "
            f"({type(error).__name__}); check the spelling and the network, or download it and name the folder"
        ) from error
