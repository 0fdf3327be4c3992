"""Opens a local page on which to move the cuts of a run and see immediately what would be kept.

    python -m pipeline.studio runs/demo
    python -m pipeline.studio runs/demo --after clip_score --port 8800

The page shows the rows that survived the step `--after`. By default this is the step before the last `threshold` lines
of the recipe, and the page starts with their cuts. It draws the histogram of each score, counts what the cuts keep,
shows pictures on both sides of each cut, filters all of this by language, host, concept or text, and finds pictures by
meaning if the run has embeddings. Pictures marked good or bad go to `report/labels.csv` of the run as `uid,label` (1 or
0). "Export" gives the cuts as recipe lines; a run with them keeps exactly the rows that were counted. Nothing else is
written.

The page is served to this machine only, at an address with a random token. On a remote machine, forward the port:
`ssh -L 8790:127.0.0.1:8790 HOST`.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import secrets
import socket
import sys
import tempfile
from collections.abc import Sequence

from aiohttp import web

from pipeline.reader import open_run
from pipeline.studio.cuts import default_step
from pipeline.studio.server import application
from pipeline.studio.studio import Studio
from trainer.errors import InputError
from trainer.terminal import Console, entry_point

PORT = 8790


async def _serve(studio: Studio, port: int, console: Console) -> None:
    token = secrets.token_urlsafe(24)
    listening = socket.create_server(("127.0.0.1", port))
    port = listening.getsockname()[1]
    hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]
    runner = web.AppRunner(application(studio, token, hosts), access_log=None)
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        # Printed directly, because the console hides tokens, and the user needs this one.
        print(f"http://127.0.0.1:{port}/?token={token}", file=console.file, flush=True)
        console.print("Ctrl-C ends it.")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.studio",
        description=__doc__,
        epilog="exit status: 0 ended by Ctrl-C; 2 no such run, step or free port; 1 a damaged run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="the folder or address of a run whose steps up to the cuts are done")
    parser.add_argument(
        "--after", metavar="STEP", help="look at the rows that survived this step, named as in the funnel"
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help="port on 127.0.0.1, 0 for any free one (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    console, errors = Console(), Console(stderr=True)
    try:
        run = open_run(args.run)
        after = args.after or default_step(run)
        run.columns(after)
        with tempfile.TemporaryDirectory(prefix="winnow-studio-") as folder:
            with errors.status("reading") as status:
                studio = Studio(
                    run, after, folder, lambda units: status.update(f"reading: unit {units:,} of {run.units:,}")
                )
            console.say(f"{studio.rows.n:,} rows after {after}")
            asyncio.run(_serve(studio, args.port, console))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EADDRINUSE) and "bind" in str(error):
            raise InputError(f"--port {args.port}: {error}; give another --port") from None
        raise
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    sys.exit(main())
