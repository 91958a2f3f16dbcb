"""What a pipeline costs the host, which on a GPU is what one tile waits for: operators that launch kernels, and time.

Both are measured on a CPU, with a model as deep as that of the public checkpoints and narrow, so that computing costs
next to nothing. CUDA graphs are counted with a stand-in: a replay is one launch.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from zero123plus import cuda_graphs

# Operators that make a view or an empty tensor launch nothing
VIEWS = {
    *("view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select", "split", "chunk"),
    *("split_with_sizes", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "unbind", "unflatten", "unfold"),
    *("empty", "empty_like", "empty_strided", "new_empty", "lift", "lift_fresh", "_reshape_alias", "set_", "resize_"),
}


class CountLaunches(TorchDispatchMode):
    """Counts operators that would launch a kernel on a GPU, in `count`."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.overloadpacket.__name__ not in VIEWS
        return operator(*args, **(kwargs or {}))


def capture(function: Callable, inputs: list, pool) -> tuple[Callable[[], None], list]:
    """Stands in for [`cuda_graphs.capture`] on a CPU: nothing that a replay does is counted or timed."""
    with _disable_current_modes():
        outputs = [output.clone() for output in function(inputs)]
    return lambda: None, outputs


def measure_host(call: Callable, baseline: Callable, pipe, graphs: bool, steps: int, repeats: int = 3) -> dict:
    """Launches a step and processor time of a guided call for one tile without decoding, the second in ratio to a
    baseline's.

    Args:
        call: makes the tile's latents.
        baseline: the same, of another pipeline.
        pipe: whose call it is.
        graphs: whether its passes are CUDA graphs.
        steps: of both calls, by which launches are divided.
        repeats: of both, by turns; the median counts.
    """
    original, context = (cuda_graphs.capture, cuda_graphs.memory_pool), nullcontext()
    if graphs:
        cuda_graphs.capture, cuda_graphs.memory_pool = capture, lambda device: None
        context = cuda_graphs.CudaGraphs(pipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with context:
            call(), baseline()  # captures
            with CountLaunches() as launches:
                call()
            seconds = {"ours": [], "baseline": []}
            for _ in range(repeats):
                for name, which in (("ours", call), ("baseline", baseline)):
                    start = time.process_time()
                    which()
                    seconds[name].append(time.process_time() - start)
    finally:
        cuda_graphs.capture, cuda_graphs.memory_pool = original
        torch.set_num_threads(threads)
    ours, theirs = (statistics.median(values) for values in seconds.values())
    return {"launches a step": launches.count / steps, "host time to baseline's": ours / theirs}
