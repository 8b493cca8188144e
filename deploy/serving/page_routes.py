"""What a person sees: one page without anything from elsewhere, and what it asks the server about the model."""

import base64
import hashlib
import re
from functools import partial
from pathlib import Path

from starlette.routing import BaseRoute, Route

from deploy.serving.endpoint import Call, Endpoint, Reply, json_reply
from deploy.serving.service import Service

PAGE = Path(__file__).with_name("page.html")


def page_routes(service: Service) -> list[BaseRoute]:
    """The page, open to all because it holds nothing, and /model."""
    return [
        Route("/", Endpoint(service, "page", get=partial(page, _page_reply(PAGE.read_bytes())), is_open=True)),
        Route("/model", Endpoint(service, "model", get=model)),
    ]


async def page(reply: Reply, call: Call) -> Reply:  # noqa: ARG001
    """The page itself."""
    return reply


async def model(call: Call) -> Reply:
    """The champion's labels, model card and lineage, why a newer one was refused, and what a second version says."""
    models = call.service.models
    champion = models.require_champion()
    return json_reply(
        {
            "name": models.name,
            "version": str(champion.version),
            "versions": [str(each.version) for each in models.loaded],
            "digest": champion.bundle.digest,
            "labels": champion.labels,
            "card": champion.card,
            "lineage": champion.lineage,
            "problem": models.problem,
            "comparisons": await call.service.comparisons(),
        }
    )


def _page_reply(html: bytes) -> Reply:
    """The page with a policy that lets nothing run but its own script, which is named by its digest."""
    scripts = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"
        for script in re.findall(rb"<script>(.*?)</script>", html, re.S)
    ]
    policy = (
        f"default-src 'none'; script-src {' '.join(scripts)}; style-src 'unsafe-inline'; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        b"content-security-policy": policy.encode(),
        b"x-content-type-options": b"nosniff",
        b"referrer-policy": b"no-referrer",
        b"cache-control": b"no-cache",
    }
    return Reply(html, 200, b"text/html; charset=utf-8", list(headers.items()))
