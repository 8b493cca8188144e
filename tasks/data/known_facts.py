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

from tasks.data.manifest import DAMAGE, Facts, one_line, read_groups

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

    def get(self, sha256: str) -> Facts | None:
        """The facts of an image, or None where it was not seen before, or did not decode."""
        if not len(self):
            return None
        digest = bytes.fromhex(sha256)
        place = int(np.searchsorted(self._keys, np.uint64(int.from_bytes(digest[:8]))))
        if place == len(self):
            return None
        _, found, phash, alone, mode, file_format, *numbers = self._records[place].item()
        if found != digest:
            return None
        return Facts(
            sha256=sha256,
            phash=phash.hex(),
            group=sha256 if alone else phash.hex(),
            mode=self._texts[mode],
            format=self._texts[file_format],
            **dict(zip(NUMBERS, numbers, strict=True)),
        )

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
