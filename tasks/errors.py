"""The error tree of the stages, grown on the one in deploy/errors.py.

TanukiError
├── ParamsError       params.yaml: all mistakes at once
├── DataError         images, labels, splits
├── BackboneError     weights, architectures, preprocessing
│   └── NetworkError  a download whose trouble may pass; exit code 75, and a flow tries again
├── StoreError        a content-addressed cache
├── TrainingError     a fit that cannot be done or went wrong
└── ExportError       an ONNX graph that is not what was trained
"""

from deploy.errors import BundleError, ImageError, TanukiError

__all__ = [
    "BackboneError",
    "BundleError",
    "DataError",
    "ExportError",
    "ImageError",
    "NetworkError",
    "ParamsError",
    "StoreError",
    "TanukiError",
    "TrainingError",
]


class ParamsError(TanukiError):
    """params.yaml holds something that no stage can use."""


class DataError(TanukiError):
    """The images or labels are not fit to train on."""


class BackboneError(TanukiError):
    """Weights or an architecture that cannot be had or do not fit."""


class NetworkError(BackboneError):
    """A download that failed for a reason that may pass by itself."""


class StoreError(TanukiError):
    """A content-addressed store that cannot be written or read."""


class TrainingError(TanukiError):
    """A fit that cannot be done on these data."""


class ExportError(TanukiError):
    """An exported graph that does not compute what was trained."""
