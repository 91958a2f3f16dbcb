"""The numbers that options take, and errors in one line."""

import argparse

import pytest
import torch

import pipeline
from zero123plus import checks, exports, options


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [(options.count, "3", 3), (options.share, "1", 1.0), (options.number(float, 0), "inf", float("inf"))],
)
def test_numbers_are_read(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (options.count, "0", "'0' is no whole number of at least 1"),
        (options.count, "1.5", "'1.5' is no whole number of at least 1"),
        (options.share, "1.01", "'1.01' is no number from 0 to 1"),
        (options.share, "nan", "'nan' is no number from 0 to 1"),
        (options.scale, "inf", "'inf' is no number from -1000 to 1000"),
        (options.seed, str(2**64), "is no whole number from"),
    ],
)
def test_other_numbers_are_refused_by_the_option(kind, text, message, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=kind)
    with pytest.raises(SystemExit):
        parser.parse_args(["--limit", text])
    error = capsys.readouterr().err
    assert "argument --limit: " in error and message in error


def test_what_options_can_be_is_what_there_is():
    """Options are parsed before the modules of these things are imported."""
    assert options.CAMERAS == tuple(pipeline.CAMERAS) and options.EXPORTS == tuple(exports.EXPORTS)
    assert checks.MAX_EDGE == pipeline.MAX_EDGE
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in options.DTYPES)


def test_a_command_ends_with_one_line():
    @options.command
    def main(argv):
        raise ValueError("first\n  second")

    with pytest.raises(SystemExit, match="^first second$"):
        main([])
