"""An upload with its probe, on a real engine: what it reports, what it leaves behind, and what cannot lose it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.errors import AdapterConflict, AdapterInvalid, CodedError, PreconditionFailed
from adapters_store.forms import AdapterWeights, Context
from adapters_store.info import ModuleCount
from server import intake as intake_module
from server.engine.async_engine import AsyncEngine
from server.engine.build import build_engine
from server.engine.limits import EngineLimits
from server.engine.request import TRIAL, GenerationRequest, SamplingParams, WeightedAdapter
from server.errors import EngineFailure, ModelOutputInvalid, NotReady, Overloaded
from server.intake import PROMPT, Intake
from server.trials import Trials
from tests.api.asgi import until
from tests.e2e.world import World, build_world

LIMITS = EngineLimits(kv_cache_memory=8 << 20, adapter_memory=16 << 20, max_batch_tokens=64)
ADAPTERS = {"plain": {"r": 8, "lora_alpha": 16}, "other": {"r": 4, "lora_alpha": 8}}
PATIENCE = 300


@pytest.fixture
def world(tmp_path: Path) -> World:
    return build_world(tmp_path, "llama", ADAPTERS)


@asynccontextmanager
async def service(world: World, limits: EngineLimits = LIMITS) -> AsyncIterator[tuple[Intake, AsyncEngine]]:
    trials = Trials(world.registry.load)
    engine = build_engine(world.base(), limits, trials.load)
    async with asyncio.timeout(PATIENCE):
        engine.start()
        try:
            yield Intake(world.registry, engine, trials, lambda weights: weights), engine
            assert not trials._weights
        finally:
            await engine.stop()


def files(folder: Path) -> tuple[bytes, Path]:
    return (folder / "adapter_config.json").read_bytes(), folder / "adapter_model.safetensors"


def zeroed(given: Path, made: Path) -> tuple[bytes, Path]:
    config, weights = files(given)
    tensors = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in load_file(weights).items()}
    save_file(tensors, made)
    return config, made


async def settled(engine: AsyncEngine) -> None:
    """Until the engine has done what was posted to it and has told so."""
    await engine.unpin("nobody")
    await until(lambda: not engine.stats().running and not engine.stats().adapters_resident)


async def test_the_probe_is_the_change_of_the_log_probabilities(world: World, tmp_path: Path) -> None:
    async with service(world) as (intake, engine):
        info, created = await intake.add("new", *files(tmp_path / "plain"))
        assert created
        assert info.proof is not None
        tokens = engine.tokenizer.encode(PROMPT)
        base, adapted = (world.oracle.logprobs(tokens, names) for names in ((), (("plain", 1.0),)))
        probe = info.proof.probe
        assert probe is not None
        assert probe.tokens == len(tokens)
        assert probe.max_change == pytest.approx(float((base - adapted).abs().max()), rel=1e-3)
        assert probe.greedy_changed == pytest.approx(
            float((base.argmax(-1) != adapted.argmax(-1)).double().mean()), abs=1e-5
        )
        assert info.proof.reason is None
        assert info.proof.modules == info.modules == ModuleCount(info.modules.matched, info.modules.total)
        assert info.warnings == world.registry.info("plain").warnings
        assert info.digest == world.digests["plain"], "a report must not make other content of equal files"


async def test_an_adapter_without_effect_is_accepted_with_a_warning(world: World, tmp_path: Path) -> None:
    async with service(world) as (intake, _):
        info, created = await intake.add("zero", *zeroed(tmp_path / "plain", tmp_path / "zero"))
        assert created
        assert [notice.code for notice in info.warnings].count("adapter_is_noop") == 1
        assert info.proof is not None
        assert info.proof.probe is not None
        assert info.proof.probe.max_change < 1e-4
        assert info.proof.probe.greedy_changed == 0


async def test_nothing_is_left_of_the_adapter_on_trial(world: World, tmp_path: Path) -> None:
    async with service(world) as (intake, engine):
        await intake.add("new", *files(tmp_path / "plain"))
        await settled(engine)
        stats = engine.stats()
        assert (stats.adapters_resident, stats.adapter_bytes_used) == (0, 0)
        assert stats.adapter_loads_total == 1


async def test_the_same_content_is_not_tried_again(world: World, tmp_path: Path) -> None:
    async with service(world) as (intake, engine):
        first, _ = await intake.add("new", *files(tmp_path / "plain"))
        steps = engine.stats().steps_total
        assert await intake.add("new", *files(tmp_path / "plain")) == (first, False)
        assert engine.stats().steps_total == steps


async def test_refusals_come_before_the_probe(world: World, tmp_path: Path) -> None:
    config, weights = files(tmp_path / "other")
    async with service(world) as (intake, engine):
        for arguments, options, kind in (
            (("plain", config), {}, AdapterConflict),
            (("plain", config), {"if_match": "0" * 64}, PreconditionFailed),
            (("new", b"{}"), {}, AdapterInvalid),
        ):
            with pytest.raises(kind):
                await intake.add(*arguments, weights, **options)  # type: ignore[arg-type]
        assert engine.stats().steps_total == 0


@pytest.mark.parametrize("error", [Overloaded("Full."), NotReady("Draining."), EngineFailure("Broken.")])
async def test_what_the_engine_refuses_does_not_lose_an_upload(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: CodedError
) -> None:
    async with service(world) as (intake, engine):

        async def refuse(_: GenerationRequest) -> None:
            raise error

        monkeypatch.setattr(engine, "submit", refuse)
        info, created = await intake.add("new", *files(tmp_path / "plain"))
        assert created
        assert info.proof is not None
        assert info.proof.probe is None
        assert info.proof.reason is not None
        assert (info.proof.reason.code, info.proof.reason.message) == (error.code, error.message)
        assert world.registry.load(info.digest).modules


async def test_an_engine_that_is_stuck_does_not_hold_an_upload(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_module, "PROBE_SECONDS", 0.2)
    async with service(world) as (intake, engine):
        whole = engine._core.step
        monkeypatch.setattr(engine._core, "step", list)  # steps that compute nothing
        info, created = await intake.add("new", *files(tmp_path / "plain"))
        assert created
        assert info.proof is not None
        assert info.proof.reason is not None
        assert info.proof.reason.code == "probe_timeout"
        monkeypatch.setattr(engine._core, "step", whole)
        await settled(engine)
        assert not engine._core.has_work


async def test_an_engine_that_has_stopped_does_not_lose_an_upload(world: World, tmp_path: Path) -> None:
    async with service(world) as (intake, engine):
        await engine.stop()
        info, created = await intake.add("new", *files(tmp_path / "plain"))
        assert created
        assert info.proof is not None
        assert info.proof.reason is not None
        assert info.proof.reason.code == "engine_stopped"


async def test_no_text_names_an_adapter_on_trial(world: World, tmp_path: Path) -> None:
    """The adapter on trial finds no room."""
    async with service(world, limits=replace(LIMITS, adapter_memory=8 << 10)) as (intake, _):
        info, _ = await intake.add("new", *files(tmp_path / "plain"))
        assert info.proof is not None
        assert info.proof.reason is not None
        assert info.proof.reason.code == "adapter_memory_full"
        assert TRIAL not in info.proof.reason.message
        assert info.proof.reason.message.startswith("The adapter on trial (")


async def test_a_cancelled_upload_leaves_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with service(world) as (intake, engine):
        whole = engine._core.step
        monkeypatch.setattr(engine._core, "step", list)
        upload = asyncio.ensure_future(intake.add("new", *files(tmp_path / "plain")))
        await until(lambda: len(engine._streams) == 2)
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
        monkeypatch.setattr(engine._core, "step", whole)
        await settled(engine)
        assert not engine._core.has_work
        assert {info.name for info in world.registry.list()[0]} == {"plain", "other"}


async def test_invalid_numbers_are_told(world: World, tmp_path: Path) -> None:
    config, weights = files(tmp_path / "plain")
    huge = {name: tensor * 1e19 for name, tensor in load_file(weights).items()}
    save_file(huge, tmp_path / "huge")
    async with service(world) as (intake, engine):
        info, created = await intake.add("huge", config, tmp_path / "huge")
        assert created
        assert info.proof is not None
        assert info.proof.reason is not None
        assert info.proof.reason.code == ModelOutputInvalid.code
        assert not engine._core._quarantine._failures


async def test_others_get_their_tokens_meanwhile(world: World, tmp_path: Path) -> None:
    async with service(world) as (intake, engine):
        params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)

        async def answer(name: str) -> list[int | None]:
            request = GenerationRequest(name, "one base model", params, (WeightedAdapter(world.digests["other"]),))
            return [output.token_id async for output in await engine.submit(request)]

        alone = await answer("alone")
        uploads = [intake.add(f"new-{number}", *files(tmp_path / "plain")) for number in range(4)]
        stored, together = await asyncio.gather(asyncio.gather(*uploads), answer("together"))
        assert together == alone
        proofs = [info.proof for info, _ in stored]
        assert all(proof is not None and proof.probe is not None for proof in proofs)


def test_trial_weights_are_those_that_will_be_served(world: World, tmp_path: Path) -> None:
    """`served` is applied to the adapter on trial."""

    async def run() -> list[AdapterWeights]:
        seen: list[AdapterWeights] = []
        trials = Trials(world.registry.load)
        engine = build_engine(world.base(), LIMITS, trials.load)
        engine.start()
        try:

            def served(weights: AdapterWeights) -> AdapterWeights:
                seen.append(weights)
                return AdapterWeights("", {})

            intake = Intake(world.registry, engine, trials, served)
            info, _ = await intake.add("new", *files(tmp_path / "plain"))
            assert info.proof is not None
            assert info.proof.probe is not None
            assert info.proof.probe.max_change < 1e-4
        finally:
            await engine.stop()
        return seen

    [weights] = asyncio.run(run())
    assert weights.modules.keys() == world.registry.load(world.digests["plain"]).modules.keys()


@pytest.mark.parametrize("kind", ["virtual tokens", "invocation"])
async def test_what_acts_in_places_is_tried_too(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The probe's text has no invocation: there the adapter is tried as if it acted everywhere."""
    given = world.registry.load(world.digests["plain"])
    if kind == "virtual tokens":
        tried = replace(given, modules={}, context=Context(embeddings=torch.randn(5, 64)))
    else:
        tried = replace(given, invocation=(3, 1, 3))
    async with service(world) as (intake, _):
        plain, _ = await intake.add("plain-again", *files(tmp_path / "plain"))
        monkeypatch.setattr(world.registry, "weights", lambda found: tried)
        info, _ = await intake.add("new", *files(tmp_path / "plain"))
    assert info.proof is not None
    assert plain.proof is not None
    assert info.proof.probe is not None
    assert plain.proof.probe is not None
    assert info.proof.probe.tokens == plain.proof.probe.tokens
    assert info.proof.probe.max_change > 0.01
    assert (info.proof.probe == plain.proof.probe) == (kind == "invocation")
