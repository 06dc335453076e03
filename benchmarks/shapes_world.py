"""The world of shapes, measured: pictures a second on one core, and how often its judge is right.

    python benchmarks/shapes_world.py [--scenes 3000]

Prints the speed of the generator, the judge's acceptance of true renders (clean, blurred with sigma 1 pixel, JPEG
quality 85, noise at 30 dB PSNR, and all three in turn) and of captions with one attribute changed, and the judge's
time a picture.
"""

from __future__ import annotations

import argparse
import io
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

from latentgen.data.sources.shapes import ShapesSource, example
from latentgen.data.sources.shapes_captions import alterations, full_requirement, parse
from latentgen.evals.shapes_detect import detect
from latentgen.evals.shapes_score import judge

Damage = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def clean(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return image


def blur(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Gaussian, sigma 1 pixel."""
    return np.rint(ndimage.gaussian_filter(image.astype(np.float32), (1.0, 1.0, 0.0))).astype(np.uint8)


def jpeg(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Quality 85, chroma at half the resolution."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return np.asarray(Image.open(buffer))


def noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White noise at a PSNR of 30 dB."""
    noisy = image + rng.normal(0.0, 255 * 10 ** (-30 / 20), image.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def everything(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur, then noise, then JPEG: harder than what the judge is held to."""
    return jpeg(noise(blur(image, rng), rng), rng)


DAMAGES: dict[str, Damage] = {"clean": clean, "blur": blur, "jpeg": jpeg, "noise": noise, "all three": everything}


def speed(count: int) -> None:
    """Pictures and captions a second, as the data loader asks for them."""
    source = ShapesSource(size=count)
    for name, make in (("images", source.image), ("captions", source.captions)):
        start = time.perf_counter()
        for index in range(count):
            make(index)
        print(f"{name}: {count / (time.perf_counter() - start):,.0f} a second on one core")


def acceptance(name: str, damage: Damage, scenes: int) -> None:
    """One line: how many true captions and how many changed ones the judge accepts."""
    rng = np.random.default_rng(0)
    true, passed, seconds = 0, 0, 0.0
    asked: Counter[str] = Counter()
    fooled: Counter[str] = Counter()
    for number in range(scenes):
        shown = example(number, seed=1, split="all")
        image = damage(shown.image, rng)
        start = time.perf_counter()
        detection = detect(image)
        seconds += time.perf_counter() - start
        for caption in shown.captions:
            true += 1
            passed += judge(detection, parse(caption)).ok
        for attribute, changed in alterations(full_requirement(shown.scene)):
            asked[attribute] += 1
            fooled[attribute] += judge(detection, changed).ok
    wrong = ", ".join(f"{attribute} {100 * fooled[attribute] / asked[attribute]:.2f}" for attribute in sorted(asked))
    total = 100 * fooled.total() / asked.total()
    counts = f"{total:.3f}% of {asked.total()} changed"
    print(f"{name:10} accepts {100 * passed / true:6.2f}% of {true} true captions, {counts}")
    print(f"{'':10} changed attribute, accepted %: {wrong}; judge {1e3 * seconds / scenes:.2f} ms a picture")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=3000, help="scenes to judge under each kind of damage")
    scenes = parser.parse_args().scenes
    speed(5000)
    for name, damage in DAMAGES.items():
        acceptance(name, damage, scenes)


if __name__ == "__main__":
    main()
