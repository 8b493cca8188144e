"""An object store behind a URL of fsspec, with the one operation that a log needs: create where there is nothing yet.

S3 says If-None-Match, Google ifGenerationMatch, Azure If-None-Match again. A store that has no such operation, or does
not keep to it, is refused before the first change: with it, two writers that know nothing of each other cannot both
win. Needs fsspec and the protocol's package (the extra ``bucket``). Used by the shared registry.
"""

import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from deploy.errors import RegistryError

try:
    from fsspec import AbstractFileSystem
    from fsspec.core import url_to_fs
except ImportError as error:
    raise RegistryError(
        "A registry behind a URL needs the package fsspec: install tanuki with the extra `bucket`."
    ) from error

AT_ONCE = 8
TRIES = 3
S3 = ("s3", "s3a")

Source = TypeVar("Source")
Result = TypeVar("Result")


class ObjectStore:
    """Objects below a URL, by names such as ``events/00000001.json``; nothing is read before it is asked for.

    Every trouble but a missing object is an OSError, whatever the file system's library raises.

    Args:
        url: Such as ``s3://bucket/prefix``. Keys and endpoints are the library's own matter (AWS_ACCESS_KEY_ID,
            AWS_ENDPOINT_URL, ~/.aws, fsspec's configuration).

    Raises:
        RegistryError: If the protocol is unknown or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            fs, root = url_to_fs(url)
        except ImportError as error:
            raise RegistryError(
                f"{url} cannot be used: {error}. Install it into this environment (the extra `bucket` has s3fs for "
                "s3://; gcsfs for gs://, adlfs for abfs://)."
            ) from error
        except ValueError as error:
            raise RegistryError(
                f"{url} cannot be used: {error}. Name a folder, or a URL such as s3://bucket."
            ) from error
        self._fs: AbstractFileSystem = fs
        self._root = str(root).rstrip("/")
        self._is_proven = False

    def read(self, name: str) -> bytes | None:
        """An object's bytes; None where there is no such object."""
        try:
            data: bytes = self._asked(lambda: self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None
        return data

    def read_all(self, names: Iterable[str]) -> list[bytes | None]:
        """The same of several objects, some at a time."""
        return self._each(self.read, list(names))

    def create(self, name: str, data: bytes) -> bool:
        """Creates an object; False where another one is there already, which stays as it is.

        An answer that was lost on the way is asked for again: the object that is there then may be this one.
        """
        for left in reversed(range(TRIES)):
            try:
                self._asked(lambda: self._fs.pipe_file(self._path(name), data, mode="create"))
            except FileExistsError:
                return self.read(name) == data
            except OSError:
                there = self.read(name)
                if there is not None:
                    return there == data
                if not left:
                    raise
            else:
                return True
        raise AssertionError

    def create_all(self, objects: Sequence[tuple[str, bytes]]) -> list[bool]:
        """The same for several objects, some at a time."""
        return self._each(lambda each: self.create(*each), objects)

    def write(self, name: str, data: bytes) -> None:
        """Writes an object, whatever was there."""
        self._asked(lambda: self._fs.pipe_file(self._path(name), data))

    def advance(self, name: str, data: bytes, *, is_newer: Callable[[bytes], bool]) -> None:
        """Writes an object unless what is there is as new; a slow writer never puts an older one over a newer one.

        Only S3 can hold a writer to that (If-Match). On others the object may be the older one for a while.

        Args:
            name: The object.
            data: What to write.
            is_newer: Whether it is newer than what is there.
        """
        for _ in range(TRIES):
            tag = self._tag(name)
            there = None if tag is None else self.read(name)
            if there is None:
                done = self.create(name, data)
            elif not is_newer(there):
                return
            else:
                done = self._replace(name, data, tag)
            if done:
                return

    def folders(self, name: str) -> list[str]:
        """The next parts of the names that begin with ``name/``, sorted."""
        self._fs.invalidate_cache()
        try:
            found: list[str] = self._asked(lambda: self._fs.ls(self._path(name), detail=False))
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def remove_folder(self, name: str) -> None:
        """Removes all objects whose names begin with ``name/``; nothing where there is none."""
        self._fs.invalidate_cache()
        try:
            self._asked(lambda: self._fs.rm(self._path(name), recursive=True))
        except FileNotFoundError:
            return

    def require_exclusive_creation(self) -> None:
        """Sees to it once that ``create`` does what it says.

        Raises:
            RegistryError: If it does not.
        """
        if self._is_proven:
            return
        probe, refused = f".probe-{uuid.uuid4().hex}", False
        looks_first = getattr(self._fs.pipe_file, "__func__", None) is AbstractFileSystem.pipe_file  # and writes then
        if not looks_first:
            self._asked(lambda: self._fs.pipe_file(self._path(probe), b"1", mode="create"))
            try:
                self._asked(lambda: self._fs.pipe_file(self._path(probe), b"2", mode="create"))
            except FileExistsError:
                refused = True
            self._asked(lambda: self._fs.rm_file(self._path(probe)))
        if not refused:
            raise RegistryError(
                f"{self.url} cannot hold a registry: that store does not refuse to create an object where there is one "
                "already, so two promotions could cross. Use S3, Google or Azure storage, or a folder on a shared disk."
            )
        self._is_proven = True

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _tag(self, name: str) -> str | None:
        """What changes when an object is replaced; None where there is none."""
        self._fs.invalidate_cache()
        try:
            facts: dict[str, Any] = self._asked(lambda: self._fs.info(self._path(name)))
        except FileNotFoundError:
            return None
        return str(facts.get("ETag"))

    def _replace(self, name: str, data: bytes, tag: str | None) -> bool:
        """Replaces the object of that tag; False where it is another one by now."""
        protocols = (self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol
        condition = {"IfMatch": tag} if set(S3) & set(protocols) else {}
        try:
            self._asked(lambda: self._fs.pipe_file(self._path(name), data, **condition))
        except OSError:
            if self._tag(name) == tag:
                raise
            return False
        return True

    def _asked(self, question: Callable[[], Result]) -> Result:
        """The answer of the file system."""
        try:
            return question()
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # each file system raises types of its own
            raise OSError(f"{self.url} does not do what it was asked: {type(error).__name__}: {error}") from error

    @staticmethod
    def _each(work: Callable[[Source], Result], items: Sequence[Source]) -> list[Result]:
        if len(items) < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(work, items))
