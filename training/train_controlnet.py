"""Trains a ControlNet of Zero123++: of depth or normals, or the normal generator, which sees the RGB tile.

    accelerate launch -m training.train_controlnet --condition depth \
        --checkpoint sudo-ai/zero123plus-v1.1 --data D --output O

The base is frozen and its reference attention active. All else, with the options and how a run continues, is
`training.train`. `OUTPUT/checkpoint-STEP` is a folder that `ControlNetModel.from_pretrained` loads.
"""

import sys

from . import train


def main(argv: list[str] | None = None):
    """The command line: that of `training.train` in the phase "controlnet"."""
    train.main(["--phase", "controlnet", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
