"""The class map: the number of every label that was ever accepted. It only grows.

A model's outputs lie in the order of these ids, so a class that comes later is appended to them and moves none. A label
that is gone keeps its id, which no other label ever gets; when it comes back, it comes back as itself. Written by
validate_data as data/manifest/classes.json, where it is kept from run to run.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deploy.files import sha256_bytes, write_json
from tasks.errors import DataError

FORMAT_VERSION: Final = 1


@dataclass(frozen=True)
class ClassMap:
    """Labels and their ids.

    Args:
        labels: Every label that was ever accepted; its place is its id.
        present: Those of the last accepted set.
    """

    labels: tuple[str, ...] = ()
    present: frozenset[str] = frozenset()

    @property
    def ids(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels)}

    def with_accepted(self, labels: Iterable[str]) -> "ClassMap":
        """The map after a set with these labels: new ones are appended, sorted among themselves."""
        present = frozenset(labels)
        return ClassMap((*self.labels, *sorted(present - set(self.labels))), present)


def write_class_map(path: Path, class_map: ClassMap) -> None:
    """Writes the map atomically, sealed with its digest."""
    classes = [
        {"id": number, "label": label, "present": label in class_map.present}
        for number, label in enumerate(class_map.labels)
    ]
    write_json(path, sealed({"format_version": FORMAT_VERSION, "classes": classes}))


def read_class_map(path: Path) -> ClassMap:
    """The map, empty where there is none yet.

    Raises:
        DataError: If it is not what was written. It is never made anew behind a person's back: that could give the
            outputs of the next model another order.
    """
    remedy = (
        f"`dvc checkout --force {workspace_path(path)}` brings back the one of dvc.lock. Where that is lost too, "
        "remove the file: labels are then numbered anew, sorted, and the next model may have its outputs in another "
        "order."
    )
    content = read_sealed(path, FORMAT_VERSION, remedy)
    if content is None:
        return ClassMap()
    classes = content["classes"]
    return ClassMap(
        tuple(each["label"] for each in classes), frozenset(each["label"] for each in classes if each["present"])
    )


def workspace_path(path: Path) -> str:
    """A file of data/manifest as DVC is told of it in the workspace: DVC knows outputs from there alone."""
    return "/".join(path.parts[-3:])


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with a digest over all of it, which shows a damaged or edited file."""
    return {**content, "digest": _digest(content)}


def read_sealed(path: Path, format_version: int, remedy: str) -> dict[str, Any] | None:
    """What `sealed` and `write_json` wrote; None where there is no file.

    Raises:
        DataError: If it is not what was written, with the remedy.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is damaged: it is no JSON ({error}). {remedy}") from error
    if not isinstance(content, dict) or content.pop("digest", None) != _digest(content):
        raise DataError(f"{path} is damaged or was edited: its content no longer has its digest. {remedy}")
    if content["format_version"] != format_version:
        raise DataError(
            f"{path} has format version {content['format_version']}; this code reads {format_version}. "
            f"Use the tanuki that wrote it. {remedy}"
        )
    return content


def _digest(content: dict[str, Any]) -> str:
    return sha256_bytes(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())
