"""From a YAML file and `section.key=value` overrides to a `Recipe`, with one clear line for every mistake."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from latentgen.core.errors import UserError
from latentgen.recipe.schema import Recipe


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `2e-4` as a number (YAML 1.1 wants `2.0e-4`) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes the texts which `_Loader` would read as numbers (`"1e5"`)."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise UserError(f"{where}: not valid YAML: {line}") from None


def valid_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every `section.key` that a recipe may hold, as users type it."""
    keys = []
    for name, field in model.model_fields.items():
        shown = prefix + (field.alias or name)
        keys.append(shown)
        annotation = field.annotation
        for candidate in (annotation, *get_args(annotation)):
            # Python 3.10 takes tuple[int, ...] for a class
            if get_origin(candidate) is None and isinstance(candidate, type) and issubclass(candidate, BaseModel):
                keys += valid_keys(candidate, shown + ".")
    return keys


def _nearest(key: str) -> str:
    """A hint at the valid key that was meant: one spelled alike, or one that the last part abbreviates (`lr`)."""
    keys = valid_keys()
    leaves = [k for k in keys if not any(other.startswith(k + ".") for other in keys)]
    section, _, last = key.rpartition(".")
    inside = {k.rpartition(".")[2]: k for k in leaves if k.rpartition(".")[0] == section}
    # Of the keys with one last part the least nested is meant, unless the section says otherwise.
    nested = sorted(leaves, key=lambda k: k.count("."))
    tails = {k.rpartition(".")[2]: k for k in reversed(nested)} | inside
    short = {"".join(word[0] for word in tail.split("_")): k for tail, k in tails.items() if "_" in tail}
    near = (
        [inside[name] for name in difflib.get_close_matches(last, inside, n=1, cutoff=0.75)]
        or [k for k in [short.get(last)] if k]
        or [k for tail, k in inside.items() if len(last) > 2 and tail.startswith(last)]
        or difflib.get_close_matches(key, leaves, n=1, cutoff=0.6)
        or [tails[name] for name in difflib.get_close_matches(last, tails, n=1, cutoff=0.6)]
    )
    return f"; did you mean `{near[0]}`?" if near else f"; the sections are {', '.join(Recipe.model_fields)}"


def _explain(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key `{key}`{_nearest(key)}"
    key = ".".join(str(part) for part in first["loc"] if str(part).isidentifier() or isinstance(part, int))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if not key else f"{where}: `{key}`: {message} (found {first['input']!r})"


def _merge(base: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        inner = base.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"command line: unknown key `{dotted}`{_nearest(dotted)}")
        base = inner
    base[last] = value


def load_recipe(path: str | Path | None, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file; None means the defaults alone.
        overrides: `section.key=value` strings, values in YAML; they win over the file.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (the nearest valid one is named), a value has
            the wrong type or range, or an override has no `=`.
    """
    values: dict[str, Any] = {}
    where = "recipe"
    if path is not None:
        where = str(path)
        if not Path(path).is_file():
            raise UserError(f"{path}: no such recipe; `configs/` holds those that come with the project")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a text file in UTF-8") from None
        loaded = _parse(text, where)
        if loaded is not None and not isinstance(loaded, Mapping):
            raise UserError(f"{path}: a recipe is a mapping of sections, found {type(loaded).__name__}")
        values = dict(loaded or {})
    known = set(valid_keys())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"command line: `{override}` is not an override; write section.key=value")
        if key not in known:
            raise UserError(f"command line: unknown key `{key}`{_nearest(key)}")
        _merge(values, key, _parse(text, f"command line, {key}"))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, where)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, every default spelled out; `load_recipe` reads it back equal."""
    values = recipe.model_dump(mode="json", by_alias=True)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=110)


def recipe_schema() -> str:
    """The JSON schema that editors complete recipes from."""
    return json.dumps(Recipe.model_json_schema(by_alias=True), indent=2) + "\n"
