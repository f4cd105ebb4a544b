"""A peer for the tests of the harness: makes tokens of nothing, and misbehaves when the prompt says so."""

import os
import sys

from tests.bench.peers.protocol import Peer, Request, Run, serve


def run(requests: list[Request]) -> Run:
    prompt = requests[0].prompt
    if prompt == "fail":
        raise ValueError("no such adapter")
    if prompt == "die":
        sys.stderr.write("out of memory\n")
        os._exit(3)
    print("a library says something")
    return Run(0.5, sum(request.new_tokens for request in requests) - (prompt == "short"))


def start() -> Peer:
    print("loading")
    return run, {"version": "1"}


if __name__ == "__main__":
    serve(start)
