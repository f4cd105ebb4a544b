"""What can go wrong while the base model is loaded and prepared."""

from server.errors import EngineFailure


class ModelLoadError(EngineFailure):
    """The base model cannot be served; the message says why and what to do. Raised at the start only."""

    code = "model_load_failed"


class CompileError(Exception):
    """The layers cannot be compiled; the message says why. The model is then served as it is."""
