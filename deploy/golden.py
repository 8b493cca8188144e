"""Golden pictures: a few encoded pictures in a bundle, and what it answered for them when it was written.

They tell a processor or an onnxruntime that computes something else from one that only rounds otherwise. The answers
are those of the halves, which serve. Where these serve in int8, what the whole graph answers lies in a file of its own.
Written with a bundle, run by its verification.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deploy.errors import BundleError, ImageError
from deploy.files import write_bytes, write_json
from deploy.images import decode_image
from deploy.predictor import Predictor
from deploy.runtime import open_session

if TYPE_CHECKING:
    from deploy.bundle import Bundle

GOLDEN_DIR = "golden"
GOLDEN = f"{GOLDEN_DIR}/golden.json"
GOLDEN_WHOLE = f"{GOLDEN_DIR}/golden.whole.json"

# By how much a golden answer may differ: by rounding between processors (AVX2, AVX-512, ARM), not by more. In int8 a
# rounding is a 255th. An embedding's difference is a share of its largest absolute value.
LIMITS = {"fp32": 1e-3, "int8": 2e-2}
COMPARED = ("probabilities", "embedding")

Answer = Mapping[str, Any]  # file, probabilities, embedding


@dataclass(frozen=True)
class GoldenCheck:
    """How far a bundle's answers are from the golden ones; all within rounding.

    Args:
        num_pictures: Golden pictures that were answered.
        max_probability_difference: The largest, over pictures and classes, of the halves and of the whole graph.
        max_embedding_difference: The largest, as a share of the largest value in its embedding.
    """

    num_pictures: int
    max_probability_difference: float
    max_embedding_difference: float


def write_golden(bundle: "Bundle", pictures: Sequence[bytes]) -> None:
    """Writes golden pictures, and the bundle's answers for them, into its folder.

    Raises:
        BundleError: If it answers with NaN or infinity, or not at all.
        ImageError: If a picture is none.
    """
    named = [(f"image-{number:02d}.{_extension(data)}", data) for number, data in enumerate(pictures)]
    for name, data in named:
        write_bytes(bundle.directory / GOLDEN_DIR / name, data)
    write_json(bundle.directory / GOLDEN, _answers_of_halves(bundle, named))
    if bundle.precision != "fp32":
        write_json(bundle.directory / GOLDEN_WHOLE, _answers_of_whole(bundle, named))


def golden_pictures(bundle: "Bundle") -> list[bytes]:
    """The golden pictures, encoded; what to warm a bundle up with."""
    names = [name for name in bundle.digests if name.startswith(f"{GOLDEN_DIR}/") and not name.endswith(".json")]
    return [(bundle.directory / name).read_bytes() for name in names]


def check_golden(bundle: "Bundle") -> GoldenCheck:
    """Lets a bundle answer its golden pictures, through its halves and through the whole graph.

    Raises:
        BundleError: If an answer differs by more than rounding; all of them are named.
    """
    halves = _read_answers(bundle, GOLDEN)
    whole = _read_answers(bundle, GOLDEN_WHOLE) if GOLDEN_WHOLE in bundle.digests else halves
    names = [each["file"] for each in halves]
    if [each["file"] for each in whole] != names:
        raise BundleError(f"{bundle.directory}: {GOLDEN} and {GOLDEN_WHOLE} are about different pictures.")
    pictures = [(name, (bundle.directory / GOLDEN_DIR / name).read_bytes()) for name in names]
    apart = {
        (graph, old["file"], key): (_difference(old, new, key), LIMITS[precision])
        for graph, precision, expected, answers in (
            ("halves", bundle.precision, halves, _answers_of_halves(bundle, pictures)),
            ("whole", "fp32", whole, _answers_of_whole(bundle, pictures)),
        )
        for old, new in zip(expected, answers, strict=True)
        for key in COMPARED
    }
    if wrong := [
        f"{file} is off by {difference:.3g} in its {key} ({graph})"
        for (graph, file, key), (difference, limit) in apart.items()
        if difference > limit
    ]:
        raise BundleError(
            f"{bundle.directory} does not answer as it did when it was written: {'; '.join(wrong)}. The processor or "
            "the version of onnxruntime computes something else; do not serve it here. "
            "Make the bundle again: dvc repro export_onnx."
        )
    largest = {key: max(apart[each][0] for each in apart if each[2] == key) for key in COMPARED}
    return GoldenCheck(len(pictures), largest["probabilities"], largest["embedding"])


def _read_answers(bundle: "Bundle", name: str) -> list[Answer]:
    """The golden answers, each of a picture that the bundle has."""
    path = bundle.directory / name
    try:
        answers = json.loads(path.read_bytes())
        known = {f"{GOLDEN_DIR}/{each['file']}" for each in answers} <= set(bundle.digests)
        vectors = all(np.asarray(each[key], np.float64).ndim == 1 for each in answers for key in COMPARED)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BundleError(f"{path} holds no golden answers ({error!r}). Make the bundle again.") from error
    if not (answers and known and vectors):
        raise BundleError(f"{path} holds no golden answers for the pictures beside it. Make the bundle again.")
    return list(answers)


def _answers_of_halves(bundle: "Bundle", pictures: Sequence[tuple[str, bytes]]) -> list[Answer]:
    """What the bundle answers as it is served."""
    images = [decode_image(data) for _, data in pictures]
    with Predictor(bundle) as predictor:
        try:
            found = predictor.predict(images)
        except Exception as error:  # onnxruntime's own types, and memory
            raise _failed(bundle, error) from error
    return _as_answers(bundle, pictures, found.probabilities, found.embeddings)


def _answers_of_whole(bundle: "Bundle", pictures: Sequence[tuple[str, bytes]]) -> list[Answer]:
    """What the whole graph answers, which others may serve."""
    session = open_session(bundle.model_path)
    images = [decode_image(data)[None] for _, data in pictures]
    try:
        rows = [session.run(["probabilities", "embedding"], {"images": image}) for image in images]
        probabilities, embeddings = (np.concatenate(each) for each in zip(*rows, strict=True))
    except Exception as error:  # onnxruntime's own types, and memory
        raise _failed(bundle, error) from error
    return _as_answers(bundle, pictures, probabilities, embeddings)


def _failed(bundle: "Bundle", error: Exception) -> BundleError:
    return BundleError(f"{bundle.directory}: the graph fails on the golden pictures: {error}")


def _as_answers(
    bundle: "Bundle",
    pictures: Sequence[tuple[str, bytes]],
    probabilities: NDArray[np.float32],
    embeddings: NDArray[np.float32],
) -> list[Answer]:
    if not (np.isfinite(probabilities).all() and np.isfinite(embeddings).all()):
        raise BundleError(f"{bundle.directory}: the graph answers a golden picture with NaN or infinity.")
    return [
        {"file": name, "probabilities": row.tolist(), "embedding": vector.tolist()}
        for (name, _), row, vector in zip(pictures, probabilities, embeddings, strict=True)
    ]


def _difference(old: Answer, new: Answer, key: str) -> float:
    """The largest difference of two answers; of embeddings as a share of the largest value; infinite between shapes."""
    expected, actual = np.asarray(old[key], np.float64), np.asarray(new[key], np.float64)
    if expected.shape != actual.shape:
        return float("inf")
    scale = max(float(np.abs(expected).max()), 1e-6) if key == "embedding" else 1.0
    return float(np.nan_to_num(np.abs(expected - actual), nan=np.inf).max()) / scale


def _extension(data: bytes) -> str:
    """The picture's format as a file extension."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return (picture.format or "image").lower()
    except (OSError, ValueError) as error:
        raise ImageError(f"a golden picture ({len(data)} bytes) is no picture: {error}") from error
