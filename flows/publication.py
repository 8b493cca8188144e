"""Publishing: bytes before pointers, pointers before names, so that nobody is told of what cannot be got.

1. `dvc push`, and a look whether the default remote has every byte that data/raw.dvc and dvc.lock name
2. `git commit` of these two, of params.yaml, of the log of data/raw and of the version's signature, data/bundle.sig
3. `git tag` in GTO's convention: tanuki@vN.0.0 for version N of the registry, tanuki#prod#K for the K-th champion
4. `git push` of the branch and these tags, all or none

Each step finds what an earlier run has done, so a kill anywhere is mended by doing it again. Behind `--publish` and
`tanuki publish`; the inbox shares the steps.

Where the workspace is not the champion's any more, because images came in or a later model was refused, the commit is
made aside, on top of the one that the champion was made at, out of the files that its lineage keeps: the tags name it,
and the branch goes on without it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bundle import SIGNATURE, read_bundle
from deploy.errors import BundleError
from deploy.files import write_bytes
from deploy.registry import Registry, Version
from flows.clones import worktree
from flows.registries import registry_of, registry_place
from flows.sources import named_lines
from flows.workspace import (
    MAX_TOLD,
    Upstream,
    WorkspaceError,
    default_remote,
    dvc,
    git,
    missing_in_remote,
    out_of_date,
    upstream,
)
from tasks.layout import Layout

ARTIFACT, STAGE = "tanuki", "prod"  # the artifact of dvc.yaml, and GTO's name of where the champion is
CODE = ("dvc.yaml", ".dvc/config", "tasks", "deploy")  # what a model was made with and is not ours to commit


class MovedOnError(WorkspaceError):
    """The workspace has other data, code or params by now than the champion was made with."""


@dataclass(frozen=True)
class Published:
    """What was published.

    Args:
        version: The champion.
        remote: The DVC remote that has its bytes; None where none is set, or nothing was to be pushed.
        commit: The new commit; None where nothing had changed.
        tags: The new tags.
        pushed_to: The upstream branch that has it; None where there is none.
        is_known: Whether a commit holds the version; not where it was never published and the workspace has moved on.
    """

    version: int
    remote: str | None = None
    commit: str | None = None
    tags: tuple[str, ...] = ()
    pushed_to: str | None = None
    is_known: bool = True

    def text(self) -> str:
        """The same for a person."""
        if not self.is_known:
            return (
                f"Version {self.version} is champion, but was never published, data/bundle holds another model by now, "
                "and the version does not tell what it was made of: nothing to publish before the next promotion."
            )
        done = [
            *([f"its bytes are on the remote {self.remote}"] if self.remote else []),
            *([f"commit {self.commit}"] if self.commit else []),
            *([f"tagged {' and '.join(self.tags)}"] if self.tags else []),
            *([f"pushed to {self.pushed_to}"] if self.pushed_to else ["not pushed: this branch has no upstream"]),
        ]
        return f"Published version {self.version}: {', '.join(done)}."


def publish_champion(layout: Layout) -> Published:
    """Publishes the champion, as far as an earlier run has not. Call it with the workspace's lock held.

    Raises:
        RegistryError: If there is no champion.
        WorkspaceError: If something refuses, or what made the model is not committed; says what to do.
    """
    registry = registry_of(layout)
    champion = registry.require_champion()
    check_publishable(layout)
    remote = commit = None
    at = "HEAD"
    if (branch := upstream(layout)) is not None:
        git(layout, "fetch", "--quiet", "--tags", branch.remote)  # what other machines have published
    if not _is_registered(layout, champion):
        origin = registry.registered_lineage(champion.id)
        if _is_current(layout, champion):
            remote, commit = _commit(layout, registry, champion)
        elif _is_told(origin):
            with worktree(layout, origin["git_commit"]) as place:
                for name, text in origin["pointers"].items():
                    write_bytes(place.root / name, text.encode())
                remote, commit = _commit(place, registry, champion)
                at = git(place, "rev-parse", "HEAD")
        elif not _is_in_workspace(layout, champion):
            return Published(champion.id, is_known=False)
        else:
            _check_committable(layout)  # says why it is not
    tags = _tag(layout, champion, at)
    pushed = push_git(layout, *(f"refs/tags/{ARTIFACT}{mark}*" for mark in "@#"), kept="Commit and tags are made here")
    return Published(champion.id, remote, commit, tags, None if pushed is None else pushed.name)


def _commit(layout: Layout, registry: Registry, champion: Version) -> tuple[str | None, str | None]:
    """Pushes and commits what the champion was made of, which a checkout names; the remote, and the commit if new."""
    remote = push_data(layout, what="the model", kept="Nothing was committed")
    _copy_signature(layout, registry, champion)
    files = [layout.dvc_lock, layout.raw_pointer, layout.raw_changes, layout.params, layout.published_signature]
    names = [str(file.relative_to(layout.root)) for file in files if file.is_file() or _is_tracked(layout, file)]
    return remote, commit_only(layout, names, f"Version {champion.id} of the model")


def _copy_signature(layout: Layout, registry: Registry, champion: Version) -> None:
    """Puts the signature of a version where git takes it from; takes away one of another version."""
    signature = registry.bundle(champion.id).directory / SIGNATURE
    if signature.is_file():
        write_bytes(layout.published_signature, signature.read_bytes())
    else:
        layout.published_signature.unlink(missing_ok=True)


def _is_tracked(layout: Layout, file: Path) -> bool:
    return bool(git(layout, "ls-files", "--", str(file.relative_to(layout.root))))


def check_publishable(layout: Layout) -> None:
    """Refuses to publish a pointer to bytes that only this machine has.

    Raises:
        WorkspaceError: If git has an upstream and DVC has no default remote.
    """
    if upstream(layout) is not None and default_remote(layout) is None:
        raise WorkspaceError(
            "Publishing would push data/raw.dvc to git, but DVC has no default remote, so nobody else could get the "
            "images. Run `dvc remote add -d NAME URL` first. Nothing was done."
        )


def push_data(layout: Layout, *targets: str, what: str, kept: str) -> str | None:
    """Pushes to DVC's default remote and looks whether all of it is there.

    Args:
        layout: The workspace.
        targets: What of the workspace; all of it where there are none.
        what: What is pushed, in words.
        kept: What is not lost where that fails, in words.

    Returns:
        The remote's name, None where none is set.

    Raises:
        WorkspaceError: If the remote refuses or lacks something.
    """
    remote = default_remote(layout)
    if remote is None:
        return None
    try:
        dvc(layout, "--wait-for-lock", "push", "--quiet", *targets)
        missing = missing_in_remote(layout, *targets)
    except WorkspaceError as error:
        raise WorkspaceError(
            f"The DVC remote {remote} did not take {what}: {error} {kept}; mend the remote (`tanuki doctor` looks at "
            "it) and run the command again."
        ) from error
    if missing:
        raise WorkspaceError(
            f"The DVC remote {remote} lacks {len(missing):,} files although they were pushed:\n"
            + "\n".join(named_lines((path, "not in the remote") for path in missing))
            + "\nDVC takes the listing of a version (the .dir file named in data/raw.dvc or dvc.lock) in the remote as "
            f"proof that all of it lies there: remove that file from the remote and run the command again. {kept}."
        )
    return remote


def commit_only(layout: Layout, files: Sequence[str], message: str) -> str | None:
    """Commits these files and nothing else that may be staged; the commit, None where nothing had changed."""
    if not git(layout, "status", "--porcelain", "--", *files):
        return None
    git(layout, "add", "--", *files)
    git(layout, "commit", "--quiet", "--only", "--message", message, "--", *files)
    return git(layout, "rev-parse", "--short", "HEAD")


def push_git(layout: Layout, *refs: str, kept: str) -> Upstream | None:
    """Pushes the branch and other refs to its upstream, all or none; also what a killed run had left unpushed.

    Args:
        layout: The workspace.
        refs: Patterns of refs that are called there as here.
        kept: What is not lost where that fails, in words.

    Raises:
        WorkspaceError: If git refuses.
    """
    branch = upstream(layout)
    if branch is not None:
        also = [f"{ref}:{ref}" for ref in refs]
        try:
            git(layout, "push", "--quiet", "--atomic", branch.remote, f"HEAD:{branch.ref}", *also)
        except WorkspaceError as error:
            raise WorkspaceError(
                f"{error} {kept}: `git pull --rebase` if others have pushed, then run the command again."
            ) from error
    return branch


def _is_current(layout: Layout, champion: Version) -> bool:
    """Whether the workspace, as it stands, is what the champion was made of."""
    if not _is_in_workspace(layout, champion):
        return False
    try:
        _check_committable(layout)
    except WorkspaceError:
        return False
    return True


def _is_told(origin: Mapping[str, Any]) -> bool:
    """Whether a version's lineage has all that a commit of it takes: what came with earlier releases does not."""
    changed = origin.get("git_uncommitted", ())
    code = any(name.startswith(CODE) for name in changed) or len(changed) >= MAX_TOLD
    return bool(origin.get("git_commit") and origin.get("pointers")) and not code


def _is_in_workspace(layout: Layout, champion: Version) -> bool:
    """Whether data/bundle, and with it dvc.lock, is about the champion."""
    try:
        return read_bundle(layout.bundle_dir).digest == champion.digest
    except BundleError:
        return False


def _check_committable(layout: Layout) -> None:
    """Refuses to commit a dvc.lock that is not about what else git has."""
    changed = git(layout, "status", "--porcelain", "--", *CODE).splitlines()
    if changed:
        raise WorkspaceError(
            "The model was made with what git does not have yet:\n"
            + "\n".join(named_lines((line.strip(), "not committed") for line in changed))
            + "\nCommit it (or `git stash` it and retrain), then publish. Nothing was pushed."
        )
    if stale := out_of_date(layout):
        raise MovedOnError(
            f"dvc.lock is behind what it is about: {', '.join(stale)} would run. Run `tanuki retrain`, then publish."
        )


def _is_registered(layout: Layout, version: Version) -> bool:
    """Whether a tag names the version already.

    Raises:
        WorkspaceError: If it names another model.
    """
    tag = _version_tag(version)
    said = git(layout, "tag", "--list", tag, "--format=%(contents)")
    if said and version.digest not in said:
        raise WorkspaceError(
            f"The tag {tag} is there already, for another model than version {version.id} of {registry_place(layout)}: "
            "another machine, with a registry of its own, publishes to this git repository. Let one machine publish."
        )
    return bool(said)


def _version_tag(version: Version) -> str:
    return f"{ARTIFACT}@v{version.id}.0.0"


def _tag(layout: Layout, champion: Version, at: str) -> tuple[str, ...]:
    """Tags a commit as the champion's where none is yet, and that it is the one in production; which tags are new."""
    made = []
    tag = _version_tag(champion)
    if not _is_registered(layout, champion):
        words = f"Registering artifact {ARTIFACT} version v{champion.id}.0.0\n\nbundle {champion.digest}"
        git(layout, "tag", "--annotate", "--message", words, tag, at)
        made.append(tag)
    assigned = _assignments(layout)
    latest = max(assigned, default=0)
    commit = git(layout, "rev-parse", f"refs/tags/{tag}^{{commit}}")
    if assigned.get(latest) != commit:
        words = f"Assigning stage {STAGE} to artifact {ARTIFACT} version v{champion.id}.0.0"
        made.append(f"{ARTIFACT}#{STAGE}#{latest + 1}")
        git(layout, "tag", "--annotate", "--message", words, made[-1], commit)
    return tuple(made)


def _assignments(layout: Layout) -> dict[int, str]:
    """The commit of each change of champion, by its number."""
    listed = git(layout, "tag", "--list", f"{ARTIFACT}#*", "--format=%(refname:strip=2) %(*objectname)")
    found = (re.fullmatch(rf"{ARTIFACT}#{STAGE}#(\d+) (\w+)", line) for line in listed.splitlines())
    return {int(match[1]): match[2] for match in found if match}
