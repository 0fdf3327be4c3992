"""Compares downloads by Winnow with img2dataset and with a lower bound of the machine (`floor`), on the same rows.

    apt-get install -y nginx-light                      nginx and its echo module, which delays answers
    python benchmarks/fetch.py                          20,000 rows, 4 rounds
    python benchmarks/fetch.py --rows 1000 --rounds 1   a quick check that it works
    python benchmarks/fetch.py --scenarios plain,dead,latency

The benchmark starts nginx on free ports of many loopback addresses. It serves the synthetic photographs of `corpus.py`
under one URL for each row. The contenders take turns. Each does the whole job, from a parquet file of URLs and captions
to WebDataset shards of 256-pixel JPEGs (`keep_ratio_largest`, area, quality 95) with sha256 and EXIF:

- `img2dataset`: with the fastest settings found (see `IMG2DATASET`);
- `scaled`, `exact`, `fast`: `python -m pipeline.run` with that `decode`, including the start of Ray, but without the
  perceptual hash, which img2dataset does not compute (0.3 ms of CPU per image);
- `floor`: one plain process per core, which pipelines requests over persistent connections, decodes at the smallest
  DCT scale of at least 1.5 times the target, resizes, encodes, hashes (sha256) and writes a tar, each by the cheapest
  known method and without any checks, opt-outs, deadlines or error handling. It uses plain sockets, which cost less
  than libcurl and need no additional package.

CPU time covers the command and every process it started (Ray's daemons, but not nginx), from start to end. Memory is
the peak sum of their proportional set sizes, sampled every second. PSNR compares the pictures in the shards with a full
decoding, resized by area and not encoded; it is the median and the first percentile over JPEGs.

Scenarios: `plain` for all contenders; `dead` and `latency` for img2dataset and `scaled` only. In `dead`, one share of
the rows leads to hosts that refuse connections or never complete the handshake, and another share to hosts that accept
connections and never answer, with five rows per host. In `latency`, every answer is delayed, but connections are not,
which favours the contender that opens most of them. A ratio is taken within each round; its median over rounds is
reported.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import corpus
import cv2
import numpy as np
import simplejpeg

ROOT = Path(__file__).resolve().parent.parent
DECODES = ("scaled", "exact", "fast")
TARGET = 256
QUALITY = 95
COVER = 1.5
PSNR_FILES = 500
ROWS_PER_BAD_HOST = 5
# A measured command has hung if it takes longer than START_SECONDS and then handles fewer than LEAST_RATE rows/s.
LEAST_RATE, START_SECONDS = 15, 180
SAMPLING_SECONDS = 0.2
COLUMNS = "scenario round contender images seconds img/s CPU_ms past_start peak_MB PSNR PSNR_1%".split()
LINE = "{:<9}{:>7} {:<12}{:>8}{:>9}{:>7}{:>8}{:>11}{:>9}{:>7}{:>8}"

# The contenders of the scenarios other than `plain`.
SCENARIO_CONTENDERS = ("img2dataset", "scaled")

# Measured on 2 cores with 1,500 rows. One process per core took 6 to 7 ms of CPU per image, start-up excluded, with 8,
# 32, 128 and 256 threads each. Twice as many processes double the cost of start-up (24 instead of 19 ms in all). With
# dead hosts, 256 threads (its default) took 44 s, 32 took 64 s, 512 took 38 s. No contender retries.
IMG2DATASET: dict[str, object] = {
    "image_size": TARGET,
    "resize_mode": "keep_ratio_largest",
    "resize_only_if_bigger": True,
    "encode_format": "jpg",
    "encode_quality": QUALITY,
    "input_format": "parquet",
    "output_format": "webdataset",
    "caption_col": "caption",
    "compute_hash": "sha256",
    "retries": 0,
    "distributor": "multiprocessing",
}


@dataclass(frozen=True)
class Usage:
    """The cost of a command: wall-clock seconds, CPU seconds, and peak memory in bytes."""

    seconds: float
    cpu: float
    memory: int


@dataclass(frozen=True)
class Measured:
    usage: Usage
    images: int

    @property
    def rate(self) -> float:
        return self.images / self.usage.seconds

    @property
    def cpu_ms(self) -> float:
        return 1000 * self.usage.cpu / self.images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes of each contender")
    parser.add_argument("--scenarios", default="plain", help="any of plain,dead,latency")
    parser.add_argument("--contenders", default=",".join(["img2dataset", *DECODES, "floor"]), help="any of these")
    parser.add_argument("--threads", type=int, default=256, help="img2dataset's thread_count")
    parser.add_argument("--timeout", type=int, default=10, help="seconds a contender waits for one download")
    parser.add_argument("--dead", type=float, default=0.05, help="share of rows on dead hosts")
    parser.add_argument("--stalled", type=float, default=0.02, help="share of rows on hosts that never answer")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument("--hosts", type=int, default=64, help="addresses that serve the pictures")
    parser.add_argument("--files", type=int, default=2000, help="pictures in the corpus")
    parser.add_argument("--corpus", type=Path, default=ROOT / "runs" / "fetch-corpus", help="kept for later runs")
    args = parser.parse_args()
    for option, known in (
        ("scenarios", ("plain", "dead", "latency")),
        ("contenders", ("img2dataset", *DECODES, "floor")),
    ):
        if unknown := set(getattr(args, option).split(",")) - set(known):
            parser.error(f"--{option}: unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    cv2.setNumThreads(1)
    names = corpus.make(args.corpus, args.files)
    sizes = [(args.corpus / name).stat().st_size for name in names]
    print(f"{len(names):,} files, mean {np.mean(sizes) / 1e3:.0f} KB, median {np.median(sizes) / 1e3:.0f} KB")
    with tempfile.TemporaryDirectory(prefix="fetch-") as folder:
        Benchmark(args, names, Path(folder)).run()


class Benchmark:
    def __init__(self, args: argparse.Namespace, names: list[str], folder: Path) -> None:
        self.args, self.names, self.folder = args, names, folder
        self.contenders = args.contenders.split(",")
        self.results: dict[tuple[str, str], list[Measured]] = {}
        self.psnr: dict[str, np.ndarray] = {}
        self.ports: dict[str, int] = {}

    def run(self) -> None:
        scenarios = self.args.scenarios.split(",")
        with nginx(self.folder, self.args.corpus, self.args.hosts, self.args.latency) as self.ports:
            starts = self._starts()
            print("\n" + LINE.format(*COLUMNS), flush=True)
            for scenario in scenarios:
                for number in range(self.args.rounds):
                    # Every other round is in reverse order, so that a drift in machine speed favours no contender.
                    for contender in self.contenders[:: -1 if number % 2 else 1]:
                        if scenario != "plain" and contender not in SCENARIO_CONTENDERS:
                            continue
                        measured = self._measure(scenario, contender, self.args.rows)
                        self.results.setdefault((scenario, contender), []).append(measured)
                        self._print(scenario, str(number + 1), contender, [measured], starts[contender])
        for (scenario, contender), runs in self.results.items():
            self._print(scenario, "median", contender, runs, starts[contender])
        self._conclude(scenarios)

    def _conclude(self, scenarios: list[str]) -> None:
        figures = {
            "wall_ratio": self._ratio("plain", "scaled", "img2dataset"),
            "cpu_ratio": self._ratio("plain", "img2dataset", "scaled", cpu=True),
            "exact_cpu_ratio": self._ratio("plain", "img2dataset", "exact", cpu=True),
            "fast_cpu_ratio": self._ratio("plain", "img2dataset", "fast", cpu=True),
            "floor_share": self._ratio("plain", "scaled", "floor"),
            "psnr_gap_db": self._median_psnr("img2dataset") - self._median_psnr("scaled"),
        }
        print(f"CPU of the floor / CPU of scaled: {self._ratio('plain', 'floor', 'scaled', cpu=True):.2f}")
        for scenario in scenarios:
            if scenario != "plain":
                wall = self._ratio(scenario, "scaled", "img2dataset")
                cpu = self._ratio(scenario, "img2dataset", "scaled", cpu=True)
                print(f"{scenario}: wall_ratio={wall:.2f} cpu_ratio={cpu:.2f}")
        print("RESULT " + " ".join(f"{name}={value:.2f}" for name, value in figures.items()))

    def _ratio(self, scenario: str, above: str, below: str, cpu: bool = False) -> float:
        """Returns the median over rounds of `above` divided by `below`, or NaN if either was not measured."""
        pairs = zip(self.results.get((scenario, above), []), self.results.get((scenario, below), []))
        ratios = [a.cpu_ms / b.cpu_ms if cpu else a.rate / b.rate for a, b in pairs]
        return median(ratios) if ratios else math.nan

    def _median_psnr(self, contender: str) -> float:
        return float(np.median(self.psnr[contender])) if contender in self.psnr else math.nan

    def _print(self, scenario: str, number: str, contender: str, runs: list[Measured], start: Usage) -> None:
        values = self.psnr.get(contender, np.array([])) if scenario == "plain" else np.array([])
        cells = [
            scenario,
            number,
            contender,
            f"{median(r.images for r in runs):,.0f}",
            f"{median(r.usage.seconds for r in runs):.1f}",
            f"{median(r.rate for r in runs):.0f}",
            f"{median(r.cpu_ms for r in runs):.2f}",
            f"{median(1000 * (r.usage.cpu - start.cpu) / r.images for r in runs):.2f}",
            f"{median(r.usage.memory for r in runs) / 1e6:.0f}",
            f"{np.median(values):.2f}" if len(values) else "",
            f"{np.percentile(values, 1):.1f}" if len(values) else "",
        ]
        print(LINE.format(*cells), flush=True)

    def _starts(self) -> dict[str, Usage]:
        """Measures the start-up of each contender, by giving it two rows per process."""
        starts: dict[str, Usage] = {}
        for contender in self.contenders:
            known = next((starts[c] for c in starts if c in DECODES and contender in DECODES), None)
            starts[contender] = known or self._measure("plain", contender, 2 * self.args.workers, judge=False).usage
            if not known:
                print(
                    f"start-up of {'winnow' if contender in DECODES else contender}: "
                    f"{starts[contender].seconds:.1f} s, {starts[contender].cpu:.1f} s of CPU",
                    flush=True,
                )
        return starts

    def _measure(self, scenario: str, contender: str, rows: int, judge: bool = True) -> Measured:
        job = self.folder / "job"
        shutil.rmtree(job, ignore_errors=True)
        job.mkdir()
        bad = scenario == "dead"
        with bad_hosts(rows, self.args.dead if bad else 0, self.args.stalled if bad else 0) as hosts:
            urls = self._urls(scenario, rows, hosts)
            write_rows(job / "rows.parquet", urls)
            usage = measure(self._command(contender, job, urls), job, START_SECONDS + rows / LEAST_RATE)
        tars = sorted((job / "out" if contender not in DECODES else job / "run" / "shards").glob("*.tar"))
        images = sum(count_images(path) for path in tars)
        expected = sum("127.0.1." in url for url in urls)
        if images != expected:
            print(f"{contender}: {images:,} of {expected:,} images. The end of its log:")
            print((job / "log").read_text(errors="replace")[-1500:], flush=True)
        if judge and scenario == "plain" and contender not in self.psnr:
            self.psnr[contender] = psnr(tars, self.args.corpus, {n for n in self.names if n.endswith("jpg")})
        if not images:
            sys.exit(f"{contender} wrote no images")
        return Measured(usage, images)

    def _urls(self, scenario: str, rows: int, bad: list[str]) -> list[str]:
        """Returns a URL for each row. Good ones cycle through hosts and files; `bad` hosts are spread evenly."""
        port = self.ports["latency" if scenario == "latency" else "plain"]
        spots = {round(i * rows / len(bad)): host for i, host in enumerate(bad)} if bad else {}
        urls = []
        for row in range(rows):
            name = self.names[row % len(self.names)]
            host = spots.get(row) or f"127.0.1.{1 + row % self.args.hosts}:{port}"
            urls.append(f"http://{host}/{name}?{row}")
        return urls

    def _command(self, contender: str, job: Path, urls: list[str]) -> list[str]:
        rows, workers = job / "rows.parquet", self.args.workers
        if contender == "floor":
            return [sys.executable, __file__, "floor", str(job), str(workers)]
        if contender == "img2dataset":
            options = {
                **IMG2DATASET,
                "url_list": str(rows),
                "output_folder": str(job / "out"),
                "processes_count": workers,
                "thread_count": self.args.threads,
                # img2dataset restarts a process after five shards, which costs seconds of imports, so shards are few
                # and of equal size.
                "number_sample_per_shard": min(10_000, math.ceil(len(urls) / workers)),
                "timeout": self.args.timeout,
            }
            call = "import json, sys, img2dataset; img2dataset.download(**json.loads(sys.argv[1]))"
            return [sys.executable, "-c", call, json.dumps(options)]
        download = {
            **({} if contender == "scaled" else {"decode": contender}),  # `scaled` is the default
            "timeout": self.args.timeout,
            "retries": 0,
            "per_host": 64,
            "compute_phash": False,  # img2dataset has none
            "allow_addrs": sorted({url.split("/")[2] for url in urls}),
        }
        recipe = {
            "name": "fetch",
            "pool": {"path": str(rows)},
            "run": str(job / "run"),
            "workers": workers,
            "steps": [{"download": download}, "write_shards"],
        }
        (job / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        return [sys.executable, "-m", "pipeline.run", str(job / "recipe.yaml")]


def write_rows(path: Path, urls: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    captions = [f"A made-up photograph, number {row}" for row in range(len(urls))]
    pq.write_table(pa.table({"url": urls, "caption": captions}), path)


def read_urls(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    return list(pq.read_table(path, columns=["url"])["url"].to_pylist())


# --- The web ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nginx(folder: Path, pictures: Path, hosts: int, latency: float) -> Iterator[dict[str, int]]:
    """Serves `pictures` on 127.0.1.1, 127.0.1.2, … Yields the ports that answer immediately and with latency."""
    binary = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if binary is None:
        sys.exit("nginx is missing: apt-get install -y nginx-light")
    built = subprocess.run([binary, "-V"], capture_output=True, text=True, check=True).stderr
    modules = re.search(r"--modules-path=(\S+)", built)
    echo = Path(modules[1] if modules else "modules") / "ngx_http_echo_module.so"
    ports = {"plain": free_port(), "latency": free_port()}
    if not echo.exists():
        print(f"scenario `latency` needs {echo}: apt-get install -y nginx-light", file=sys.stderr)
        del ports["latency"]
    home = folder / "nginx"
    home.mkdir()

    def server(port: int, locations: str) -> str:
        listens = "\n".join(f"listen 127.0.1.{host + 1}:{port};" for host in range(hosts))
        robots = "location = /robots.txt { return 404; }"
        return f"server {{\n{listens}\nroot {pictures.resolve()};\n{robots}\n{locations}}}\n"

    delayed = f"location / {{ echo_sleep {latency}; echo_exec @picture; }}\nlocation @picture {{ }}\n"
    # As root, nginx would switch its workers to another user, who may not read the pictures.
    user = f"user {pwd.getpwuid(0).pw_name};" if os.geteuid() == 0 else ""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    spools = "\n".join(f"{kind}_temp_path {home}/{kind};" for kind in kinds)
    (home / "nginx.conf").write_text(f"""
{f"load_module {echo};" if "latency" in ports else ""}
daemon off; worker_processes 1; pid {home}/pid; error_log stderr crit; {user}
events {{ worker_connections 8192; }}
http {{
access_log off; sendfile on; tcp_nopush on; keepalive_requests 10000000; keepalive_timeout 60;
open_file_cache max=4000 inactive=1h; open_file_cache_valid 1h;
types {{ image/jpeg jpg; image/png png; image/webp webp; }}
{spools}
{server(ports["plain"], "")}
{server(ports["latency"], delayed) if "latency" in ports else ""}
}}
""")
    command = [binary, "-e", "stderr", "-p", str(home), "-c", str(home / "nginx.conf")]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        for _ in range(100):
            if process.poll() is not None:
                sys.exit(f"nginx ended with status {process.returncode}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.1.1", ports["plain"]), 1):
                break
            time.sleep(0.05)
        yield ports
    finally:
        process.terminate()
        process.wait(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def bad_hosts(rows: int, dead: float, stalled: float) -> Iterator[list[str]]:
    """Yields an `address:port` for each row that shall fail, in random order.

    The hosts of the share `dead` refuse the connection or never complete the handshake, in equal parts. Those of the
    share `stalled` accept it and never answer.
    """
    port = free_port()

    def addresses(network: int, count: int) -> list[str]:
        hosts = min(250, math.ceil(count / ROWS_PER_BAD_HOST))
        return [f"127.0.{network}.{1 + i % hosts}:{port}" for i in range(count)]

    refusing, unreachable = (addresses(network, round(rows * dead / 2)) for network in (2, 3))
    mute = addresses(4, round(rows * stalled))
    with contextlib.ExitStack() as stack:

        def listen(address: str, backlog: int) -> tuple[str, int]:
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address.split(":")[0], port))
            listener.listen(backlog)
            return listener.getsockname()

        for address in sorted(set(mute)):
            listen(address, 4096)  # the kernel completes the handshake, but no process accepts the connection
        for address in sorted(set(unreachable)):
            # Once the queue of connections to accept is full, Linux silently drops further ones.
            at = listen(address, 0)
            for _ in range(3):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(at)
        bad = refusing + unreachable + mute
        order = np.random.default_rng(0).permutation(len(bad))
        yield [bad[i] for i in order]


# --- Time and memory of a command -------------------------------------------------------------------------------------


def measure(command: list[str], folder: Path, limit: float) -> Usage:
    """Runs a command to its end, then kills every process it left behind. Its output goes to `folder/log`."""
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS" and not k.lower().endswith("_proxy")}
    env |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(folder), "NO_ALBUMENTATIONS_UPDATE": "1"}
    meter = subprocess.Popen(
        [sys.executable, __file__, "meter", str(folder), *command], env=env, cwd=folder, start_new_session=True
    )
    peak, turn, deadline = 0, 0, time.monotonic() + limit
    # A process that ignores SIGCHLD (such as Ray's raylet, the parent of the workers) waits for no child, so the kernel
    # adds the CPU time of its descendants to no other process. For them, the last sampled value counts, unless they
    # became children of the meter, which does wait. Maps a pid to the descendant below such a process, and CPU seconds.
    seen: dict[int, tuple[int, float]] = {}
    try:
        while meter.poll() is None:
            parents = descendants(meter.pid)
            not_waiting = {pid for pid in set(parents.values()) if ignores_children(pid)}
            for pid in parents:
                head = pid
                while head in parents and parents[head] not in not_waiting:
                    head = parents[head]
                if head in parents and (seconds := cpu_seconds(pid)):
                    seen[pid] = head, seconds
            if turn % 5 == 0:  # less often, since the kernel sums up all pages of a process for it
                peak = max(peak, sum(map(proportional_size, parents)))
            turn += 1
            if time.monotonic() > deadline:
                sys.exit(f"still running after {limit:.0f} s: {' '.join(command)[:200]}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                meter.wait(SAMPLING_SECONDS)
    finally:
        end(meter.pid)
        meter.kill()
        meter.wait()
    if meter.returncode:
        output = (folder / "log").read_text(errors="replace")[-3000:]
        sys.exit(f"{' '.join(command)[:200]} failed:\n{output}")
    usage = json.loads((folder / "usage.json").read_text())
    reaped = {int(pid): cpu for pid, cpu in usage["cpu"].items()}
    lost = sum(seconds for pid, (head, seconds) in seen.items() if not {pid, head} & reaped.keys())
    return Usage(usage["seconds"], sum(reaped.values()) + lost, peak)


def meter(folder: Path, command: list[str]) -> int:
    """Runs in the process that `measure` starts, which adopts the command's orphans (a subreaper, see prctl(2)).

    Otherwise process 1 would adopt the daemons whose parents end before them, and their CPU time would be lost.
    """
    set_child_subreaper = 36  # prctl(2)
    if ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    started = time.perf_counter()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    cpu: dict[int, float] = {}
    """CPU seconds of each process that this one waited for, including the children that process waited for."""
    seconds, patience = 0.0, math.inf
    while True:
        try:
            pid, status, used = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid:
            cpu[pid] = used.ru_utime + used.ru_stime
        if pid == process.pid:
            seconds, patience = time.perf_counter() - started, time.monotonic() + 10
            process.returncode = os.waitstatus_to_exitcode(status)
        if not pid:
            if time.monotonic() > patience:
                end(os.getpid())
            time.sleep(0.02)
    (folder / "usage.json").write_text(json.dumps({"seconds": seconds, "cpu": cpu}))
    return int(process.returncode)


def descendants(root: int) -> dict[int, int]:
    """Returns the children of `root`, their children and so on, each with its parent."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    parents = {pid: int(fields[1]) for pid in pids if (fields := stat(pid))}
    below: dict[int, int] = {}
    latest = {root}
    while latest:
        latest = {pid for pid, parent in parents.items() if parent in latest}
        below |= {pid: parents[pid] for pid in latest}
    return below


def stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat (proc(5)) from the third on, or none if the process is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time of a process without its children."""
    return sum(map(int, stat(pid)[11:13])) / os.sysconf("SC_CLK_TCK")


def ignores_children(pid: int) -> bool:
    """Tells whether a process ignores SIGCHLD."""
    with contextlib.suppress(OSError):
        ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        return bool(ignored and int(ignored[1], 16) >> (signal.SIGCHLD - 1) & 1)
    return False


def end(root: int) -> None:
    for pid in descendants(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def proportional_size(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


# --- Pictures in the shards -------------------------------------------------------------------------------------------


def count_images(path: Path) -> int:
    with tarfile.open(path) as tar:
        return sum(member.name.endswith(".jpg") for member in tar)


def psnr(tars: list[Path], pictures: Path, names: set[str]) -> np.ndarray:
    """Returns the PSNR in dB of one picture for each of at most PSNR_FILES of the files `names`."""
    decibels: dict[str, float] = {}
    chosen = set(sorted(names)[:PSNR_FILES])
    for path in tars:
        with tarfile.open(path) as tar:
            images: dict[str, bytes] = {}
            for member in tar:
                key, _, kind = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                if kind == "jpg":
                    images[key] = file.read()
                elif kind == "json":
                    image = images.pop(key)
                    name = json.loads(file.read())["url"].rpartition("/")[2].partition("?")[0]
                    if name in chosen and name not in decibels:
                        pixels = opencv_pixels(image)
                        error = reference(pictures / name, pixels.shape[1], pixels.shape[0]).astype(np.float32) - pixels
                        decibels[name] = 10 * math.log10(255**2 / max(float(np.mean(error**2)), 1e-9))
    return np.array(list(decibels.values()))


@functools.cache
def reference(path: Path, width: int, height: int) -> np.ndarray:
    return cv2.resize(opencv_pixels(path.read_bytes()), (width, height), interpolation=cv2.INTER_AREA)


def opencv_pixels(body: bytes) -> np.ndarray:
    """Decodes a picture at full size to (height, width, 3) uint8 in BGR order."""
    pixels = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None
    return pixels


# --- The floor --------------------------------------------------------------------------------------------------------


def floor(job: Path, workers: int) -> None:
    urls = read_urls(job / "rows.parquet")
    (job / "out").mkdir()
    fork = multiprocessing.get_context("fork")
    parts = [
        fork.Process(target=floor_part, args=(urls[i::workers], job / "out" / f"{i:05d}.tar")) for i in range(workers)
    ]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    if any(part.exitcode for part in parts):
        sys.exit("a process of `floor` failed")


def floor_part(urls: list[str], path: Path) -> None:
    cv2.setNumThreads(1)
    with open(path, "wb") as tar:
        for number, (url, body) in enumerate(zip(urls, bodies(urls))):
            pixels = shrink(read_pixels(body))
            image = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
            sample = {"url": url, "sha256": hashlib.sha256(body).hexdigest()}
            for ending, data in (("jpg", image), ("json", json.dumps(sample).encode()), ("txt", url.encode())):
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(data)
                tar.write(member.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE))
        tar.write(bytes(2 * tarfile.BLOCKSIZE))


def bodies(urls: list[str]) -> Iterator[bytes]:
    """Yields the bodies in the order of `urls`. Up to four requests are under way while a picture is decoded."""
    connections: dict[str, tuple[socket.socket, object]] = {}
    waiting: deque = deque()

    def answer() -> bytes:
        stream = waiting.popleft()
        if b" 200 " not in stream.readline():
            sys.exit("`floor` handles no status other than 200")
        length = 0
        while (line := stream.readline()) != b"\r\n":
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return stream.read(length)

    for url in urls:
        host, _, path = url.removeprefix("http://").partition("/")
        if host not in connections:
            address, port = host.split(":")
            connection = socket.create_connection((address, int(port)), 30)
            connections[host] = connection, connection.makefile("rb")
        connection, stream = connections[host]
        connection.sendall(f"GET /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        waiting.append(stream)
        if len(waiting) == 4:
            yield answer()
    while waiting:
        yield answer()


def read_pixels(body: bytes) -> np.ndarray:
    """Decodes to (height, width, 3) uint8 in BGR order.

    A JPEG is decoded at the smallest of the scales 1/8, 1/4, 1/2 and 1 at which its longer side is COVER times the
    target or more. (libjpeg-turbo has no SIMD code for 5/8 to 7/8, which take longer than full size.)
    """
    if not body.startswith(b"\xff\xd8"):
        return opencv_pixels(body)
    height, width = simplejpeg.decode_jpeg_header(body, strict=False)[:2]
    factor = next((f for f in (8, 4, 2) if max(height, width) >= COVER * TARGET * f), 0)
    least = (math.ceil(height / factor), math.ceil(width / factor)) if factor else (0, 0)
    return simplejpeg.decode_jpeg(body, "BGR", min_height=least[0], min_width=least[1], strict=False)


def shrink(pixels: np.ndarray) -> np.ndarray:
    """Shrinks to the target size: to twice that linearly, then by averaging 2 by 2 pixels.

    OpenCV has SIMD code for both, but not for other ratios of INTER_AREA, which takes three times as long and gives
    nearly the same result (50 dB).
    """
    height, width = pixels.shape[:2]
    scale = TARGET / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    while min(pixels.shape[1] / size[0], pixels.shape[0] / size[1]) >= 4:
        pixels = cv2.resize(pixels, (pixels.shape[1] // 2, pixels.shape[0] // 2), interpolation=cv2.INTER_AREA)
    pixels = cv2.resize(pixels, (2 * size[0], 2 * size[1]), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["meter", folder, *command]:
            sys.exit(meter(Path(folder), command))
        case ["floor", job, workers]:
            floor(Path(job), int(workers))
        case _:
            main()
