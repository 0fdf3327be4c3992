"""Runs img2dataset in its own process, because it takes seconds to import and replaces the standard streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa

RESIZER = (
    "image_size",
    "resize_mode",
    "resize_only_if_bigger",
    "encode_format",
    "encode_quality",
    "skip_reencode",
    "min_image_size",
    "max_image_area",
    "max_aspect_ratio",
)


def write_folders(jobs: list[dict[str, Any]]) -> None:
    """Downloads the rows of each job into shards in its `folder`, all jobs in one process.

    A job has `folder`, `columns` (`url`, `caption`, further ones) and, if they are to differ from img2dataset's own,
    its options, `number_sample_per_shard` and `oom_shard_count` among them.
    """
    for job in jobs:
        Path(job["folder"]).mkdir(parents=True)
    command = [sys.executable, "-m", "tests.fetch.img2dataset_jobs"]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run(
        command, input=json.dumps(jobs), capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def _write_folder(job: dict[str, Any]) -> None:
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    options: dict[str, Any] = {"image_size": 256, "resize_mode": "border", "resize_only_if_bigger": False} | job
    encode_format = options.get("encode_format", "jpg")
    per_shard, table = options.get("number_sample_per_shard", 10_000), pa.table(job["columns"])
    downloader = Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=Resizer(**{name: options[name] for name in RESIZER if name in options}),
        thread_count=4,
        save_caption=True,
        extract_exif=True,
        output_folder=job["folder"],
        column_list=table.column_names,
        timeout=5,
        number_sample_per_shard=per_shard,
        oom_shard_count=options.get("oom_shard_count", 5),
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=encode_format,
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=["noai", "noimageai", "noindex", "noimageindex"],
    )
    for shard, start in enumerate(range(0, len(table), per_shard)):
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/rows.feather"
            with pa.ipc.new_file(path, table.schema) as file:
                file.write_table(table.slice(start, per_shard))
            downloader.download_shard((shard, path))


if __name__ == "__main__":
    for job in json.load(sys.stdin):
        _write_folder(job)
