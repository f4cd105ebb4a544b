"""The API's protocols are met by what the engine and the store really are. Checked by mypy; nothing runs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapters_store.registry import AdapterRegistry
    from server.api.services import Engine, Registry
    from server.api.services import Intake as Uploads
    from server.engine.async_engine import AsyncEngine
    from server.intake import Intake
    from tests.api.fake_engine import FakeEngine
    from tests.api.fake_intake import FakeIntake
    from tests.api.fake_registry import FakeRegistry

    def intakes(real: Intake, fake: FakeIntake) -> tuple[Uploads, ...]:
        return real, fake

    def engines(real: AsyncEngine, fake: FakeEngine) -> tuple[Engine, ...]:
        return real, fake

    def registries(real: AdapterRegistry, fake: FakeRegistry) -> tuple[Registry, ...]:
        return real, fake
