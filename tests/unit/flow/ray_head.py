"""Servers at the address of a Ray cluster: a head node, another server, or one that does not answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import grpc
from ray.core.generated.gcs_service_pb2 import CheckAliveReply
from ray.core.generated.gcs_service_pb2_grpc import (
    NodeInfoGcsServiceServicer,
    add_NodeInfoGcsServiceServicer_to_server,
)


class _Head(NodeInfoGcsServiceServicer):  # type: ignore[misc]
    def __init__(self, token: str | None) -> None:
        self._token = token

    def CheckAlive(self, request: Any, context: Any) -> Any:
        given = dict(context.invocation_metadata()).get("authorization")
        if self._token is not None and given != f"Bearer {self._token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return CheckAliveReply()


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html></html>")

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def head_node(token: str | None = None) -> Iterator[str]:
    """Run a server that answers the health check of Ray's head node, by Ray's own protocol."""
    server = grpc.server(ThreadPoolExecutor(2))
    add_NodeInfoGcsServiceServicer_to_server(_Head(token), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@contextmanager
def silent() -> Iterator[str]:
    """Run a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def closed() -> Iterator[str]:
    """Yield an address on which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@contextmanager
def web_server() -> Iterator[str]:
    """Run a server that answers each request with a page, as a dashboard does."""
    with HTTPServer(("127.0.0.1", 0), _Page) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()
