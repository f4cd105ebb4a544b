"""An S3 server on a free port, in this process."""

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import httpx
from moto.server import ThreadedMotoServer

from adapters_store.objects import Objects
from adapters_store.places import open_objects


class S3:
    """address: `http://127.0.0.1:<port>`; one bucket, and a fresh prefix in it for each store: all servers
    of this process have the same buckets."""

    def __init__(self, address: str) -> None:
        self.address = address
        httpx.put(f"{address}/bucket").raise_for_status()

    def url(self) -> str:
        return f"s3://bucket/{uuid.uuid4().hex}"

    def open(self) -> Objects:
        return open_objects(self.url())

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """While it asks for credentials that nobody has."""
        self._check_credentials_after("0")
        try:
            yield
        finally:
            self._check_credentials_after("inf")

    def _check_credentials_after(self, requests: str) -> None:
        httpx.post(f"{self.address}/moto-api/reset-auth", content=requests.encode()).raise_for_status()


@contextmanager
def serving() -> Iterator[S3]:
    """The server, and its address and some credentials in the environment."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        known = {
            "AWS_ENDPOINT_URL": address,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }
        with mock.patch.dict(os.environ, known):
            yield S3(address)
    finally:
        server.stop()
