import http.client
import io
import socket
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.demo import web

PICTURES = 40


@pytest.fixture(scope="module")
def server():
    with web.open_port(0) as server:
        yield server


@pytest.fixture(scope="module")
def demo(tmp_path_factory, server):
    folder = tmp_path_factory.mktemp("web")
    web.build(folder, PICTURES, seed=0, port=server.server_port)
    with web.serving(server, folder):
        yield folder


@pytest.fixture(scope="module")
def urls(demo):
    """The urls of each kind."""
    found: dict[str, list[str]] = {}
    for row in pq.read_table(demo / "truth" / "truth.parquet").to_pylist():
        found.setdefault(row["kind"], []).append(row["url"])
    return found


class KeepRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None


def fetch(url, follow=True, timeout=60):
    handlers = [urllib.request.ProxyHandler({}), *([] if follow else [KeepRedirects()])]
    return urllib.request.build_opener(*handlers).open(url, timeout=timeout)


def status(url, follow=True):
    try:
        with fetch(url, follow) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def raw(url, limit=400_000, seconds=60):
    """Reads a socket until the server closes, for `limit` bytes, or for some `seconds`."""
    end = time.monotonic() + seconds
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=seconds) as connection:
        connection.sendall(f"GET {parts.path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        data = b""
        try:
            while len(data) < limit and (part := connection.recv(65536)):
                data += part
                connection.settimeout(max(0.01, end - time.monotonic()))
        except TimeoutError:
            pass
    return data


def image_at(url):
    with fetch(url) as answer:
        return Image.open(io.BytesIO(answer.read()))


def test_the_pool_does_not_reveal_the_truth(demo, urls):
    assert pq.read_schema(demo / "pool.parquet").names == ["url", "caption"]
    truth = pq.read_table(demo / "truth" / "truth.parquet")
    assert truth.select(["url", "caption"]).equals(pq.read_table(demo / "pool.parquet"))
    assert set(urls) == set(web.KINDS)
    assert len(urls["clean"]) == PICTURES
    assert len({(r["url"], r["caption"]) for r in truth.to_pylist()}) == len(truth)


def test_same_seed_same_files(demo, server, tmp_path):
    web.build(tmp_path, PICTURES, seed=0, port=server.server_port)
    files = sorted(file.relative_to(demo) for file in demo.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file())
    for file in files:
        assert (tmp_path / file).read_bytes() == (demo / file).read_bytes(), file


@pytest.mark.parametrize("kind", ["clean", "mismatched", "moved", "other_format", "other_bot", "near_copy"])
def test_pictures_arrive(urls, kind):
    for url in urls[kind][:4]:
        image = image_at(url)
        image.load()
        assert min(image.size) >= 64


@pytest.mark.parametrize(
    ("kind", "expected"), [("dead", 404), ("gone", 410), ("forbidden", 403), ("error", 500), ("loop", 301)]
)
def test_refusals(urls, kind, expected):
    assert {status(urls[kind][0], follow=False) for _ in range(3)} == {expected}


@pytest.mark.parametrize(("kind", "expected"), [("flaky", 503), ("throttled", 429)])
def test_second_try_succeeds(urls, kind, expected):
    url = urls[kind][0]
    with pytest.raises(urllib.error.HTTPError) as error:
        fetch(url)
    assert error.value.code == expected
    assert error.value.headers["Retry-After"] == "1"
    error.value.close()
    assert image_at(url).size


def test_sizes_that_should_be_dropped(urls):
    assert image_at(urls["tiny"][0]).size == (24, 24)
    width, height = image_at(urls["banner"][0]).size
    assert width / height == 8
    with pytest.raises(Image.DecompressionBombError):
        image_at(urls["pixel_bomb"][0])


@pytest.mark.parametrize("kind", ["html", "svg", "garbage", "empty"])
def test_other_content_has_status_200(urls, kind):
    with fetch(urls[kind][0]) as answer:
        assert answer.status == 200
        assert not answer.read().startswith((b"\xff\xd8", b"\x89PNG", b"GIF", b"RIFF"))


def test_broken_files(urls):
    with pytest.raises((OSError, SyntaxError)):
        image_at(urls["corrupt"][0]).load()
    with pytest.raises(http.client.IncompleteRead), fetch(urls["truncated"][0]) as answer:
        answer.read()
    with pytest.raises(OSError, match="truncated"):
        image_at(urls["wrong_length"][0]).load()


def test_broken_protocol(urls):
    assert len(raw(urls["long_header"][0])) > 200_000
    assert not raw(urls["not_http"][0]).startswith(b"HTTP/")
    with pytest.raises(ConnectionResetError):
        raw(urls["reset"][0])
    with fetch(urls["gzip_bomb"][0]) as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        assert int(answer.headers["Content-Length"]) < 100_000
    assert all(url.startswith("https://127.0.0.1:") for url in urls["no_tls"])


def test_slow_and_endless_bodies(urls):
    head, _, body = raw(urls["stalled"][0], seconds=5).partition(b"\r\n\r\n")
    assert b"200" in head
    assert len(body) < 10  # a byte a second
    assert len(raw(urls["endless"][0], limit=300_000)) >= 300_000


def test_opt_outs_and_forbidden_addresses(urls):
    with fetch(urls["opted_out"][0]) as answer:
        assert answer.headers["X-Robots-Tag"].startswith("no")
    with fetch(urls["other_bot"][0]) as answer:
        assert answer.headers["X-Robots-Tag"].startswith("otherbot:")
    with pytest.raises(urllib.error.HTTPError) as error:
        fetch(urls["bad_redirect"][0])
    error.value.close()
    assert all(not url.startswith(("http://127", "https://")) for url in urls["bad_url"])


def test_only_files_of_the_site_are_served(demo, urls):
    base = urls["clean"][0].rpartition("/")[0]
    for path in (
        "/answers.json",
        "/../pool.parquet",
        "/..%2ftruth%2ftruth.parquet",
        "/truth/truth.parquet",
        "/none.jpg",
    ):
        assert raw(f"{base}{path}").startswith(b"HTTP/1.1 404")


def test_another_port_is_used_if_one_is_taken():
    with web.open_port(0) as first, web.open_port(first.server_port) as second:
        assert second.server_port != first.server_port
