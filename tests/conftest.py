"""Small things that many tests need: a whole model with random weights, a few pictures, a recipe of seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray

from latentgen.core.rand import Draw
from latentgen.data.frame import CENTRE, Frame, Place, Shape
from latentgen.data.order import Order
from latentgen.data.sources.base import usual_order
from latentgen.diffusion.noise_tables import NoiseTable
from latentgen.formats.model import Model
from latentgen.models.autoencoder import build_autoencoder
from latentgen.models.clip import Clip, ClipShape, build_clip, to_transformers
from latentgen.models.text import Tower, train_tokenizer
from latentgen.models.unet import build_unet
from latentgen.recipe.load import load_recipe
from latentgen.recipe.schema import Recipe

SIDE = 16


def pytest_configure() -> None:
    """Tiny tensors gain nothing from threads, parallel workers would fight for the cores; and no test is about time."""
    torch.set_num_threads(1)
    settings.register_profile("latentgen", deadline=None)
    settings.load_profile("latentgen")


@dataclass(frozen=True)
class FewPictures:
    """A source of random pictures in memory; example i is a pure function of i and `seed`. Shapes take turns, where
    there are some."""

    count: int = 6
    seed: int = 0
    side: int = SIDE
    shapes: tuple[Shape, ...] = ()

    def __len__(self) -> int:
        return self.count

    def key(self) -> str:
        return f"few-{self.count}-{self.seed}-{self.side}"

    def name(self, index: int) -> str:
        return f"picture {index}"

    def digest(self, index: int) -> str:
        return f"few-{self.seed}-{index}-{self.side}"

    def picture_key(self, index: int) -> str:
        return self.digest(index)

    def shape(self, index: int) -> Shape:
        return self.shapes[index % len(self.shapes)] if self.shapes else (self.side, self.side)

    def frame(self, index: int, at: Place = CENTRE) -> Frame:
        return Frame(self.shape(index), (0, 0))

    def mask(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8] | None:
        return None

    def order(self, batch: int) -> Order:
        return usual_order(self, batch)

    def image(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8]:
        coarse = np.random.default_rng([self.seed, index]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        height, width = self.shape(index)
        return np.kron(coarse, np.ones((height // 4, width // 4, 1), dtype=np.uint8))

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(f"picture {index} {word}" for word in ("one", "two", "three")[: 1 + index % 3])

    def control(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8]:
        return 255 - self.image(index)

    def contrasts(self, index: int, caption: str) -> tuple[tuple[str, ...], ...]:
        assert caption in self.captions(index)
        return tuple(f"picture {index + more} {caption.split()[2]}" for more in (1, 2, 3)), (f"no {caption}",)


def build_tiny_clip(vocab_size: int) -> Clip:
    torch.manual_seed(1)
    return build_clip(
        ClipShape(
            image_size=SIDE,
            vision="vit",
            patch_size=8,
            vision_width=16,
            vision_layers=1,
            vision_heads=2,
            text_width=16,
            text_layers=1,
            text_heads=2,
            context_length=10,
            vocab_size=vocab_size,
            eos_token_id=vocab_size - 1,
            embed_dim=8,
        )
    )


def build_tiny(prediction: str = "v", seed: int = 0) -> Model:
    """Pictures of 16x16 pixels, latents [4, 4, 4], captions of 10 tokens."""
    tokenizer = train_tokenizer(["a red circle", "a blue star", "picture one two three"] * 2, 560, 10)
    clip = build_tiny_clip(len(tokenizer))
    encoder = to_transformers(clip, bos_token_id=len(tokenizer) - 2, pad_token_id=len(tokenizer) - 1)
    torch.manual_seed(seed)
    vae = build_autoencoder(
        resolution=SIDE, latent_channels=4, channels=(8, 8, 8), layers_per_block=1, norm_groups=4, mid_attention=False
    )
    unet = build_unet(
        latent_size=4,
        latent_channels=4,
        channels=(8, 16),
        layers_per_block=1,
        attention=(False, True),
        heads=2,
        context_dim=16,
        norm_groups=4,
    )
    return Model(
        vae=vae.eval(),
        towers=(Tower("text_encoder", encoder, tokenizer),),
        unet=unet.eval(),
        prediction=prediction,
        schedule={"shift": 1.0} if prediction == "flow" else asdict(NoiseTable()),
    )


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_builder() -> Callable[..., Model]:
    """`tiny_builder(prediction, seed)` makes a model that the test may change."""
    return build_tiny


@pytest.fixture(scope="session")
def tiny() -> Model:
    """A model that tests may use but not change."""
    return build_tiny()


@pytest.fixture(scope="session")
def clip_builder() -> Callable[[int], Clip]:
    return build_tiny_clip


@pytest.fixture(scope="session")
def few() -> Callable[..., FewPictures]:
    """`few(count, seed, side, shapes)` makes a source of pictures in memory."""
    return FewPictures


@pytest.fixture
def draw() -> Callable[..., Draw]:
    """`draw(rows, ...)` makes the draws of one step of 8 examples."""

    def make(rows: range = range(8), *, step: int = 0, seed: int = 0, stage: str = "test", **other: Any) -> Draw:
        return Draw(seed, stage, step, other.pop("global_batch", 8), rows, other.pop("indices", tuple(rows)))

    return make


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """A recipe whose networks have a few thousand weights."""
    return load_recipe(
        None,
        [
            "name=tiny",
            "data={size: 32, resolution: 64, captions: 2, holdout: 4}",
            "autoencoder={channels: [8, 16, 16], latent_channels: 4, norm_groups: 4}",
            "autoencoder.train={steps: 4, global_batch: 8}",
            "text_encoder={width: 32, layers: 1, context_length: 12, embed_dim: 16}",
            "text_encoder.image={patch: 16, width: 32, layers: 1}",
            "unet={channels: [32, 64], layers_per_block: 1}",
            "train={steps: 12, global_batch: 8, warmup_steps: 3}",
        ],
    )
