"""The bundle: a folder that holds all that answering needs, and can prove that it is whole.

    model.onnx      the whole graph: images uint8 (N, H, W, 3) → probabilities (N, C) and embedding (N, D)
    front.onnx      its first half, a picture at a time: images → pixels float32 (N, 3, S, S)
    back.onnx       its second half, a batch at a time: pixels → probabilities and embedding
    back.int8.onnx  what answers instead of back.onnx, where the bundle answers in int8
    bundle.json     format version, labels, signature, preprocessing, precision, lineage, digests of all files, its own
    golden/         a few encoded pictures, and what this bundle answered for them (deploy/golden.py)
    bundle.sig      where somebody signed it (deploy/signing.py)

A graph's metadata_props say what matters of bundle.json, so that a lone file tells what it is. Nothing is unpickled,
and no session opens a graph before all of the bundle was found whole and the graphs to need nothing besides. Nothing
tells the time: the same model makes the same bytes, in every clone; the git commit, params and metrics of a version are
in the registry. Written by export_onnx, copied into the registry by a promotion, read by everything that answers.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.errors import BundleError
from deploy.files import sha256_bytes, sha256_file, sync_directory, write_bytes, write_json
from deploy.golden import GOLDEN, GOLDEN_DIR, check_golden, write_golden
from deploy.onnx_file import read_onnx_facts
from deploy.runtime import open_session

FORMAT_VERSION = 2

MODEL, FRONT, BACK, INDEX = "model.onnx", "front.onnx", "back.onnx", "bundle.json"
SIGNATURE = "bundle.sig"
BACK_INT8 = "back.int8.onnx"
GRAPHS = (MODEL, FRONT, BACK)
BACKS = {"fp32": BACK, "int8": BACK_INT8}  # what answers, by precision

MAX_GRAPH_BYTES = 2**31 - 1  # what a protobuf, so an ONNX file, can hold
MAX_INDEX_BYTES = 64 * 2**20

EXPECTED_PORTS = {
    MODEL: (("images",), ("probabilities", "embedding")),
    FRONT: (("images",), ("pixels",)),
    BACK: (("pixels",), ("probabilities", "embedding")),
    BACK_INT8: (("pixels",), ("probabilities", "embedding")),
}
MAKE_AGAIN = "Make the bundle again: dvc repro export_onnx."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BundleFacts:
    """What is known of a model beside its graphs.

    Args:
        labels: Class names in the order of the probabilities.
        size_px: Side of the square picture that the network sees.
        crop_fraction: Share of the short side that the central square keeps, in (0, 1].
        mean: Of each channel (R, G, B), in 0..1.
        std: Of each channel, in 0..1.
        lineage: Where the model comes from, values that JSON can hold; no times, no paths of a machine.
    """

    labels: tuple[str, ...]
    size_px: int
    crop_fraction: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    lineage: Mapping[str, Any]


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and found whole.

    Args:
        directory: Its folder.
        format_version: In which it was written.
        labels: Class names in the order of the probabilities.
        signature: Inputs, outputs and seam of the graphs, each with name, dtype and shape (text for a free dimension).
        preprocessing: Numbers and words of what the graph does to a picture.
        precision: Of the half that answers: ``fp32`` or ``int8``.
        lineage: Where the model comes from, as far as its bytes tell.
        digests: sha256 of each file, by its name in the folder.
        digest: sha256 over all the above, so over every file: the identity of the bundle.
    """

    directory: Path
    format_version: int
    labels: tuple[str, ...]
    signature: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    precision: str
    lineage: Mapping[str, Any]
    digests: Mapping[str, str]
    digest: str

    @property
    def model_path(self) -> Path:
        return self.directory / MODEL

    @property
    def front_path(self) -> Path:
        return self.directory / FRONT

    @property
    def back_path(self) -> Path:
        """The second half, in the precision that answers."""
        return self.directory / BACKS[self.precision]

    @property
    def size_bytes(self) -> int:
        """Size of the whole graph, in bytes."""
        return self.model_path.stat().st_size


def write_bundle(
    directory: Path,
    *,
    model: bytes,
    front: bytes,
    back: bytes,
    facts: BundleFacts,
    golden: Sequence[bytes],
    int8: bytes | None = None,
) -> Bundle:
    """Writes a bundle, runs its golden pictures, and puts it in place of what the folder held.

    Args:
        directory: The bundle's folder; replaced as a whole.
        model: The whole ONNX graph.
        front: Its half before the seam.
        back: Its half after the seam.
        facts: Labels, preprocessing and lineage.
        golden: Encoded pictures (a file's bytes each) whose answers are kept for checks.
        int8: The half after the seam in int8, where it is to answer; the others stay beside it.

    Raises:
        BundleError: If the graphs do not have the signature of a bundle or do not fit the labels.
        ImageError: If a golden picture does not decode.
    """
    if not golden:
        raise BundleError("a bundle needs at least one golden picture to be checked by.")
    graphs = {MODEL: model, FRONT: front, BACK: back} | ({} if int8 is None else {BACK_INT8: int8})
    precision = "fp32" if int8 is None else "int8"
    signature = _signature(graphs, facts.labels)
    with _replaced_directory(directory) as folder:
        for name, data in graphs.items():
            write_bytes(folder / name, data)
        draft = _index(facts, signature, precision, digests={})
        write_golden(_as_bundle(folder, draft), golden)
        digests = {name: sha256_file(folder / name) for name in sorted(_content(folder))}
        write_json(folder / INDEX, _index(facts, signature, precision, digests))
    bundle = read_bundle(directory)
    logger.info("bundle %s: %d classes, %d golden images", bundle.digest[:12], len(bundle.labels), len(golden))
    return bundle


def graph_metadata(facts: BundleFacts) -> dict[str, str]:
    """What each graph of a bundle says of itself in its ``metadata_props``, so that a lone file tells what it is.

    Returns:
        JSON texts by name.
    """
    told = {
        "bundle_format_version": FORMAT_VERSION,
        "labels": list(facts.labels),
        "preprocessing": _preprocessing_words(facts),
        **facts.lineage,
    }
    return {name: json.dumps(value, sort_keys=True, ensure_ascii=False) for name, value in told.items()}


def read_bundle(directory: Path) -> Bundle:
    """Reads a bundle of any format version and checks it, without loading a graph.

    Every digest, no file missing or smuggled in, labels that fit the outputs, graphs that need nothing but themselves.

    Raises:
        BundleError: Naming all that is wrong.
    """
    index = _read_index(directory)
    try:
        mistakes = [*_file_mistakes(directory, index["digests"]), *_label_mistakes(index)]
        graphs = [name for name in index["digests"] if name.endswith(".onnx")]
        mistakes = mistakes or _graph_mistakes(
            ((name, (directory / name).read_bytes()) for name in graphs), index["labels"]
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: pathlib's, of a link that points to itself
        raise BundleError(f"{directory} cannot be read: {error}.") from error
    if mistakes:
        raise BundleError(f"{directory} is not the bundle that was written: {'; '.join(mistakes)}. {MAKE_AGAIN}")
    return _as_bundle(directory, index)


def verify_bundle(directory: Path) -> Bundle:
    """Reads a bundle and lets it answer its golden pictures.

    Raises:
        BundleError: If it is not whole, or answers otherwise than when it was written.
    """
    bundle = read_bundle(directory)
    check_golden(bundle)
    return bundle


def bundle_digests(directory: Path) -> Mapping[str, str]:
    """The files that bundle.json names, with the digest of each; of a bundle whose other files may not be there yet.

    Raises:
        BundleError: If it is missing, was edited or is of an unknown format version.
    """
    digests: Mapping[str, str] = _read_index(directory)["digests"]
    return digests


def bundle_files(bundle: Bundle) -> list[str]:
    """The files that make up a bundle, as names in its folder; what a copy must hold."""
    signature = [SIGNATURE] if (bundle.directory / SIGNATURE).is_file() else []
    return [INDEX, *bundle.digests, *signature]


def _signature(graphs: Mapping[str, bytes], labels: tuple[str, ...]) -> dict[str, Any]:
    """Inputs, outputs and seam of the graphs, checked against what a bundle promises."""
    if mistakes := _graph_mistakes(graphs.items(), labels):
        raise BundleError(f"these graphs make no bundle: {'; '.join(mistakes)}.")
    ports = {name: _ports(name, data) for name, data in graphs.items()}
    (images,), (probabilities, embedding) = ports[MODEL]
    (pixels,) = ports[FRONT][1]
    mistakes = []
    if images["dtype"] != "uint8" or images["shape"][3:] != [3] or any(isinstance(n, int) for n in images["shape"][:3]):
        mistakes.append(f"images is {images['dtype']} {images['shape']}, not uint8 of any N, H, W and 3 channels")
    if probabilities["shape"][1:] != [len(labels)]:
        mistakes.append(f"probabilities has shape {probabilities['shape']} for {len(labels)} labels")
    if ports[BACK][0][0]["dtype"] != pixels["dtype"] or ports[BACK][0][0]["shape"][1:] != pixels["shape"][1:]:
        mistakes.append(f"the halves do not fit: pixels leaves as {pixels} and enters as {ports[BACK][0][0]}")
    if ports.get(BACK_INT8, ports[BACK]) != ports[BACK]:
        mistakes.append(f"the half in int8 maps {ports[BACK_INT8]}, the other one {ports[BACK]}")
    if len(set(labels)) != len(labels):
        mistakes.append("two labels are the same")
    if mistakes:
        raise BundleError(f"these graphs make no bundle: {'; '.join(mistakes)}.")
    return {"inputs": [images], "seam": pixels, "outputs": [probabilities, embedding]}


def _ports(name: str, graph: bytes) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs and outputs of a graph, in the order a bundle promises."""
    session = open_session(graph)
    found = {port.name: port for port in (*session.get_inputs(), *session.get_outputs())}
    inputs, outputs = EXPECTED_PORTS[name]
    if {port.name for port in session.get_inputs()} != set(inputs) or not set(outputs) <= set(found):
        raise BundleError(f"{name} maps {_listed(found)}, where a bundle maps {_listed(inputs)} to {_listed(outputs)}.")
    described = {key: {"name": key, "dtype": _dtype(port.type), "shape": port.shape} for key, port in found.items()}
    return [described[each] for each in inputs], [described[each] for each in outputs]


def _dtype(onnx_type: str) -> str:
    """NumPy's name of an onnxruntime type such as ``tensor(float)``."""
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _index(
    facts: BundleFacts, signature: Mapping[str, Any], precision: str, digests: Mapping[str, str]
) -> dict[str, Any]:
    """The content of bundle.json."""
    index = {
        "format_version": FORMAT_VERSION,
        "labels": list(facts.labels),
        "signature": dict(signature),
        "preprocessing": {
            "size_px": facts.size_px,
            "crop_fraction": facts.crop_fraction,
            "mean": list(facts.mean),
            "std": list(facts.std),
            "words": _preprocessing_words(facts),
        },
        "precision": precision,
        "lineage": dict(facts.lineage),
        "digests": dict(digests),
    }
    return {**index, "digest": _own_digest(index)}


def _preprocessing_words(facts: BundleFacts) -> str:
    return (
        "The picture, decoded to RGB and turned upright by its EXIF orientation, enters as uint8. The graph "
        f"keeps the central square of {100 * facts.crop_fraction:.4g} % of the short side, resizes it to "
        f"{facts.size_px} px (linear, antialiased), divides by 255, subtracts mean and divides by std."
    )


def _own_digest(index: Mapping[str, Any]) -> str:
    """sha256 of bundle.json without the line that holds it."""
    content = {key: value for key, value in index.items() if key != "digest"}
    return sha256_bytes(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())


def _as_bundle(directory: Path, index: Mapping[str, Any]) -> Bundle:
    return Bundle(
        directory=directory,
        format_version=index["format_version"],
        labels=tuple(index["labels"]),
        signature=index["signature"],
        preprocessing=index["preprocessing"],
        precision=index["precision"],
        lineage=index["lineage"],
        digests=index["digests"],
        digest=index["digest"],
    )


def _read_index(directory: Path) -> dict[str, Any]:
    """The content of bundle.json, whatever its format version, as one of today's.

    Raises:
        BundleError: If it is missing, edited, of an unknown format version or without what every bundle says.
    """
    path = directory / INDEX
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise BundleError(f"{path} is larger than {MAX_INDEX_BYTES} bytes: no tanuki wrote it. {MAKE_AGAIN}")
        index = json.loads(path.read_bytes())
        digest = _own_digest(index) if isinstance(index, dict) else None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(f"{directory} is no bundle: it has no {INDEX}. {MAKE_AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is no JSON: {error}. {MAKE_AGAIN}") from error
    if digest is None:
        raise BundleError(f"{path} is no JSON object. {MAKE_AGAIN}")
    version = index.get("format_version")
    if not isinstance(version, int) or version not in READERS:
        raise BundleError(
            f"{directory} is a bundle of format version {version!r}; this tanuki reads {_listed(READERS)}. "
            "Use the tanuki that wrote it, or train again."
        )
    if index.get("digest") != digest:
        raise BundleError(f"{path} was edited: its content no longer has its digest. {MAKE_AGAIN}")
    index = READERS[version](index)
    if mistakes := _index_mistakes(index):
        raise BundleError(f"{path} does not say what a bundle says: {'; '.join(mistakes)}. {MAKE_AGAIN}")
    return index


def _from_version_1(index: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had one precision and did not name it; its graphs' metadata_props said less."""
    return {**index, "precision": "fp32"}


def _from_version_2(index: dict[str, Any]) -> dict[str, Any]:
    return index


# bundle.json of every format version there ever was, as one of today's; each has its test in tests/deploy.
READERS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_version_1, 2: _from_version_2}


def _index_mistakes(index: Mapping[str, Any]) -> list[str]:
    """What bundle.json lacks or garbles."""
    kinds = {
        "labels": list,
        "signature": dict,
        "preprocessing": dict,
        "precision": str,
        "lineage": dict,
        "digests": dict,
    }
    if mistakes := [
        f"{key} is no {kind.__name__}" for key, kind in kinds.items() if not isinstance(index.get(key), kind)
    ]:
        return mistakes
    if not all(isinstance(label, str) for label in index["labels"]):
        mistakes.append("a label is no text")
    if not all(name.isprintable() and isinstance(digest, str) for name, digest in index["digests"].items()):
        mistakes.append("digests are not names and digests")
    if index["precision"] not in BACKS:
        mistakes.append(f"precision is {index['precision']!r}, not {_listed(BACKS)}")
    needed = (*GRAPHS, GOLDEN, BACKS.get(index["precision"], BACK))
    mistakes += [f"digests do not name {name}" for name in dict.fromkeys(needed) if name not in index["digests"]]
    try:
        probabilities, embedding = index["signature"]["outputs"]
        if not all(isinstance(port["shape"][1], int) for port in (probabilities, embedding)):
            mistakes.append("the outputs have no width")
    except (KeyError, TypeError, ValueError, IndexError):
        mistakes.append("the signature has not two outputs")
    return mistakes


def _file_mistakes(directory: Path, digests: Mapping[str, str]) -> list[str]:
    """Files that are missing, gigantic, changed, or there without being named."""
    mistakes = []
    for name, digest in sorted(digests.items()):
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            mistakes.append(f"{name} points outside the bundle")
        elif not path.is_file():
            mistakes.append(f"{name} is missing")
        elif (size := path.stat().st_size) > MAX_GRAPH_BYTES:
            mistakes.append(f"{name} is gigantic: {size} bytes, where an ONNX file ends at {MAX_GRAPH_BYTES}")
        elif sha256_file(path) != digest:
            mistakes.append(f"{name} was changed")
    return mistakes + [f"{name} does not belong to it" for name in sorted(_content(directory) - set(digests))]


def _content(directory: Path) -> set[str]:
    """The files in the folder that a bundle is answerable for: its graphs and golden pictures."""
    files = (*directory.glob("*.onnx"), *directory.glob("*.data"), *(directory / GOLDEN_DIR).rglob("*"))
    return {path.relative_to(directory).as_posix() for path in files if path.is_file()}


def _label_mistakes(index: Mapping[str, Any]) -> list[str]:
    """Labels that cannot be those of the graph."""
    labels, (probabilities, _) = index["labels"], index["signature"]["outputs"]
    if probabilities["shape"][1] != len(labels):
        return [f"{len(labels)} labels for {probabilities['shape'][1]} probabilities"]
    return [] if len(set(labels)) == len(labels) else ["two labels are the same"]


def _graph_mistakes(graphs: Iterable[tuple[str, bytes]], labels: Sequence[str]) -> list[str]:
    """Graphs that need more than themselves, or tell of another model."""
    mistakes = []
    for name, data in graphs:
        try:
            facts = read_onnx_facts(data)
            told = json.loads(facts.metadata.get("labels", "null"))
        except (BundleError, ValueError, RecursionError) as error:
            mistakes.append(f"{name}: {error}")
            continue
        if facts.external:
            mistakes.append(f"{name} keeps {len(facts.external)} tensors in other files, {_listed(facts.external[:3])}")
        if facts.foreign:
            mistakes.append(f"{name} uses operators outside the ONNX standard, {_listed(facts.foreign[:3])}")
        if told is not None and told != list(labels):
            mistakes.append(f"{name} tells of other labels in its metadata")
    return mistakes


@contextmanager
def _replaced_directory(directory: Path) -> Iterator[Path]:
    """Gives a temporary sibling to fill, and puts it in the folder's place at the end.

    What a killed run left beside the folder is swept first. Between the two renames there is an instant without a
    folder; a reader that must never see that reads the registry, not this.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    for leftover in directory.parent.glob(f".{directory.name}.*.tmp"):
        shutil.rmtree(leftover)
    folder = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.", suffix=".tmp"))
    folder.chmod(0o755)
    old = folder.with_name(f"{folder.name.removesuffix('.tmp')}.old.tmp")
    try:
        yield folder
        if directory.exists():
            directory.rename(old)
        folder.rename(directory)
        sync_directory(directory.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in values)
