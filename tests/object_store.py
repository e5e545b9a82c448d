"""An S3-protocol server of the tests' own that counts requests, and fails as it is told."""

import logging
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Fault = int | str | None
"""A status to answer with; `cut` breaks the answer off, `slow` makes it late; None is no fault."""

SLOW_S = 0.3


class ObjectStore:
    """moto's server behind a wrapper; `stores` is its bucket.

    Attributes:
        requests: (method, path) of every request, in order.
        faults: how many of them failed.
        fault: says of a method and a path how it fails.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.requests: list[tuple[str, str]] = []
        self.faults = 0
        self.fault: Callable[[str, str], Fault] = lambda method, path: None
        self._lock = threading.Lock()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()
        self.address = f"127.0.0.1:{self._server.server_port}"
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        endpoint = f"http://{self.address}"
        urllib.request.urlopen(f"{endpoint}/moto-api/reset", data=b"").close()
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="stores")
        self.requests.clear()

    def uri(self, path: str, bucket: str = "stores") -> str:
        """Of a prefix; it holds its credentials, since Ray's workers have another environment."""
        options = f"endpoint_override={self.address}&scheme=http&region=us-east-1"
        return f"s3://testing:testing@{bucket}/{path}?{options}"

    def count(self, method: str, part: str = "") -> int:
        """Requests of a method whose path holds some text."""
        return sum(one == method and part in path for one, path in self.requests)

    def stop(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            self.requests.append((method, path))
            fault = self.fault(method, path)
            if fault == "cut" and method != "GET":
                fault = None
            self.faults += fault not in (None, "slow")
        if isinstance(fault, int):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{fault} Fault", [("Content-Type", "application/xml")])
            return [b""]
        if fault == "slow":
            time.sleep(SLOW_S)
        body: Iterable[bytes] = self._moto(environ, start)
        if fault == "cut":
            whole = b"".join(body)
            return [whole[: len(whole) // 2]]
        return body


def every(n: int, fault: Fault) -> Callable[[str, str], Fault]:
    """The n-th request fails, and each n-th after it."""
    counted = iter(range(1, 1 << 60))
    return lambda method, path: fault if next(counted) % n == 0 else None
