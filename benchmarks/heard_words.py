"""Which words of a caption a model listens to, and at which noise levels.

    python benchmarks/heard_words.py [--model data/shapes-model] [--pictures 96]

For pictures of the shapes world: by how many percent the denoising error grows when one respect of the caption is made
false. Nothing grows for words that the model ignores, however well it draws.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from latentgen.cli.sample import SHIPPED
from latentgen.data.fetch import to_tensor
from latentgen.data.sources.shapes import ShapesSource
from latentgen.data.sources.shapes_captions import alterations, full_requirement, phrase
from latentgen.data.sources.shapes_layout import Draws
from latentgen.diffusion.parameterization import per_example
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model
from latentgen.models.autoencoder import encode_moments, latents_of
from latentgen.models.text import encode_text

SIGMAS = (0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 14.0)
Pairs = tuple[list[int], list[str]]


def captions_by_respect(source: ShapesSource, numbers: list[int]) -> tuple[list[str], dict[str, Pairs]]:
    """The caption that says everything of each picture; and for each respect, pictures with a caption false in it."""
    right: list[str] = []
    false: dict[str, Pairs] = defaultdict(lambda: ([], []))
    for row, number in enumerate(numbers):
        draws = Draws("heard words", number)
        full = full_requirement(source.scene(number))
        right.append(phrase(full, draws))
        by_respect = defaultdict(list)
        for respect, requirement in alterations(full):
            if not requirement.heldout:
                by_respect[respect].append(requirement)
        for respect, options in by_respect.items():
            rows, captions = false[respect]
            rows.append(row)
            captions.append(phrase(draws.pick(options), draws))
    return right, dict(false)


@torch.no_grad()
def errors(model: Model, x0: Tensor, captions: list[str], numbers: list[int], sigma: float) -> Tensor:
    """Squared error of each picture's denoised latents, the noise a function of the picture's number alone. [b]."""
    p, levels = model.parameterization(), torch.full((len(x0),), sigma)
    noise = torch.stack([torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(n)) for n in numbers])
    scalings, x = p.scalings(levels), x0 + sigma * noise
    context = encode_text(model.towers, captions).states
    x_in = per_example(scalings.c_in, x) * x
    out = model.unet(x_in, scalings.c_noise, encoder_hidden_states=context, return_dict=False)[0]
    return (out - p.target(x0, noise, levels)).square().flatten(1).mean(dim=1)


def main() -> None:
    """Print one table for pictures of one kind of object and one for pictures of two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--pictures", type=int, default=96, help="of each table")
    options = parser.parse_args()
    model = load_model(options.model)
    source = ShapesSource(seed=7, size=20 * options.pictures)
    print(f"{options.model}: error with one respect of the caption false, in percent above that with the right caption")
    for title, objects in (("one object, or several of one kind", 1), ("two objects", 2)):
        every = (n for n in range(len(source)) if len({item.kind for item in source.scene(n).items}) == objects)
        numbers = [n for n, _ in zip(every, range(options.pictures), strict=False)]
        right, false = captions_by_respect(source, numbers)
        with torch.no_grad():
            x0 = latents_of(model.vae, encode_moments(model.vae, to_tensor([source.image(n) for n in numbers]))[0])
        print(f"\n{title:36}" + "".join(f"{sigma:>8}" for sigma in SIGMAS))
        base = {sigma: errors(model, x0, right, numbers, sigma) for sigma in SIGMAS}
        print(f"{'error, right caption':36}" + "".join(f"{float(base[sigma].mean()):8.3f}" for sigma in SIGMAS))
        for respect, (rows, captions) in sorted(false.items()):
            cells = []
            for sigma in SIGMAS:
                wrong = errors(model, x0[rows], captions, [numbers[row] for row in rows], sigma).mean()
                cells.append(f"{100 * (float(wrong / base[sigma][rows].mean()) - 1):8.1f}")
            print(f"{respect:36}" + "".join(cells))


if __name__ == "__main__":
    main()
