"""Cost of using a model: decoding speed, parameters, bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from tdistill.evaluation.batching import measured
from tdistill.evaluation.bootstrap import Interval
from tdistill.evaluation.generation import decode

_NUM_RUNS = 3


def decode_speed(model: PreTrainedModel, prompts_ids: Sequence[np.ndarray], num_tokens: int = 64) -> Interval:
    """Tokens per second of greedy decoding at batch size 1, end tokens ignored.

    The median of three generations, one prompt each, after one that is not counted; reading the prompt is included.

    Args:
        model: causal language model.
        prompts_ids: int [P] each; the first three are used, again from the start if there are fewer.
        num_tokens: length of every generation.
    Returns:
        Median, slowest and fastest generation: not a confidence interval.
    """
    speeds = []
    with measured(model):
        for run in range(-1, _NUM_RUNS):
            start = time.perf_counter()
            # Copying the tokens to the host waits for the accelerator.
            decode(model, [prompts_ids[run % min(_NUM_RUNS, len(prompts_ids))]], (), num_tokens)
            speeds.append(num_tokens / (time.perf_counter() - start))
    counted = speeds[1:]
    return Interval(statistics.median(counted), min(counted), max(counted))


def num_parameters(model: PreTrainedModel) -> int:
    """Number of parameters, tied ones once, and those that are packed in 4 bits one by one."""
    return model.num_parameters()


def weights_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that safetensors would write, tied ones once, in the dtype that they are loaded in."""
    tensors = model.state_dict(keep_vars=True).values()
    # What is offloaded has no place in memory, and is told apart by its object.
    return sum({(tensor.device, tensor.data_ptr() or id(tensor)): tensor.nbytes for tensor in tensors}.values())
