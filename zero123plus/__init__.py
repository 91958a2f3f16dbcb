"""The library around the pipeline: loading checkpoints, reading pictures, writing results.

It imports `pipeline`; `pipeline` imports nothing of it, because diffusers cannot load siblings from a repository whose
name has a dot.
"""

import logging
import os
import warnings

# What libraries say of packages and options that nobody chose, and nothing needs
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "should be kept in float32: []" not in record.getMessage()
)
