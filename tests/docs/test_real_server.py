"""What `polyrank serve` promises about itself, and what the pages say of the server that it starts."""

import shlex
import subprocess
from pathlib import Path

import httpx

from tests.contract.sources import ROOT
from tests.docs.pages import POLYRANK, Block, run
from tests.docs.test_sizing import LAYERS, block_bytes
from tests.support.real_server import RealServer


def test_says_where_it_is_and_what_to_try(real: RealServer, tmp_path: Path) -> None:
    assert f"Polyrank is ready at {real.url}\n" in real.announced
    curl = real.announced.partition("Try:\n")[2].strip()
    assert "The TENANT shall pay the LANDLORD EUR 500" in run(Block("", "bash", curl), real, tmp_path)


def test_the_built_in_model_goes_by_its_alias(real: RealServer) -> None:
    base = httpx.get(f"{real.url}/v1/models/smollm2").json()
    assert base["parent"] is None
    answer = httpx.post(
        f"{real.url}/generate?adapter=smollm2", json={"inputs": "a", "parameters": {"max_new_tokens": 1}}
    )
    assert answer.headers["X-Adapter"] == base["id"]
    push = shlex.split(f"{POLYRANK} push smollm2 deploy/examples/adapters/date-iso --url {real.url}")
    refused = subprocess.run(push, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (refused.returncode, "means the base model" in refused.stderr) == (1, True)


def test_the_model_of_the_sizes_is_the_one_that_is_served(real: RealServer) -> None:
    info = httpx.get(f"{real.url}/info").json()
    assert info["model_dtype"] == "float32"
    assert info["device_memory_bytes"] == (1536 << 20) // block_bytes() * block_bytes()
    sentiment = httpx.get(f"{real.url}/adapters/sentiment").json()  # on all linears
    assert sentiment["modules"]["matched"] == 7 * LAYERS
