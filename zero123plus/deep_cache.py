"""DeepCache (arXiv 2312.00858, its branch 0): between whole passes only the UNet's last layers run.

    with DeepCache(pipe, interval=2):
        pipe(image)

The deep features of a UNet change little from step to step. Every `interval`-th pass of each kind (of the reference,
of the tile) runs the whole UNet; the others run its first convolution and its last resnet and transformer on the deep
features of the last whole pass. This is an approximation.
"""

import copy
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from diffusers import UNet2DConditionModel

from pipeline import Zero123PlusPipeline


@dataclass
class Passes:
    """The passes of one mode in one call of the pipeline.

    Args:
        count: how many there were since the last change of the batch size.
        batch_size: of the last.
        features: the deep features of the last whole pass, shape (B, C, h, w).
        entries: what the last pass wrote into the reference cache.
    """

    count: int = 0
    batch_size: int = 0
    features: torch.Tensor | None = None
    entries: dict = field(default_factory=dict)


class DeepFeatures(torch.nn.Module):
    """Takes the place of a UNet's middle block and returns the deep features of the last whole pass."""

    has_cross_attention = True

    def __init__(self, cache: "DeepCache"):
        super().__init__()
        self.passes_of = cache.passes_of

    def forward(self, hidden_states, temb=None, cross_attention_kwargs=None, **kwargs) -> torch.Tensor:
        """Returns features of shape (B, C, h, w), as the last block takes them."""
        return self.passes_of(cross_attention_kwargs).features


class DeepCache:
    """Attaches DeepCache to a pipeline's UNet.

    Args:
        pipe: the pipeline; its UNet may be neither compiled nor offloaded.
        interval: run the whole UNet every so many passes, 1 for all. Larger is faster and less exact.

    Raises:
        ValueError: if the interval is less than 1, or the UNet is compiled, offloaded, or has no such layers.
    """

    def __init__(self, pipe: Zero123PlusPipeline, interval: int = 2):
        unet = pipe.unet
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"`interval` is {interval!r}, but must be a whole number of at least 1.")
        if "forward" in vars(unet) or not isinstance(unet, UNet2DConditionModel):
            raise ValueError(
                "The UNet is compiled or has hooks, or DeepCache is enabled already, so that a part of it cannot run"
                " alone: do without torch.compile and offloading, or without DeepCache."
            )
        last = unet.up_blocks[-1]
        if len(getattr(last, "attentions", ())) < 2:
            raise ValueError(
                f"The UNet's last block, {type(last).__name__}, has fewer than two transformers, so that DeepCache has"
                " nothing to leave out."
            )
        self.unet, self.interval = unet, interval
        self.calls = WeakKeyDictionary()  # by the ReferenceCache of a call: its passes, by their mode
        self.shallow, top = copy.copy(unet), copy.copy(last)
        top._modules = {**last._modules, "resnets": last.resnets[-1:], "attentions": last.attentions[-1:]}
        blocks = {
            "down_blocks": torch.nn.ModuleList(),
            "mid_block": DeepFeatures(self),
            "up_blocks": torch.nn.ModuleList([top]),
        }
        self.shallow._modules = {**unet._modules, **blocks}
        self.hook = None

    def passes_of(self, kwargs: dict) -> Passes:
        """The passes of the call and mode that `cross_attention_kwargs` name."""
        return self.calls.setdefault(kwargs["reference"], {}).setdefault(kwargs["reference_mode"], Passes())

    def enable(self):
        """Attaches it to the UNet."""
        self.hook = self.unet.up_blocks[-1].attentions[-2].register_forward_hook(self.keep, with_kwargs=True)
        self.unet.forward = self.forward

    def disable(self):
        """Detaches it from the UNet, which then computes as before."""
        if self.hook is not None:
            self.hook.remove()
            del self.unet.forward
            self.hook = None

    def __enter__(self):
        self.enable()
        return self

    def __exit__(self, *exception):
        self.disable()

    def keep(self, module, args, kwargs, output):
        """A forward hook of the last transformer but one, whose output are the deep features."""
        if "reference" in (kwargs.get("cross_attention_kwargs") or {}):
            self.passes_of(kwargs["cross_attention_kwargs"]).features = output[0]

    def forward(self, sample, *args, cross_attention_kwargs=None, **kwargs):
        """The UNet's forward, whole or shallow. A pass without a reference is whole."""
        options = {"cross_attention_kwargs": cross_attention_kwargs, **kwargs}
        if "reference" not in (cross_attention_kwargs or {}):
            return type(self.unet).forward(self.unet, sample, *args, **options)
        passes = self.passes_of(cross_attention_kwargs)
        if passes.batch_size != len(sample):  # guidance began or ended
            passes.count, passes.batch_size = 0, len(sample)
        whole = passes.count % self.interval == 0
        passes.count += 1
        if not whole and options.get("mid_block_additional_residual") is not None:
            options["mid_block_additional_residual"] = 0  # a ControlNet's share is in the features; the first is added
        reference, writes = cross_attention_kwargs["reference"], cross_attention_kwargs["reference_mode"] == "write"
        if writes and not whole:
            reference.entries = dict(passes.entries)  # layers that do not run keep what they wrote last
        result = type(self.unet).forward(self.unet if whole else self.shallow, sample, *args, **options)
        if writes:
            passes.entries = dict(reference.entries)
        return result
