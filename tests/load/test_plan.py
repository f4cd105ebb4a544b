"""A plan follows from its options and its seed."""

from collections import Counter

import pytest

from server.load.plan import Shape, models_of, plan, warm_up

SHAPE = Shape(("a", "b", "c"), input_tokens=9, output_tokens=5)


def test_prompts_are_exact_in_tokens_and_all_different() -> None:
    shots = plan(SHAPE, 50, seed=1)
    assert {len(shot.body["prompt"]) for shot in shots} == {9}
    assert len({tuple(shot.body["prompt"]) for shot in shots}) == 50
    assert all(32 <= token < 256 for shot in shots for token in shot.body["prompt"])
    assert {(shot.path, shot.body["max_tokens"], shot.body["ignore_eos"]) for shot in shots} == {
        ("/v1/completions", 5, True)
    }
    assert shots == plan(SHAPE, 50, seed=1) != plan(SHAPE, 50, seed=2)
    assert not {tuple(s.body["prompt"]) for s in warm_up(SHAPE, 9, 1)} & {tuple(s.body["prompt"]) for s in shots}


@pytest.mark.parametrize(
    ("assign", "counts"), [("round-robin", (200, 200, 200)), ("random", (200, 200, 200)), ("zipf", (327, 164, 109))]
)
def test_who_gets_a_request(assign: str, counts: tuple[int, ...]) -> None:
    shots = plan(Shape(SHAPE.models, assign=assign), 600, seed=3)  # type: ignore[arg-type]
    found = Counter(shot.model for shot in shots)
    tolerance = 0 if assign == "round-robin" else 40
    assert [found[name] for name in SHAPE.models] == [pytest.approx(count, abs=tolerance) for count in counts]
    assert all(shot.body["model"] == shot.model for shot in shots)


def test_a_rate_is_kept_in_the_mean() -> None:
    times = [shot.at for shot in plan(SHAPE, 2000, seed=1, rate=10.0)]
    assert times[0] == 0
    assert None not in times
    assert times == sorted(times, key=float)  # type: ignore[arg-type]
    assert times[-1] == pytest.approx(200, rel=0.1)
    assert {shot.at for shot in plan(SHAPE, 3, seed=1)} == {None}


def test_generate_has_its_own_body_and_eos_may_be_honoured() -> None:
    [shot] = plan(Shape(("legal",), "generate", input_tokens=7, output_tokens=3, honour_eos=True), 1, seed=1)
    assert (shot.path, shot.body["adapter"]) == ("/generate_stream", "legal")
    assert len(shot.body["inputs"].split()) == 7
    assert shot.body["parameters"] == {"max_new_tokens": 3, "details": True}


def test_the_base_is_the_model_without_a_parent() -> None:
    assert models_of([{"id": "x", "parent": "b"}, {"id": "b", "parent": None}, {"id": "c"}]) == ("b",)
    assert models_of([]) == ()
