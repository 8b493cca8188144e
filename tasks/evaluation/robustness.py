"""How answers hold up on spoiled pictures: a fixed set of corruptions, the same pixels for every model.

A corruption's random numbers come from the picture's content and the corruption's name, so that neither other pictures
nor their order change them. Large pictures are scaled down first, since noise and blur mean nothing without a scale.
After Hendrycks and Dietterich 2019 (arXiv:1903.12261), who have fifteen corruptions in five strengths; these are six
in one. Called by tasks.evaluate, and by the gate's flow for the champion.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from deploy.files import sha256_bytes
from deploy.images import decode_image
from deploy.predictor import Predictor
from tasks.evaluation.metrics import Accuracy, accuracy_of, rounded
from tasks.evaluation.paired import resampled_means

CLEAN: Final = "none"  # scaled as the others are, and not spoiled
SIDE_PX = 256  # the short side of a larger picture is scaled down to about this
NOISE_STD = 20.0  # of 255
BLUR_SHARE = 0.012  # standard deviation over the short side
JPEG_QUALITY = 15
DARK, BRIGHT = 0.5, 1.6
ROTATION_DEG = 12.0
CHUNK = 16  # pictures in memory at a time, in each of their corruptions

UInt8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Robustness:
    """Accuracy on corrupted pictures.

    Args:
        num_images: Pictures; each was shown in every corruption.
        clean: Accuracy on the same pictures, not corrupted.
        mean: Over the corruptions; as a picture's answers to them go together, its interval is of a bootstrap over the
            pictures.
        corruptions: Accuracy under each.
    """

    num_images: int
    clean: Accuracy
    mean: Accuracy
    corruptions: Mapping[str, Accuracy]


def robustness_subset(hashes: Iterable[str], *, size: int, seed: int) -> NDArray[np.int64]:
    """Rows of a subset that hardly changes where pictures come and go, rising.

    Args:
        hashes: sha256 of each picture.
        size: How many at most.
        seed: Another one, another subset.
    """
    keys = [sha256_bytes(f"{seed} {sha256}".encode()) for sha256 in hashes]
    return np.sort(np.argsort(np.array(keys), kind="stable")[:size])


def robust_answers(predictor: Predictor, pictures: Iterable[bytes]) -> dict[str, NDArray[np.int64]]:
    """Column of the most probable class for N encoded pictures under each corruption and without: (N,) each."""
    found: dict[str, list[int]] = {name: [] for name in (CLEAN, *CORRUPTIONS)}
    for chunk in _chunks(pictures):
        images = [(sha256_bytes(data), _at_most(Image.fromarray(decode_image(data)))) for data in chunk]
        for name, columns in found.items():
            spoiled = [corrupted(image, name, key=key) for key, image in images]
            columns += predictor.predict(spoiled).probabilities.argmax(axis=1).tolist()
    return {name: np.array(columns, dtype=np.int64) for name, columns in found.items()}


def corrupted(image: Image.Image, corruption: str, *, key: str) -> UInt8:
    """One corruption of an RGB picture, (H, W, 3) uint8.

    Args:
        image: RGB.
        corruption: `CLEAN` or a name of `CORRUPTIONS`.
        key: What its random numbers follow: the sha256 of the picture's bytes.
    """
    if corruption == CLEAN:
        return np.asarray(image)
    seed = int(sha256_bytes(f"{key} {corruption}".encode())[:16], 16)
    return np.asarray(CORRUPTIONS[corruption](image, np.random.default_rng(seed)))


def robustness_of(right: Mapping[str, NDArray[np.bool_]], *, confidence: float, draws: int, seed: int) -> Robustness:
    """Accuracies and their two-sided intervals.

    Args:
        right: What was answered right under each corruption and without, (N,) each.
        confidence: In (0, 1).
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """
    each = {name: accuracy_of(answers, confidence) for name, answers in right.items()}
    clean = each.pop(CLEAN)
    withstood = np.stack([right[name] for name in each]).sum(axis=0).astype(np.int8)  # (N,) corruptions it is right in
    means = resampled_means(withstood, draws, np.random.default_rng(seed)) / len(each)
    low, high = np.quantile(means, ((1 - confidence) / 2, (1 + confidence) / 2))
    mean = Accuracy(*(rounded(float(share)) for share in (withstood.mean() / len(each), low, high)))
    return Robustness(len(withstood), clean, mean, each)


def _at_most(image: Image.Image) -> Image.Image:
    factor = min(image.size) // SIDE_PX
    return image.reduce(factor) if factor > 1 else image


def _noise(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image) + generator.normal(0, NOISE_STD, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _blur(image: Image.Image, _: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(BLUR_SHARE * min(image.size)))


def _jpeg(image: Image.Image, _: np.random.Generator) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=JPEG_QUALITY)
    return Image.fromarray(decode_image(data.getvalue()))


def _dark(image: Image.Image, _: np.random.Generator) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(DARK)


def _bright(image: Image.Image, _: np.random.Generator) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(BRIGHT)


def _rotation(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Turned either way; the corners take the mean colour of the border, which black ones would outshout."""
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).mean(axis=0)
    red, green, blue = (round(float(channel)) for channel in border)
    angle = ROTATION_DEG if generator.random() < 0.5 else -ROTATION_DEG
    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=(red, green, blue))


CORRUPTIONS: Final[Mapping[str, Callable[[Image.Image, np.random.Generator], Image.Image]]] = {
    "noise": _noise,
    "blur": _blur,
    "jpeg": _jpeg,
    "dark": _dark,
    "bright": _bright,
    "rotation": _rotation,
}


def _chunks(pictures: Iterable[bytes]) -> Iterator[list[bytes]]:
    rest = iter(pictures)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk
