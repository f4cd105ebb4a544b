"""Draws deploy/grafana/preview.png from a server under the tests' traffic: `python -m tests.deploy.preview 90`."""

import sys
import tempfile
import threading
from pathlib import Path

from deploy.grafana import preview
from tests.deploy.traffic import Traffic, compress, watched


def main(seconds: float) -> None:
    """Traffic for so many seconds, then the picture."""
    with tempfile.TemporaryDirectory() as folder, watched(Path(folder)) as (server, prometheus):
        compress(server.url, ["adapter-1", "adapter-2"])
        with Traffic(server.url):
            threading.Event().wait(seconds)
            preview.draw(prometheus.url, seconds, preview.FOLDER / "preview.png")


if __name__ == "__main__":
    main(float(sys.argv[1]))
