"""Pretrained weights from every source, as tensors under torchvision's names. Nothing is ever unpickled.

    embedded:NAME                tasks/models/embedded/NAME.safetensors and NAME.json, made by `tanuki pretrain`
    torchvision:ARCH/WEIGHTS     a torchvision weight enum; its hash is checked; torch hub's cache is used
    file:PATH                    .safetensors (a card PATH with .json beside it is read), or .pth with weights_only
    https://...                  the same files from an address; backbone.sha256 is required and checked
    timm:NAME                    a timm model (optional extra)

Called by fetch_backbone.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from deploy.files import sha256_bytes
from tasks.errors import BackboneError, NetworkError

EMBEDDED_DIR = Path(__file__).parent / "embedded"
MAX_WEIGHTS_BYTES = 8 * 2**30
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30
WRAPPERS = ("state_dict", "model_state_dict", "model", "model_ema", "module")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
IMAGENET_LABELS = "imagenet1k"
# Their torchvision builders undo ImageNet's normalisation inside the model (transform_input); outside it is one half.
NORMALISED_INSIDE = ("googlenet", "inception_v3")
# Old checkpoints have dots where module names can no longer have them (torchvision/models/densenet.py).
DENSENET_NAME = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$"
)


@dataclass(frozen=True)
class PretrainedWeights:
    """Weights and what is known of how they were made.

    Args:
        state: Tensors under the architecture's own names, classifier included where there is one.
        architecture: A torchvision name or ``timm:NAME``, perhaps with ``@MODULE`` to end with; None where the source
            does not say.
        licence: None where the source does not say.
        size_px: Side of the square picture.
        crop_fraction: Share of the short side that is kept.
        mean: Per channel, of values in 0..1.
        std: Per channel, of values in 0..1.
        labels: Classes of the classifier.
        notes: What a reader should know.
    """

    state: dict[str, Tensor]
    architecture: str | None = None
    licence: str | None = None
    size_px: int = 224
    crop_fraction: float = 0.875
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def read_weights(source: str, *, root: Path, sha256: str | None) -> PretrainedWeights:
    """Reads the weights that ``backbone.source`` names.

    Args:
        source: As in params.yaml.
        root: What a relative ``file:`` path is relative to.
        sha256: What the weights' file must hash to, or None; required for an address.

    Raises:
        BackboneError: If they cannot be had, are corrupt, would have to be unpickled, or are not the ones asked for.
    """
    kind, _, name = source.partition(":")
    if kind == "embedded":
        return _from_file(_embedded_path(name), sha256)
    if kind == "torchvision":
        return _from_torchvision(name, sha256)
    if kind == "timm":
        return _from_timm(name, sha256)
    if kind == "file":
        return _from_file(root / name, sha256)
    if kind == "https":
        return _from_address(source, sha256)
    raise BackboneError(
        f"backbone.source: {source!r} names no kind of source. Expected embedded:NAME, torchvision:ARCH/WEIGHTS, "
        "file:PATH, https://... or timm:NAME (params.yaml)."
    )


def read_labels(source: str, *, root: Path) -> tuple[str, ...]:
    """The labels of a classifier, in its order.

    Args:
        source: ``imagenet1k``, the thousand names as torchvision has them, or a text file with one label a line.
        root: What a relative path is relative to.

    Raises:
        BackboneError: If the file cannot be read, or names a label twice.
    """
    if source == IMAGENET_LABELS:
        import torchvision

        return tuple(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    try:
        labels = tuple(
            line.strip() for line in (root / source).read_text(encoding="utf-8").splitlines() if line.strip()
        )
    except (OSError, UnicodeDecodeError) as error:
        raise BackboneError(
            f"backbone.labels: {root / source} cannot be read: {error}. Expected {IMAGENET_LABELS}, or a text file "
            "with one label a line."
        ) from error
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise BackboneError(f"backbone.labels: {root / source} names {', '.join(twice[:8])} more than once.")
    return labels


def _embedded_path(name: str) -> Path:
    path = EMBEDDED_DIR / f"{name}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(each.stem for each in EMBEDDED_DIR.glob("*.safetensors"))) or "none"
        raise BackboneError(f"backbone.source: there is no embedded backbone {name!r}. There is: {there}.")
    return path


def _from_file(path: Path, sha256: str | None) -> PretrainedWeights:
    """A .safetensors, .pth or .pt file, with the card beside it where there is one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BackboneError(f"backbone.source: {path} cannot be read: {error.strerror}. Mend the path.") from error
    digest = sha256_bytes(data)
    _check_sha256(path.name, digest, sha256)
    weights = PretrainedWeights(_parse(data, str(path)))
    card = path.with_suffix(".json")
    return _with_card(weights, card, digest) if card.is_file() else weights


def _with_card(weights: PretrainedWeights, path: Path, digest: str) -> PretrainedWeights:
    """The facts of a card over the defaults; it must be the card of these very weights, where it says of which."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        facts: dict[str, Any] = {
            key: card[key]
            for key in ("architecture", "licence", "size_px", "crop_fraction")
            if card.get(key) is not None
        }
        for key in ("mean", "std", "labels", "notes"):
            if card.get(key) is not None:
                facts[key] = tuple(card[key])
        if card.get("sha256", digest) != digest:
            raise BackboneError(
                f"{path} is the card of weights with sha256 {card['sha256']}; those beside it have {digest}. "
                "One of the two was replaced or damaged: restore both (git checkout), or make them again."
            )
        # A card from `tanuki pretrain` without a crop means that the whole picture was seen.
        return replace(weights, **{"crop_fraction": 1.0, **facts})
    except (ValueError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"{path}, the card beside the weights, cannot be read: {error}. Mend or remove it."
        ) from error


def _parse(data: bytes, where: str) -> dict[str, Tensor]:
    """Tensors of a file's bytes; its content, not its name, says of which kind it is."""
    if not data:
        raise BackboneError(f"{where} is empty. Fetch the weights again.")
    is_pickle_based = data[:2] == b"PK" or data[:1] == b"\x80"
    state = _parse_torch(data, where) if is_pickle_based else _parse_safetensors(data, where)
    return _tidy(state, where)


def _parse_safetensors(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BackboneError(
            f"{where} is neither a whole safetensors file nor a .pth archive ({error}). Fetch the weights again."
        ) from error


def _parse_torch(data: bytes, where: str) -> dict[str, Tensor]:
    """A .pth archive through torch's restricted reader: tensors and plain containers only."""
    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a dozen unrelated types for a corrupt or a hostile file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise BackboneError(
            f"{where} holds more than weights, or is damaged: {reason} It was not unpickled (that runs code). "
            "Save its state_dict as safetensors, or fetch it again."
        ) from error
    for name in WRAPPERS:
        if isinstance(value, Mapping) and isinstance(value.get(name), Mapping):
            value = value[name]
    if not isinstance(value, Mapping):
        raise BackboneError(f"{where} holds a {type(value).__name__}, expected a state_dict: names and tensors.")
    return {str(name): tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}


def _tidy(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Names without ``module.``, floats as float32, all finite."""
    tidy = {}
    for name, tensor in state.items():
        clean = DENSENET_NAME.sub(r"\1\2", name.removeprefix("module.").removeprefix("_orig_mod."))
        tidy[clean] = (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous().clone()
    broken = [name for name, tensor in tidy.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise BackboneError(f"{where} holds numbers that are not finite in {', '.join(broken[:8])}. Fetch it again.")
    if not tidy:
        raise BackboneError(f"{where} holds no tensor. Expected a state_dict: names and tensors.")
    return tidy


def _check_sha256(what: str, found: str, expected: str | None) -> None:
    if expected is not None and found != expected.lower():
        raise BackboneError(
            f"{what} has sha256 {found}; backbone.sha256 is {expected.lower()}. "
            "These are other weights than the ones asked for: mend the file, or the digest in params.yaml."
        )


def _from_torchvision(name: str, sha256: str | None) -> PretrainedWeights:
    """A torchvision weight enum, from torch hub's cache or the network."""
    architecture, _, enum_name = name.partition("/")
    enum = _weight_enum(architecture, enum_name)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urllib.parse.urlparse(enum.url).path).name
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            state = enum.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        kind = NetworkError if isinstance(error, urllib.error.URLError) else BackboneError
        raise kind(
            f"torchvision:{name} cannot be had: {error}. Without a network, put {path.name} into {path.parent} "
            f"yourself, or name a local copy as file:PATH with backbone.architecture: {architecture}. "
            "If that file is there already, it is damaged: remove it."
        ) from error
    if sha256 is not None:
        _check_sha256(path.name, sha256_bytes(path.read_bytes()), sha256)
    transforms = enum.transforms()
    inside = architecture in NORMALISED_INSIDE
    size, resize = transforms.crop_size[0], transforms.resize_size[0]
    return PretrainedWeights(
        _tidy(state, f"torchvision:{name}"),
        architecture=architecture,
        licence=f"torchvision weights; see the recipe {enum.meta.get('recipe', '')}".strip(),
        size_px=size,
        crop_fraction=min(1.0, size / resize),
        mean=HALF if inside else tuple(transforms.mean),
        std=HALF if inside else tuple(transforms.std),
        labels=tuple(enum.meta["categories"]) if "categories" in enum.meta else None,
    )


def _weight_enum(architecture: str, enum_name: str) -> Any:
    """The member of torchvision's weight enum, by name; ``DEFAULT`` is one."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if architecture not in names:
        raise BackboneError(
            f"backbone.source: torchvision has no classification architecture {architecture!r}. "
            f"It has: {', '.join(names)}."
        )
    enum = torchvision.models.get_model_weights(architecture)
    if enum_name not in enum.__members__:
        raise BackboneError(
            f"backbone.source: {architecture} has no weights {enum_name!r}. "
            f"It has: {', '.join(enum.__members__)}; write torchvision:{architecture}/NAME."
        )
    return enum[enum_name]


def _from_timm(name: str, sha256: str | None) -> PretrainedWeights:
    """A timm model's weights, with timm's own preprocessing."""
    try:
        import timm
    except ImportError as error:
        raise BackboneError(f"timm:{name} needs timm. Install the extra: pip install 'tanuki[timm]'.") from error
    if sha256 is not None:
        raise BackboneError(
            "backbone.sha256 cannot be checked for timm: sources (timm chooses the file). Set it to null."
        )
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # hub, network and registry each raise their own
        raise BackboneError(
            f"timm:{name} cannot be had: {error}. "
            "It needs a network on first use, and a model that timm has weights for."
        ) from error
    config = model.pretrained_cfg
    return PretrainedWeights(
        _tidy(model.state_dict(), f"timm:{name}"),
        architecture=f"timm:{name}",
        licence=config.get("license"),
        size_px=config["input_size"][-1],
        crop_fraction=float(config.get("crop_pct") or 1.0),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        labels=None,
    )


def _from_address(address: str, sha256: str | None) -> PretrainedWeights:
    """A download, kept in torch hub's cache under its digest."""
    if sha256 is None:
        raise BackboneError(f"backbone.sha256 is missing: {address} is only trusted with the digest of its weights.")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise BackboneError(f"backbone.sha256: {sha256!r} is no sha256 (64 hexadecimal digits).")
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"tanuki-{sha256.lower()}"
    if not path.is_file():
        _download(address, path, sha256)
    return _from_file(path, sha256)


def _download(address: str, path: Path, sha256: str) -> None:
    """Streams an address to a temporary file beside ``path`` and renames it once its digest is right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            found = _stream(address, file)
        _check_sha256(address, found, sha256)
        temporary.replace(path)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise NetworkError(
            f"{address} cannot be had: {reason}. Without a network, fetch the file elsewhere and name it as file:PATH."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _stream(address: str, file: io.BufferedWriter) -> str:
    """Copies an https address into a file; its sha256."""
    digest, size = hashlib.sha256(), 0
    with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
        if urllib.parse.urlparse(answer.geturl()).scheme != "https":
            raise BackboneError(f"{address} leads to {answer.geturl()}, which is not https.")
        while piece := answer.read(CHUNK_BYTES):
            size += len(piece)
            if size > MAX_WEIGHTS_BYTES:
                raise BackboneError(f"{address} is larger than {MAX_WEIGHTS_BYTES / 2**30:.0f} GiB. Is it weights?")
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()
