"""Where this workspace's registry lies: in data/registry, or wherever TANUKI_REGISTRY says.

The registry is about the world, one production that many clones may serve, and not about the model: so this is no
number of params.yaml, which git carries to every clone, but a setting of the environment (``tanuki --registry`` sets it
for one command, and so for the Prefect flow that it runs).
"""

import os

from deploy.registry import Registry, open_registry
from tasks.layout import Layout

VARIABLE = "TANUKI_REGISTRY"


def registry_place(layout: Layout) -> str:
    """A folder's path or a URL."""
    return os.environ.get(VARIABLE) or str(layout.registry_dir)


def registry_of(layout: Layout) -> Registry:
    """The registry of a workspace.

    Raises:
        RegistryError: If TANUKI_REGISTRY names a URL whose package is not installed.
    """
    return open_registry(registry_place(layout))
