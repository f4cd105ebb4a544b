"""Compiles the model's layers beside the engine, which serves eagerly until they are ready."""

import ctypes
import logging
import os
import threading
import time

import torch
from torch import nn

from kernels import dispatch
from server.model.base import BaseModel
from server.model.compiled import LayerCode, install
from server.model.decoder_layers import decoder_layers
from server.model.default_model import cache_root
from server.model.step_context import StepContext

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_PATIENCE = 3.0  # seconds: a C++ compiler that runs is left behind, and with it a thread that waits for it

log = logging.getLogger(__name__)


class _Stopped(BaseException):
    """Ends the thread; no Exception, so that nothing on the way takes it for a failure to recover from."""


class BackgroundCompiler:
    """One thread that compiles once. The context must have its cache, pool and table when it starts."""

    def __init__(self, base: BaseModel, context: StepContext) -> None:
        self._base = base
        self._context = context
        self._threads = torch.get_num_threads()  # here, where the engine is built: later they are the engine's alone
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="compile", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the work, at most so long; then as `ready`."""
        self._thread.join(seconds)
        return self.ready

    @property
    def running(self) -> bool:
        """Whether the work goes on. Any thread may ask, as for the next."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether the layers run compiled from the next step on."""
        return self._context.compiled is not None

    def stop(self) -> None:
        """End the work within seconds. May be called before `start`, and again."""
        self._stopping = True
        if self._thread.is_alive() and self._thread.ident is not None:
            # Tracing and code generation take seconds and know no other way to be told.
            thread, error = ctypes.c_ulong(self._thread.ident), ctypes.py_object(_Stopped)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)
            self._thread.join(_PATIENCE)

    def _run(self) -> None:
        log.info("compiling_layers", extra={"note": "in the background, serving eagerly meanwhile"})
        start = time.monotonic()
        try:
            layers, codes = self._compile()
            self._progress()
        except _Stopped:
            return
        except Exception as error:
            # Whatever it is, from a model that cannot be traced to a compiler that is not there: the model serves.
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            log.warning("layers_not_compiled", extra={"reason": reason, "note": "serving eagerly"})
            log.debug("layers_not_compiled", exc_info=error)
            return
        install(layers, self._context, codes)
        log.info("layers_compiled", extra={"seconds": round(time.monotonic() - start, 1)})

    def _compile(self) -> tuple[list[nn.Module], list[LayerCode]]:
        import torch._inductor.config  # as are the next, only here: together they take two seconds
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        # Torch sets the variable to its default, a temporary folder, as soon as anything asks for it.
        if os.environ.get(CACHE_VARIABLE) in (None, default_cache_dir()):
            os.environ[CACHE_VARIABLE] = str(cache_root() / f"inductor-{dispatch.cpu_key()}")
        # Before Inductor is imported, which else starts a pool of processes at once. One compiler at a time leaves the
        # other cores to the requests that are served meanwhile.
        torch._inductor.config.compile_threads = 1
        from server.model.compile import compile_layers

        return decoder_layers(self._base), compile_layers(self._base, self._context, self._progress, self._threads)

    def _progress(self) -> None:
        if self._stopping:
            raise _Stopped
