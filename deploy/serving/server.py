"""The process that answers: connections, signals, start and end."""

import asyncio
import logging
import resource
import socket
import ssl
import time
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from deploy.serving.connection import Connection
from deploy.serving.endpoint import Endpoint
from deploy.serving.errors import ServingError
from deploy.serving.listening import listen
from deploy.serving.memory import share_arenas
from deploy.serving.openapi import openapi_routes
from deploy.serving.page_routes import page_routes
from deploy.serving.predict_routes import predict_routes
from deploy.serving.protocol_routes import INFER_PATH, protocol_routes
from deploy.serving.service import Service
from deploy.serving.settings import LOOPBACK, Settings

if TYPE_CHECKING:
    from deploy.serving.grpc_server import GrpcServer
    from deploy.serving.worker import Worker

SPARE_FILES = 256  # for everything but connections
LOOK_S = 0.1  # how soon a second SIGTERM is heeded
KEEP_ALIVE_S = 75  # longer than the usual proxy keeps its side, so that it is the proxy who closes

logger = logging.getLogger(__name__)


class Application:
    """The ASGI application of a service."""

    def __init__(self, service: Service) -> None:
        self.routes = [
            *protocol_routes(service),
            *predict_routes(service),
            *page_routes(service),
            *openapi_routes(service),
        ]
        self._router = Router(self.routes, redirect_slashes=False, default=Endpoint(service, "unknown"))
        # Of all requests of a busy server: the router's regular expressions need not be tried for these.
        model = service.models.name
        self._busy = {
            route.path.format(model=model): (route.app, {"model": model} if "{model}" in route.path else {})
            for route in self.routes
            if isinstance(route, Route) and route.path in ("/predict", INFER_PATH) and "/" not in model
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        endpoint, scope["path_params"] = self._busy.get(scope["path"], (self._router, {}))
        await endpoint(scope, receive, send)


class Server(uvicorn.Server):
    """Uvicorn, which on SIGTERM first stops being ready, still answers for a while, and only then closes its door."""

    def __init__(self, config: uvicorn.Config, service: Service, *, beside: "GrpcServer | None") -> None:
        super().__init__(config)
        self._service = service
        self._beside = beside
        self._leaves_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """SIGTERM or Ctrl-C; the second one does not wait."""
        if self._leaves_at is not None:
            self.should_exit = self.force_exit = True
            return
        settings = self._service.settings
        logger.info(
            "stopping: %g s for clients to leave, %g s for what is under way", settings.notice_s, settings.grace_s
        )
        self._service.draining = True
        self._leaves_at = time.monotonic() + settings.notice_s

    async def on_tick(self, counter: int) -> bool:
        is_over = await super().on_tick(counter)
        return is_over or (self._leaves_at is not None and time.monotonic() >= self._leaves_at)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ends = [super().shutdown(sockets)]
        if self._beside is not None:
            ends.append(self._stop_beside(self._beside))
        await asyncio.gather(*ends)

    async def _stop_beside(self, beside: "GrpcServer") -> None:
        """Ends gRPC within the grace, or at once when that is asked for meanwhile."""
        ending = asyncio.ensure_future(beside.stop())
        while not (self.force_exit or ending.done()):
            await asyncio.wait([ending], timeout=LOOK_S)
        if not ending.done():
            ending.cancel()
            await beside.abort()


def serve(settings: Settings, *, worker: "Worker | None" = None) -> None:
    """Serves until it is told to stop.

    Args:
        settings: How.
        worker: Which of several processes this is; None where it is alone.

    Raises:
        TanukiError: If it cannot start.
    """
    share_arenas()
    _allow_connections(settings.max_connections)
    # Alone, a port in use is told at once; a worker must not be given connections before it can answer.
    listener = None if worker else listen(settings)
    service = Service(settings, worker=worker)
    service.load()
    config = uvicorn.Config(
        Application(service),
        loop="uvloop",
        http=partial(Connection, leave_s=settings.body_timeout_s),  # type: ignore[arg-type]  # it only calls it
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.grace_s),
        ssl_certfile=settings.tls_cert and str(settings.tls_cert),
        ssl_keyfile=settings.tls_key and str(settings.tls_key),
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ServingError(
            f"{settings.tls_cert} and {settings.tls_key} are no certificate and its key: {error}"
        ) from error
    if worker is None or worker.number == 0:
        _warn_if_open(settings)
    if listener is None:
        assert worker is not None
        listener = listen(settings, port=worker.port, is_shared=True)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_run(config, service, listener))


async def _run(config: uvicorn.Config, service: Service, listener: socket.socket) -> None:
    await service.start()
    try:
        beside = await _start_grpc(service)
        await service.join_peers()
        host, port = listener.getsockname()[:2]
        facts = {"host": host, "port": port, "grpc_port": beside.port if beside else None}
        champion = service.models.champion
        who = f"version {champion.version}" if champion else "no version"
        logger.info("%s answers as %s on %s:%d", who, service.models.name, host, port, extra=facts)
        await Server(config, service, beside=beside).serve([listener])
    finally:
        await service.stop()
    logger.info("stopped")


async def _start_grpc(service: Service) -> "GrpcServer | None":
    """The gRPC server where it is asked for; it is imported only then."""
    if service.settings.grpc_port is None:
        return None
    from deploy.serving.grpc_server import GrpcServer

    server = GrpcServer(service)
    await server.start()
    return server


def _allow_connections(number: int) -> None:
    """Raises the process's soft limit of open files, which is lower than that on many systems, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _warn_if_open(settings: Settings) -> None:
    if settings.host in LOOPBACK:
        return
    lacks = [
        name
        for name, value in {"--token-file": settings.token_file, "--tls-cert": settings.tls_cert}.items()
        if not value
    ]
    if lacks:
        logger.warning("others can reach %s, and there is no %s", settings.host, " and no ".join(lacks))
