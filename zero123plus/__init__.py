"""The library around the pipeline: loading checkpoints, reading pictures, writing results.

It imports `pipeline`; `pipeline` imports nothing of it, because diffusers cannot load siblings from a repository whose
name has a dot.
"""
