"""How many examples a second one core reads, against what diffusers' training script does.

    python benchmarks/loader.py [--pictures 96] [--rounds 5] [--write]

The peer is the input side of diffusers' `train_text_to_image.py`: `datasets` (imagefolder), torchvision's Resize,
CenterCrop, RandomHorizontalFlip, ToTensor and Normalize in `with_transform`, and a DataLoader that stacks. Both sides
run in one process on one thread, under the same allocator setting, and end in float32 batches in [-1, 1]. Pictures are
JPEGs of quality 90 of noise of several scales, made anew and read from the disk's cache. Rounds alternate; figures are
examples per second of CPU time, the median of the rounds, and the ratio's range over rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latentgen.core.allocator import keep_memory
from latentgen.core.files import write_json, write_text
from latentgen.data.captions import CachedWords
from latentgen.data.fetch import CachedBatches, PictureBatches, from_bytes
from latentgen.data.latents import of_one_shape
from latentgen.data.loader import Cut, Loader
from latentgen.data.order import Shuffled
from latentgen.data.reading import Reading
from latentgen.data.sources.base import Source
from latentgen.data.sources.folder import FolderSource, FolderStore
from latentgen.data.sources.shard_writer import write_shards
from latentgen.data.sources.shards import ShardStore
from latentgen.data.sources.stored import Pictures

RESULTS = Path(__file__).parent / "results"
BATCH, SIDE = 16, 512


def photograph(number: int, width: int, height: int) -> Image.Image:
    """Noise of several scales, as a photograph's detail is spread."""
    draws = np.random.default_rng(number)
    whole = np.zeros((height, width, 3), dtype=np.float32)
    for scale in (2, 6, 24, 96):
        coarse = draws.normal(0, 1, (height // scale + 2, width // scale + 2, 3)).astype(np.float32)
        levels = [
            np.asarray(Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC))
            for c in range(3)
        ]
        whole += np.stack(levels, axis=2) * scale**0.6
    return Image.fromarray(np.clip(128 + 14 * whole, 0, 255).astype(np.uint8))


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> None:
    folder.mkdir()
    for number in range(count):
        photograph(number, *size).save(folder / f"{number:04d}.jpg", quality=90)
    rows = [{"file_name": f"{n:04d}.jpg", "text": f"picture {n}"} for n in range(count)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours(source: Source, steps: int) -> Callable[[], int]:
    """One pass through our loader."""
    fetch = PictureBatches(source, flip=True, captions=1)

    def run() -> int:
        shown = 0
        for _, parts in Loader(fetch, source.order(BATCH), 0, "unet", Cut(BATCH), steps).iterate(0):
            for _, batch in parts:
                image = from_bytes(batch["image"])
                assert image.shape[1:] == (3, SIDE, SIDE)
                shown += len(image)
        return shown

    return run


def peer(folder: Path, steps: int) -> Callable[[], int]:
    """One pass as diffusers' script reads."""
    import datasets
    from torchvision import transforms

    datasets.disable_progress_bars()
    data: Any = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    change = transforms.Compose(
        [
            transforms.Resize(SIDE, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(SIDE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def preprocess(examples: dict[str, Any]) -> dict[str, Any]:
        examples["pixel_values"] = [change(image.convert("RGB")) for image in examples["image"]]
        return examples

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixels.contiguous().float(), "text": [example["text"] for example in examples]}

    shown_data = data.with_transform(preprocess)

    def run() -> int:
        loader = torch.utils.data.DataLoader(shown_data, shuffle=True, collate_fn=collate, batch_size=BATCH)
        shown = 0
        for batch, _ in zip(loader, range(steps), strict=False):
            assert batch["pixel_values"].shape[1:] == (3, SIDE, SIDE)
            shown += len(batch["pixel_values"])
        return shown

    return run


def latents(count: int = 20_000, steps: int = 400) -> Callable[[], int]:
    """One pass through cached latents of 16x16x4, with text states, in batches of 64."""
    draws = np.random.default_rng(0)
    moments = draws.normal(0, 1, (count, 2, 4, 16, 16)).astype(np.float16)
    states = draws.normal(0, 1, (100, 24, 128)).astype(np.float16)
    words = CachedWords({"context": states}, [(1 + i % 99,) for i in range(count)], 0.1)
    fetch = CachedBatches(of_one_shape(moments), words)

    def run() -> int:
        shown = 0
        for _, parts in Loader(fetch, Shuffled(count), 0, "unet", Cut(64), steps).iterate(0):
            shown += sum(len(batch["mean"]) for _, batch in parts)
        return shown

    return run


def rate(run: Callable[[], int]) -> float:
    """Examples per second of CPU time."""
    begun = time.process_time()
    shown = run()
    return shown / (time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/loader.md and .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    steps = options.pictures // BATCH
    rows = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for name, size in (("512-px JPEG files", (640, 512)), ("1024-px JPEG files", (1280, 1024))):
            folder = root / str(size[0])
            write_pictures(folder, options.pictures, size)
            rows.append((name, ours(FolderSource(path=folder, resolution=SIDE), steps), peer(folder, steps)))
        write_shards([FolderStore(root / "640")], root / "tar", max_pixels=10**8)
        store = ShardStore(str(root / "tar"), local=root / "local")
        rows.insert(1, ("512-px JPEG in tar shards", ours(Pictures(store, Reading(SIDE)), steps), rows[0][2]))
        table = [measure(name, one, other, options.rounds) for name, one, other in rows]
    table.append(measure("cached latents 16x16x4", latents(), None, options.rounds))
    tell(table, options.write)


def measure(name: str, one: Callable[[], int], other: Callable[[], int] | None, rounds: int) -> dict[str, Any]:
    """Alternate the two sides."""
    one()
    if other is not None:
        other()
    mine, theirs = [], []
    for _ in range(rounds):
        mine.append(rate(one))
        theirs.append(rate(other) if other is not None else float("nan"))
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    row = {"what": name, "ours": statistics.median(mine)}
    if other is not None:
        row |= {"peer": statistics.median(theirs), "ratio": statistics.median(ratios)}
        row |= {"least": min(ratios), "most": max(ratios)}
    return row


def tell(table: list[dict[str, Any]], write: bool) -> None:
    libraries = ("torch", "torchvision", "datasets", "pillow", "simplejpeg")
    head = ", ".join(f"{name} {version(name)}" for name in libraries)
    lines = [
        "# Reading pictures",
        "",
        f"`python benchmarks/loader.py` on one thread of {processor()}; {head}.",
        "Examples per second of CPU time, medians; the peer is the input side of diffusers' `train_text_to_image.py`.",
        "",
        "| what | ours | peer | ratio | range over rounds |",
        "|---|---|---|---|---|",
    ]
    for row in table:
        theirs = (
            f"{row['peer']:.0f} | {row['ratio']:.2f} | {row['least']:.2f} to {row['most']:.2f}"
            if "peer" in row
            else "| |"
        )
        lines.append(f"| {row['what']} | {row['ours']:,.0f} | {theirs} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if write:
        write_text(RESULTS / "loader.md", text)
        write_json(RESULTS / "loader.json", {"processor": processor(), "libraries": head, "rows": table})


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
