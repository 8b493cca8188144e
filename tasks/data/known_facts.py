"""Facts of images that were seen before, by the sha256 of their content: 90 bytes an image, whatever their number.

Read by index_images from earlier manifests, and from what a run that was killed had found.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.data.manifest import DAMAGE, Columns, Facts, one_line, read_groups

logger = logging.getLogger(__name__)

NUMBERS: Final = {
    "size_bytes": "i8",
    "width": "i4",
    "height": "i4",
    "num_frames": "i4",
    "exif_orientation": "i4",
    "brightness": "f4",
    "contrast": "f4",
    "sharpness": "f4",
}
TEXTS: Final = ("mode", "format")
RECORD: Final = np.dtype(
    [
        ("key", "u8"),  # the sha256's first 8 bytes
        ("sha256", "V32"),
        ("phash", "V8"),
        ("alone", "?"),  # whether its group is its sha256
        *((name, "u2") for name in TEXTS),  # places in `KnownFacts._texts`
        *NUMBERS.items(),
    ]
)


class KnownFacts:
    """Facts of decoded images by content. Safe to read from several threads.

    Args:
        paths: Manifests; a missing one has none, and so has one that is damaged (which is told) or of another version.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._texts: list[str] = []
        records = np.concatenate([np.empty(0, RECORD), *(self._read(path) for path in paths)])
        self._records = records[np.argsort(records["key"], kind="stable")]
        self._keys = np.ascontiguousarray(self._records["key"])

    def __len__(self) -> int:
        return len(self._records)

    def get(self, sha256: str, *, max_pixels: float = np.inf) -> Facts | None:
        """The facts of an image, or None where it was not seen before, did not decode or is larger."""
        place = self.places(np.frombuffer(bytes.fromhex(sha256), "V32"), max_pixels=max_pixels)
        if place[0] < 0:
            return None
        return Facts(**{name: values[0] for name, values in self.columns(place).items()})

    def places(self, sha256: NDArray[np.void], *, max_pixels: float = np.inf) -> NDArray[np.intp]:
        """Where the facts of images are, for `columns`; -1 where there are none.

        Args:
            sha256: Of the images' bytes, as 32 bytes each.
            max_pixels: Larger pictures count as not seen.
        """
        if not len(self):
            return np.full(len(sha256), -1)
        keys = np.frombuffer(sha256.tobytes(), ">u8")[::4]
        places = np.minimum(np.searchsorted(self._keys, keys), len(self) - 1)
        found = self._records[places]
        fits = found["width"].astype(np.int64) * found["height"] <= max_pixels
        return np.where((found["sha256"] == sha256) & fits, places, -1)

    def columns(self, places: NDArray[np.intp]) -> Columns:
        """The fields of Facts of images that have been seen, a list each."""
        records = self._records[places]
        sha256, phash = (_hexadecimal(records[name]) for name in ("sha256", "phash"))
        return {
            "sha256": sha256,
            "phash": phash,
            "group": [
                one if alone else other for one, other, alone in zip(sha256, phash, records["alone"], strict=True)
            ],
            "error": [None] * len(records),
            **{name: [self._texts[number] for number in records[name]] for name in TEXTS},
            **{name: records[name].tolist() for name in NUMBERS},
        }

    def _read(self, path: Path) -> NDArray[np.void]:
        columns = ["sha256", "phash", "group", "error", *TEXTS, *NUMBERS]
        try:
            groups = [self._packed(table) for table in read_groups(path, columns)]
        except FileNotFoundError:
            groups = []
        except DAMAGE as error:
            logger.warning("%s is damaged (%s): all images are decoded again", path, one_line(error))
            groups = []
        return np.concatenate([np.empty(0, RECORD), *groups])

    def _packed(self, table: pa.Table) -> NDArray[np.void]:
        """The records of the rows that decode."""
        table = table.filter(table.column("error").is_null())
        records = np.empty(table.num_rows, RECORD)
        sha256, phash, group = (table.column(name).to_pylist() for name in ("sha256", "phash", "group"))
        records["sha256"] = np.frombuffer(bytes.fromhex("".join(sha256)), "V32")
        records["key"] = np.frombuffer(bytes.fromhex("".join(sha256)), ">u8")[::4]
        records["phash"] = np.frombuffer(bytes.fromhex("".join(phash)), "V8")
        records["alone"] = [one == other for one, other in zip(sha256, group, strict=True)]
        for name in TEXTS:
            values = table.column(name).to_pylist()
            self._texts += sorted(set(values) - set(self._texts))
            records[name] = [self._texts.index(value) for value in values]
        for name in NUMBERS:
            records[name] = table.column(name).to_numpy()
        return records


def _hexadecimal(values: NDArray[np.void]) -> list[str]:
    """Bytes as hexadecimal digits, a text each."""
    digits, length = values.tobytes().hex(), 2 * values.itemsize
    return [digits[start : start + length] for start in range(0, len(digits), length)]
