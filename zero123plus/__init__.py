"""The library around the pipeline: loading checkpoints, reading pictures, writing results.

It imports `pipeline`; `pipeline` imports nothing of it, because the Hub loads that file alone.
"""
