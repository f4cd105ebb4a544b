"""Jobs of the server, as a person waits for them."""

import time
from typing import Any

from server.client import Client, ClientError
from server.commands.terminal import say, say_json, share_bar

POLL_SECONDS = 0.2


def tell_job(job: dict[str, Any], as_json: bool) -> None:
    """For a job that nobody waits for."""
    if as_json:
        say_json(job)
    else:
        say(f"job {job['id']}  {job['state']}")


def waited(client: Client, job: dict[str, Any], label: str) -> dict[str, Any]:
    """The job at its end. Raises ClientError with its error; interrupted, it has the server cancel it."""
    with share_bar(label) as show:
        try:
            while job["state"] in ("queued", "running"):
                show(job["progress"])
                time.sleep(POLL_SECONDS)
                job = client.job(job["id"])
        except KeyboardInterrupt:
            client.cancel_job(job["id"])
            raise
    if job["error"] is not None:
        raise ClientError(job["error"]["message"], job["error"]["code"])
    return job
