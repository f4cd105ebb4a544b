"""Task vectors: what stands for a task (ICM-LoRA, released code, `ICL/last_time_step_icl.py`)."""

from collections.abc import Sequence

import torch

from adapters_store.errors import AdapterInvalid


def task_vector(examples: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 [hidden], the mean over calls, then over examples.

    examples: of each, [calls, hidden] or [calls, beams, hidden]: the output of the last decoder layer at the last
    position, in every forward call of its generation. As released the model has the task's adapter on. Raises
    AdapterInvalid `bad_condition` for no examples, or an example without a call.
    """
    if not examples or not all(len(calls) for calls in examples):
        raise AdapterInvalid("A task vector needs an example, and a token generated for each.", code="bad_condition")
    means = [calls.double().mean(0).reshape(-1, calls.shape[-1]).mean(0) for calls in examples]
    return torch.stack(means).mean(0).float()
