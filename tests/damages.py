"""What happens to pictures on their way, for judges to see through: (uint8 [h, w, 3], random numbers) -> the same."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy import ndimage


def _blur(image, _):
    return np.rint(ndimage.gaussian_filter(image.astype(np.float32), (1.0, 1.0, 0.0))).astype(np.uint8)


def _jpeg(image, _):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return np.asarray(Image.open(buffer))


def _noise(image, rng):
    noisy = image + rng.normal(0.0, 255 * 10**-1.5, image.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


DAMAGES = {"clean": lambda image, _: image, "blur": _blur, "jpeg": _jpeg, "noise": _noise}
