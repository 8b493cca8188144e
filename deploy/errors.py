"""What a user can fix. Everything else is a bug and shows a traceback.

TanukiError                 printed as one paragraph, exit code 1
├── ImageError              a file that is no picture we can read
├── BundleError             a bundle that is broken, foreign or of another format version
├── KeyFileError            a key for signatures that is missing, of another kind or in the way
├── RegistryError           a registry that is missing, damaged or asked for what it has not got
└── (tasks.errors)          ParamsError, DataError, BackboneError, StoreError, ExportError, TrainingError
"""


class TanukiError(Exception):
    """A user's mistake: says what happened and where, what was expected, and what to do."""


class ImageError(TanukiError):
    """A file that cannot be decoded as a picture."""


class BundleError(TanukiError):
    """A bundle that is incomplete, altered or of an unknown format."""


class KeyFileError(TanukiError):
    """A key file that cannot be used or written."""


class RegistryError(TanukiError):
    """A registry that is damaged or has no such version."""
