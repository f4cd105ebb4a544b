"""lm-eval's own models: over HTTP an adapter's score equals the one that lm-eval finds with Hugging Face and PEFT.

The task is the one of the examples, read as lm-eval reads it; its `evaluate` itself needs datasets and pyarrow.
"""

import json
from pathlib import Path

import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

from tests.clients.live import LiveServer
from tests.contract.sources import ROOT

TASK = ROOT / "deploy" / "examples" / "clients" / "reviews.yaml"
TOLERANCE = 1e-3  # of a log likelihood, in nats


class Reviews:
    """The multiple choice task: requests in the order of questions and choices, and the accuracy of their answers."""

    def __init__(self) -> None:
        task = yaml.safe_load(TASK.read_text())
        lines = (TASK.parent / task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
        self._documents = [json.loads(line) for line in lines]
        self._choices = task["doc_to_choice"]
        self._labels = [document[task["doc_to_target"]] for document in self._documents]
        self.requests = [
            Instance(
                request_type="loglikelihood",
                doc=document,
                arguments=(task["doc_to_text"].replace("{{review}}", document["review"]), f" {choice}"),
                idx=number,
            )
            for document in self._documents
            for number, choice in enumerate(self._choices)
        ]

    def score(self, model: LM) -> tuple[list[float], float]:
        """Log likelihoods of all requests, and the share of questions whose right choice is the likeliest."""
        found = [likelihood for likelihood, _ in model.loglikelihood(self.requests)]
        width = len(self._choices)
        best = [max(range(width), key=lambda each: found[at + each]) for at in range(0, len(found), width)]
        hits = sum(guess == label for guess, label in zip(best, self._labels, strict=True))
        return found, hits / len(self._labels)


def served(server: LiveServer, model: str, **options: str) -> LocalCompletionsAPI:
    """As `lm_eval run --model local-completions --model_args ...` makes it."""
    told = {"model": model, "base_url": f"{server.base_url}/v1/completions", "num_concurrent": "4", **options}
    made: LocalCompletionsAPI = LocalCompletionsAPI.create_from_arg_string(
        ",".join(f"{name}={value}" for name, value in told.items())
    )
    return made


def with_peft(folder: Path, adapter: str | None) -> HFLM:
    base = str(folder / "base")
    peft = None if adapter is None else str(folder / "adapters" / adapter)
    return HFLM(pretrained=base, tokenizer=base, peft=peft, device="cpu", dtype="float32", batch_size=8)


def distance(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def reviews() -> Reviews:
    return Reviews()


def test_scores_equal_peft(real_live: LiveServer, reviews: Reviews) -> None:
    assert real_live.folder is not None
    exact = {name: reviews.score(with_peft(real_live.folder, name)) for name in (None, *real_live.adapters)}
    for name, (likelihoods, accuracy) in exact.items():
        found, score = reviews.score(served(real_live, name or real_live.model))
        assert distance(found, likelihoods) < TOLERANCE, name
        assert score == accuracy
        for other, (others, _) in exact.items():  # an adapter in another's place, or the base in an adapter's, is found
            assert other == name or distance(found, others) > 100 * TOLERANCE


def test_the_server_is_the_tokenizer(real_live: LiveServer, reviews: Reviews) -> None:
    """`GET /tokenizer_info` is found, and tokens are the same as of the folder's own tokenizer, or texts are sent."""
    assert real_live.folder is not None
    [legal, _] = real_live.adapters
    remote = served(real_live, legal)
    assert remote.tokenizer_backend == "remote"
    assert remote.eos_string == "<eos>"
    assert remote.eot_token_id == 2
    local = served(real_live, legal, tokenizer_backend="huggingface", tokenizer=str(real_live.folder / "base"))
    as_text = served(real_live, legal, tokenized_requests="False")
    expected, _ = reviews.score(local)
    for each in (remote, as_text):
        assert reviews.score(each)[0] == pytest.approx(expected, abs=TOLERANCE)


def test_batches_and_generation(real_live: LiveServer, reviews: Reviews) -> None:
    """Several prompts in one request, and `generate_until`."""
    [legal, poet] = real_live.adapters
    alone, _ = reviews.score(served(real_live, legal))
    batched, _ = reviews.score(served(real_live, legal, batch_size="8", num_concurrent="1"))
    assert batched == pytest.approx(alone, abs=TOLERANCE)
    asked = Instance(
        request_type="generate_until",
        doc={},
        arguments=("one base model", {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}),
        idx=0,
    )
    texts = [served(real_live, name).generate_until([asked], disable_tqdm=True)[0] for name in (legal, poet)]
    assert all(texts)
    assert texts[0] != texts[1]
