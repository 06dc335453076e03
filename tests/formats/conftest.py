"""A whole model with tiny random weights, and the folder it is written to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentgen.formats.model import Model
from latentgen.formats.model_folder import save_model


@pytest.fixture(scope="session")
def tiny_model(tiny_builder: Callable[..., Model]) -> Callable[..., Model]:
    """Builder of tiny models: `tiny_model(prediction, schedule, **metadata)`."""

    def make(prediction: str = "eps", schedule: dict[str, Any] | None = None, **metadata: Any) -> Model:
        model = tiny_builder(prediction)
        return replace(model, schedule=model.schedule if schedule is None else schedule, metadata=metadata)

    return make


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Model]) -> Path:
    """A model folder that tests may read but not change."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(tiny_model(), folder)
    return folder
