"""What an accepted set was like, in a few numbers, so that the next one can be compared with it.

data/manifest/accepted_summary.json holds two: of the set that was accepted now and of the one before it. A set is known
by the digest of its contents and labels, so a stage that runs again on the same set compares it with the one before it
again, and never with itself.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from deploy.files import sha256_bytes, write_json
from tasks.data.class_map import read_sealed, sealed, workspace_path

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION: Final = 1

# Fixed cells, so that counts of two sets can be laid side by side. What lies outside counts with the outermost cell.
CELLS: Final[dict[str, NDArray[np.float64]]] = {
    "brightness": np.arange(16.0, 256.0, 16.0),  # grey levels
    "contrast": np.arange(8.0, 128.0, 8.0),  # grey levels
    "sharpness": np.exp2(np.arange(0.0, 16.0)),  # an octave a cell
    "size": np.exp2(np.arange(4.0, 13.0, 0.5)),  # square root of the pixels; half an octave a cell
}
SKETCH_SIZE: Final = 32
SKETCH_DIGITS: Final = 16
MIN_SHARED_FRACTION: Final = 0.5


@dataclass(frozen=True)
class SetSummary:
    """An accepted set in a few numbers.

    Args:
        digest: Of its contents and labels.
        images_per_class: Images of each label.
        sketches: The smallest content hashes of each label, at most 32: enough to estimate what two labels share.
        histograms: Images in each cell of brightness, contrast, sharpness and size.
    """

    digest: str
    images_per_class: dict[str, int]
    sketches: dict[str, list[str]]
    histograms: dict[str, list[int]]


def summarise(accepted: "pd.DataFrame") -> SetSummary:
    """The summary of the accepted rows of a manifest; paths, order and splits do not matter."""
    contents = sorted(zip(accepted["sha256"].astype(str), accepted["label"].astype(str), strict=True))
    columns = {name: accepted[name].to_numpy(np.float64) for name in ("brightness", "contrast", "sharpness")}
    columns["size"] = np.sqrt(accepted["width"].to_numpy(np.float64) * accepted["height"].to_numpy(np.float64))
    sketches: dict[str, list[str]] = {}
    for sha256, label in contents:
        sketch = sketches.setdefault(label, [])
        if len(sketch) < SKETCH_SIZE:
            sketch.append(sha256[:SKETCH_DIGITS])
    return SetSummary(
        digest=sha256_bytes("\n".join(f"{sha256} {label}" for sha256, label in contents).encode()),
        images_per_class=dict(sorted(Counter(label for _, label in contents).items())),
        sketches=sketches,
        histograms={
            name: np.bincount(np.searchsorted(edges, columns[name], side="right"), minlength=len(edges) + 1).tolist()
            for name, edges in CELLS.items()
        },
    )


def read_history(path: Path) -> tuple[SetSummary, ...]:
    """The summaries of the last accepted set and of the one it was compared with; fewer where there are none.

    Raises:
        DataError: If the file is not what was written.
    """
    remedy = (
        f"`dvc checkout --force {workspace_path(path)}` brings back the one of dvc.lock. Or remove the file: the "
        "next run then compares with nothing."
    )
    content = read_sealed(path, FORMAT_VERSION, remedy)
    return () if content is None else tuple(SetSummary(**each) for each in content["sets"])


def write_history(path: Path, *, now: SetSummary, before: SetSummary | None) -> None:
    """Writes the summary of the accepted set and of the one that it was compared with."""
    sets = [asdict(each) for each in (now, before) if each is not None]
    write_json(path, sealed({"format_version": FORMAT_VERSION, "sets": sets}))


def reference(history: Sequence[SetSummary], now: SetSummary) -> SetSummary | None:
    """The last accepted set that is another than this one; None where there is none."""
    return next((each for each in history if each.digest != now.digest), None)


def likely_renamed(before: SetSummary, now: SetSummary) -> dict[str, str]:
    """New label to the vanished one whose images it holds, by content; each at most once.

    References:
        Broder 1997, "On the resemblance and containment of documents" (the share of two sets from their smallest
        hashes).
    """
    vanished = before.images_per_class.keys() - now.images_per_class.keys()
    new = now.images_per_class.keys() - before.images_per_class.keys()
    shared = {
        (later, earlier): _shared_fraction(now.sketches[later], before.sketches[earlier])
        for later in new
        for earlier in vanished
    }
    renamed: dict[str, str] = {}
    for (later, earlier), fraction in sorted(shared.items(), key=lambda item: (-item[1], item[0])):
        if fraction >= MIN_SHARED_FRACTION and later not in renamed and earlier not in renamed.values():
            renamed[later] = earlier
    return dict(sorted(renamed.items()))


def _shared_fraction(one: list[str], other: list[str]) -> float:
    """Estimate of the images that two classes share, of all that either has, in 0..1."""
    smallest = sorted({*one, *other})[:SKETCH_SIZE]
    return len({*one} & {*other} & {*smallest}) / len(smallest)


def population_shift(before: SetSummary, now: SetSummary) -> dict[str, float]:
    """How far the class mix and the image statistics moved, as population stability indices less what chance gives.

    The mix is that of the classes that both sets have: new and vanished ones are told by name.
    """
    both = sorted(before.images_per_class.keys() & now.images_per_class.keys())
    mixes = ([each.images_per_class[label] for label in both] for each in (before, now))
    return {
        "class_mix": stability_index(*mixes),
        **{name: stability_index(before.histograms[name], now.histograms[name]) for name in CELLS},
    }


def stability_index(before: list[int], now: list[int]) -> float:
    """The population stability index of two histograms, less its mean between two draws of one population; not below 0.

    References:
        Yurdakul 2018, "Statistical properties of population stability index": between draws of n and m it is
        (1/n + 1/m) times a chi-square of one degree of freedom less than there are cells.
    """
    counts = np.array([before, now], dtype=np.float64)
    counts = counts[:, counts.sum(axis=0) > 0]
    num_cells = counts.shape[1]
    if num_cells < 2 or not counts.sum(axis=1).all():
        return 0.0
    chance = (num_cells - 1) * float((1 / counts.sum(axis=1)).sum())
    shares = (counts + 0.5) / (counts + 0.5).sum(axis=1, keepdims=True)
    index = float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())
    return float(max(0.0, index - chance))
