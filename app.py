"""The page: a picture in, six views out, in the browser. Runs here, and as it is as a Space of the Hub.

pip install -r requirements-app.txt
python app.py
python app.py --checkpoint sudo-ai/zero123plus-v1.2 --port 8080
"""

import argparse

from zero123plus import options


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = options.Parser("The page: six views of a picture.")
    add = parser.add_argument
    options.add_checkpoint_options(add)
    add("--dtype", choices=options.DTYPES, help=options.DTYPE_HELP)
    add("--host", help="address to listen on; this machine alone if missing")
    add(
        "--port", type=options.number(int, 1, 65535), help="port to listen on; the first free one from 7860 if missing"
    )
    return parser.parse_args(argv)


@options.command
def main(argv: list[str] | None = None):
    """The command line."""
    o = parse_options(argv)
    from zero123plus import page  # takes seconds, which --help need not wait for

    blocks = page.build(*page.load(options.parse_checkpoint(o, o.dtype)))
    _, url, _ = page.launch(blocks, server_name=o.host, server_port=o.port, prevent_thread_lock=True)
    print(f"Running on local URL: {url}")
    blocks.block_thread()


if __name__ == "__main__":
    main()
