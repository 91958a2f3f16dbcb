"""CUDA graphs of the UNet's passes: one launch a pass in place of hundreds, on NVIDIA GPUs.

    with CudaGraphs(pipe):
        pipe(image)

The first pass of each shape is captured; later ones copy their inputs into the memory of the graph and replay it. This
changes no result. It helps most for one tile a call, which waits for the host otherwise.
"""

import threading
from collections.abc import Callable

import torch

from pipeline import ReferenceCache, Zero123PlusPipeline, is_compiled

Tensors = list[torch.Tensor]


def memory_pool(device: torch.device):
    """The memory that the graphs of a context share.

    Raises:
        ValueError: if the device has no CUDA graphs.
    """
    if device.type != "cuda":
        raise ValueError(f"The UNet is on {device}, but CUDA graphs need it on a GPU: pipe.to('cuda').")
    return torch.cuda.graph_pool_handle()


def capture(function: Callable[[Tensors], Tensors], inputs: Tensors, pool) -> tuple[Callable[[], None], Tensors]:
    """Captures a function of tensors.

    Args:
        function: whose kernels are captured.
        inputs: what it is called with, which it will read whenever it is replayed.
        pool: of [`memory_pool`].

    Returns:
        What replays it, and its outputs, which each replay overwrites.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(inputs)  # selects kernels and makes workspaces, which cannot be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = function(inputs)
    return graph.replay, outputs


def constants(unet: torch.nn.Module) -> tuple:
    """What a captured pass takes from its module, so that a change of it must be captured anew: where the weights lie,
    and the strength of LoRA layers.
    """
    weights = tuple(weight.data_ptr() for weight in (*unet.parameters(), *unet.buffers()))
    layers = [module for module in unet.modules() if hasattr(module, "lora_A")]
    lora = ((sorted(layer.scaling.items()), list(layer.active_adapters), layer.disable_adapters) for layer in layers)
    return weights, repr(list(lora)), tuple(map(id, unet.attn_processors.values()))


class CudaGraphs:
    """A context in which a pipeline's UNet replays CUDA graphs. Leaving it gives their memory back.

    Args:
        pipe: the pipeline, with its UNet on a GPU, neither compiled nor offloaded. Threads may share it.

    Raises:
        ValueError: if the UNet is elsewhere, compiled or offloaded, or has graphs already.
    """

    def __init__(self, pipe: Zero123PlusPipeline):
        unet = pipe.unet
        if is_compiled(unet) or "forward" in vars(unet):
            raise ValueError(
                "The UNet is compiled or offloaded, or has CUDA graphs already: use CudaGraphs alone (torch.compile"
                " has graphs of its own with mode='reduce-overhead')."
            )
        self.unet, self.lock = unet, threading.RLock()
        self.graphs, self.constants, self.pool = {}, None, None

    def __enter__(self):
        self.pool = memory_pool(self.unet.device)
        self.unet.forward = self.forward
        return self

    def __exit__(self, *exception):
        del self.unet.forward
        self.graphs, self.constants, self.pool = {}, None, None

    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states,
        cross_attention_kwargs=None,
        down_block_additional_residuals=(),
        mid_block_additional_residual=None,
        return_dict=True,
    ):
        """The UNet's forward, with the arguments that the pipeline gives it. Passes with a reference are captured."""
        kwargs = dict(cross_attention_kwargs or {})
        cache, mode = kwargs.pop("reference", None), kwargs.pop("reference_mode", None)
        residuals = [*down_block_additional_residuals]
        residuals += [] if mid_block_additional_residual is None else [mid_block_additional_residual]
        read = [tensor for pair in cache or () for tensor in pair] if mode == "read" else []
        inputs = [sample, timestep, encoder_hidden_states, *residuals, *read]

        def function(tensors: Tensors) -> Tensors:
            """The pass on tensors alone; returns what it writes, or its prediction."""
            added, entries = tensors[3 : 3 + len(residuals)], iter(tensors[3 + len(residuals) :])
            options = {}
            if added:
                options["down_block_additional_residuals"] = tuple(added[:-1])
                options["mid_block_additional_residual"] = added[-1]
            reference = ReferenceCache(zip(entries, entries)).rewound()
            passed = kwargs if cache is None else {**kwargs, "reference": reference, "reference_mode": mode}
            (prediction,) = type(self.unet).forward(
                self.unet, *tensors[:3], cross_attention_kwargs=passed, return_dict=False, **options
            )
            return [tensor for pair in reference for tensor in pair] if mode == "write" else [prediction]

        if cache is None:
            options = {"cross_attention_kwargs": kwargs, "return_dict": return_dict}
            return type(self.unet).forward(self.unet, sample, timestep, encoder_hidden_states, **options)
        outputs = self.run(mode, function, inputs, repr(kwargs))
        if mode == "read":
            return (outputs[0],)
        for key, value in zip(outputs[::2], outputs[1::2]):
            cache.write("", key, value)
        return (sample,)  # of a pass that writes, whose prediction nobody needs

    def run(self, mode: str, function: Callable[[Tensors], Tensors], inputs: Tensors, options: str) -> Tensors:
        """Replays a pass, which is captured the first time, and returns its outputs in memory of their own."""
        with self.lock, torch.no_grad():
            if mode == "write" and (now := constants(self.unet)) != self.constants:  # each call writes first
                self.graphs, self.constants = {}, now
            key = mode, options, tuple((tensor.shape, tensor.dtype) for tensor in inputs)
            if key not in self.graphs:
                own = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in inputs]
                self.graphs[key] = own, *capture(function, own, self.pool)
            own, replay, outputs = self.graphs[key]
            for dtype in {tensor.dtype for tensor in own}:
                pairs = [pair for pair in zip(own, inputs) if pair[0].dtype == dtype]
                torch._foreach_copy_(*map(list, zip(*pairs)))
            replay()
            return [output.clone() for output in outputs]
