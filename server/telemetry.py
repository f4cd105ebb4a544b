"""Whether traces are wanted, and the tracer then; OpenTelemetry is imported for nobody else."""

import logging
import os
from collections.abc import Mapping

from server.api.tracing import Tracer
from server.settings import SettingsError

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_INSTALL = "pip install 'polyrank[otel]'"

log = logging.getLogger(__name__)


def open_tracer(endpoint: str | None, environment: Mapping[str, str] = os.environ) -> Tracer | None:
    """The tracer that `--otlp-endpoint` or OpenTelemetry's own variables ask for, or None.

    Raises SettingsError if the option asks for what is not installed. The variables, which may be meant for all
    programs of a machine, only get a warning then.
    """
    wanted = endpoint is not None or any(environment.get(name) for name in _ENDPOINTS)
    off = (
        environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none"
    )
    if not wanted or off:
        return None
    try:
        from server.otel import sending
    except ImportError:
        if endpoint is not None:
            raise SettingsError(f"--otlp-endpoint: OpenTelemetry is not installed; {_INSTALL}") from None
        log.warning("traces_not_sent", extra={"reason": f"OpenTelemetry is not installed; {_INSTALL}"})
        return None
    return sending(endpoint)
