"""What a request is called, in logs, captures and answers, over HTTP and gRPC: as its client says, or as we do."""

import itertools
import re
import uuid

REQUEST_ID = re.compile(rb"[\w.:/+=-]{1,128}", re.ASCII)

# Random bytes for each request would be a system call each, which lets another thread have the interpreter meanwhile.
_made = map(f"{uuid.uuid4().hex[:16]}{{:08x}}".format, itertools.count(1))


def request_id(*asked: bytes) -> str:
    """The first of a client's names that can stand in a header and in a line of a log, or one made here."""
    for name in asked:
        if REQUEST_ID.fullmatch(name):
            return name.decode()
    return next(_made)
