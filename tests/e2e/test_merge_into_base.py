"""An adapter in the base's own weights: answers as PEFT's, out again to the last bit, never beside anything else."""

from typing import Any

import pytest
import torch

from adapters_store.errors import AdapterInvalid
from server.engine.limits import EngineLimits
from server.engine.merged_base import BaseInUse
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.model.base import BaseModel
from tests.e2e.world import World, build_world
from tests.support.driver import CoreDriver, logprobs, tokens

LIMITS = EngineLimits(kv_cache_memory=4 << 20, adapter_memory=4 << 20, max_batch_tokens=24, max_running=8)
PROMPT = (11, 12, 13, 14, 15, 16)
LAYERS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
TOLERANCE = 1e-3


class Scene:
    """One model, its engine stepped by hand, and copies of all its weights as they were loaded."""

    def __init__(self, world: World, quantization: str = "none") -> None:
        self.world = world
        self.base: BaseModel = world.base()
        self.driver = CoreDriver(self.base, LIMITS, world.registry.load, quantization)
        self.before = self.state()
        self._count = 0

    def state(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.base.model.state_dict().items()}

    def untouched(self) -> bool:
        now = self.base.model.state_dict()
        return all(torch.equal(value, now[name]) for name, value in self.before.items())

    def merge(self, name: str) -> None:
        self.driver.core.merge_into_base(self.world.registry.load(self.world.digests[name]))

    def request(self, *adapters: tuple[str, float], new_tokens: int = 10) -> GenerationRequest:
        self._count += 1
        weighted = tuple(WeightedAdapter(self.world.digests[name], weight) for name, weight in adapters)
        params = SamplingParams(max_tokens=new_tokens, temperature=0, logprobs=0, ignore_eos=True)
        return GenerationRequest(f"r{self._count}", PROMPT, params, weighted, tenant=f"t{self._count}")

    def check(self, *adapters: tuple[str, float]) -> None:
        """The answer is PEFT's. Each request has a tenant of its own, so that no prefix is another's."""
        outputs = self.driver.run(self.request(*adapters))
        expected, scores = self.world.oracle.greedy(PROMPT, adapters, 10)
        assert tokens(outputs) == expected
        assert max(abs(one - two) for one, two in zip(logprobs(outputs), scores, strict=True)) < TOLERANCE


def _world(tmp_path_factory: pytest.TempPathFactory, architecture: str) -> World:
    layers = LAYERS[architecture]
    adapters: dict[str, dict[str, Any]] = {
        "one": {"r": 4, "lora_alpha": 8, "target_modules": layers},
        "two": {"r": 7, "lora_alpha": 21, "target_modules": layers[:1]},
        "biased": {"r": 4, "lora_alpha": 8, "target_modules": layers[:1], "lora_bias": True},
        "ends": {"r": 4, "lora_alpha": 8, "target_modules": [layers[0], "lm_head"]},
    }
    if architecture == "gpt2":
        del adapters["ends"]
    return build_world(tmp_path_factory.mktemp(architecture), architecture, adapters)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> World:
    return _world(tmp_path_factory, "llama")


@pytest.fixture(scope="module", params=sorted(LAYERS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    if request.param == "llama":
        found: World = request.getfixturevalue("llama")
        return found
    return _world(tmp_path_factory, request.param)


def test_in_and_out_and_another(world: World) -> None:
    scene = Scene(world)
    scene.check(("one", 1.0))
    scene.merge("one")
    assert not scene.untouched()
    scene.check(("one", 1.0))
    assert scene.driver.core.merged.digest == world.digests["one"], "its own requests leave it where it is"
    assert scene.driver.core.stats.merged_into_base == 1
    scene.merge("two")  # in the place of the first
    scene.check(("two", 1.0))
    assert scene.driver.core.merged.digest == world.digests["two"]
    scene.driver.core.merged.take_out()
    assert scene.untouched()
    scene.check(("two", 1.0))
    scene.check()


@pytest.mark.parametrize("other", [(), (("two", 1.0),), (("one", 0.5),), (("one", 1.0), ("two", 1.0))])
def test_a_request_of_anything_else_finds_the_base_itself(llama: World, other: tuple[tuple[str, float], ...]) -> None:
    scene = Scene(llama)
    scene.merge("one")
    scene.check(*other)
    assert scene.driver.core.merged.digest is None
    assert scene.untouched()
    scene.check(("one", 1.0))


def test_what_comes_in_the_midst_of_an_answer_changes_neither(llama: World) -> None:
    scene = Scene(llama)
    scene.merge("one")
    own, base = scene.request(("one", 1.0), new_tokens=12), scene.request(new_tokens=6)
    scene.driver.add(own)
    for _ in range(5):
        scene.driver.step()
    assert scene.driver.core.merged.digest is not None
    scene.driver.add(base)
    scene.driver.drain()
    assert tokens(scene.driver.outputs[own.request_id]) == llama.oracle.greedy(PROMPT, (("one", 1.0),), 12)[0]
    assert tokens(scene.driver.outputs[base.request_id]) == llama.oracle.greedy(PROMPT, (), 6)[0]
    assert scene.untouched()


def test_it_waits_for_no_one_and_is_refused_while_others_run(llama: World) -> None:
    scene = Scene(llama)
    scene.driver.add(scene.request())
    scene.driver.step()
    with pytest.raises(BaseInUse):
        scene.merge("one")
    assert scene.untouched()
    scene.driver.drain()
    scene.driver.add(scene.request(("one", 1.0)))
    scene.driver.step()
    scene.merge("one")  # its own requests may run
    scene.driver.drain()
    assert scene.driver.core.merged.digest is not None


def test_what_cannot_be_exact_is_refused_and_nothing_changes(world: World) -> None:
    scene = Scene(world)
    for name in {"biased", "ends"} & set(world.digests):
        if name == "biased" and world.folder.parent.name.startswith("gpt2"):
            continue  # its linears have biases, and take it
        with pytest.raises(AdapterInvalid) as refused:
            scene.merge(name)
        assert refused.value.code == "feature_unsupported"
        assert scene.untouched()
        assert scene.driver.core.merged.digest is None
    rounded = Scene(world, "int8")
    with pytest.raises(AdapterInvalid, match="int8"):
        rounded.merge("one")


def test_a_bias_goes_in_and_out_where_there_is_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = _world(tmp_path_factory, "gpt2")
    scene = Scene(world)
    scene.merge("biased")
    scene.check(("biased", 1.0))
    scene.check()
    assert scene.untouched()
