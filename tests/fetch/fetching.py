"""`python -m tests.fetch.fetching PORT ROWS PATH …`: a worker that only fetches.

Asks a server on this machine for `ROWS` urls, of the paths in turn, and writes a line of JSON after each table: how
many rows are done, and the count of each path and reason. Runs until its input ends.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa

from pipeline.fetch import client as client_module
from pipeline.stages.download import Download

CAP = 20_000_000
AREA = 36_000_000
UNIT = 1000
ROWS_A_HOST = 20


def units(port: int, rows: int, paths: Sequence[str]) -> Iterator[pa.Table]:
    for number in range(0, rows, UNIT):
        at = range(number, min(rows, number + UNIT))
        urls = [f"http://host{i // ROWS_A_HOST}.example:{port}/{paths[i % len(paths)]}?{i}" for i in at]
        places = {"unit": [number // UNIT] * len(at), "row": [i - number for i in at]}
        yield pa.table({**{k: pa.array(v, pa.int32()) for k, v in places.items()}, "url": pa.array(urls)})


def main(port: int, rows: int, paths: Sequence[str]) -> None:
    client_module.system_lookup = lambda host: ["127.0.0.1"]
    # Long timeouts for a busy machine: this test measures memory.
    stage = Download(timeout=100, min_rate=0, max_bytes=CAP, max_image_area=AREA, allow_addrs=[f"127.0.0.1:{port}"])
    stage.setup()
    done, ends = 0, Counter[tuple[str, str | None]]()
    for table in stage.stream(units(port, rows, paths)):
        done += len(table)
        for url, reason in zip(table["url"].to_pylist(), table["drop_reason"].to_pylist()):
            ends[url.rpartition("/")[2].partition("?")[0], reason] += 1
        print(json.dumps([done, [[*end, count] for end, count in ends.items()]]), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
