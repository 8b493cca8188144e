"""What a client is told of a request that cannot be answered: no traceback, and no 5xx for a client's mistake."""

from deploy.errors import TanukiError

BAD_REQUEST, UNAUTHORIZED, NOT_FOUND, TOO_SLOW, TOO_LARGE = 400, 401, 404, 408, 413
TOO_MANY, UNAVAILABLE, DEADLINE = 429, 503, 504
MAX_ECHO = 100  # characters of a client's words that a message repeats


class ServingError(TanukiError):
    """A server that cannot start as it was asked to."""


class RequestError(Exception):
    """A request that gets no answer.

    Args:
        status: HTTP's code; gRPC's is derived from it.
        message: What the client reads.
        retry_after_s: When trying again makes sense, in whole seconds.
    """

    def __init__(self, status: int, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s


def echo(text: str) -> str:
    """A client's word, cut to what a message can hold."""
    return text if len(text) <= MAX_ECHO else text[:MAX_ECHO] + "..."
