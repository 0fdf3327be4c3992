"""Addresses and urls that must never be dialled, in every notation."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from pipeline.fetch.client import Client, Limits
from pipeline.fetch.guard import Guard, is_public, parse_addr, parse_url
from pipeline.fetch.reasons import REASONS, FetchError, find, one_line
from tests.fetch.fetched import body_or_failure
from tests.fetch.server import JPEG, Answer, Server, answer, redirect, serving

Lookup = Callable[[str], list[str]]

DENIED = """
0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.255.255.254
168.63.129.16 169.254.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.8 192.0.0.192 192.0.2.1
192.88.99.1 192.168.0.1 192.168.255.255 198.18.0.1 198.19.255.255 198.51.100.7 203.0.113.9 224.0.0.1 239.255.255.255
240.0.0.1 255.255.255.255
:: ::1 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b::808:808
64:ff9b:1::1 100::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:2::1 2001:10::1 2001:20::1 2001:db8::1
2002:7f00:1:: 2002:808:808::1 3fff::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 feff::1 ff02::1 ff0e::1
4000::1 2600::5efe:7f00:1 2600::200:5efe:a00:1
localhost example.com 127.1 2130706433 0x7f000001 0177.0.0.1 8.8.8.8%eth0
"""

PUBLIC = """
1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.1 93.184.216.34 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.1
168.63.129.15 172.15.255.255 172.32.0.0 192.0.1.1 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0
223.255.255.255 2001:200::1 2001:4860:4860::8888 2606:4700:4700::1111 2a00:1450:4001:81b::200e 2003::1 2600::1 3ffe::1
"""


def test_the_lists_are_not_empty() -> None:
    assert len(set(DENIED.split())) >= 40
    assert len(set(PUBLIC.split())) >= 20
    assert len(set(DENIED_URL) | set(REDIRECTS)) >= 60
    assert len(set(BAD_SCHEME)) >= 15


@pytest.mark.parametrize("address", DENIED.split())
def test_denied(address: str) -> None:
    assert not is_public(address)
    with pytest.raises(FetchError, match="addr_denied"):
        Guard().check(address, 80)


@pytest.mark.parametrize("address", PUBLIC.split())
def test_public(address: str) -> None:
    assert is_public(address)
    Guard().check(address, 80)
    Guard().check(address, 8080)


@pytest.mark.parametrize("port", [0, 22, 25, 110, 143, 587, 6667])
def test_ports_of_other_protocols_are_denied(port: int) -> None:
    with pytest.raises(FetchError, match="addr_denied"):
        Guard().check("8.8.8.8", port)


def test_allow_addrs_opens_exactly_one_address_and_port() -> None:
    guard = Guard(["127.0.0.1:8765", "[::1]:25"])
    guard.check("127.0.0.1", 8765)
    guard.check("::1", 25)
    guard.check("0:0:0:0:0:0:0:1", 25)
    for address, port in [("127.0.0.1", 8766), ("127.0.0.2", 8765), ("::1", 8765), ("::ffff:127.0.0.1", 8765)]:
        with pytest.raises(FetchError, match="addr_denied"):
            guard.check(address, port)


@pytest.mark.parametrize(
    "text",
    ["", "127.0.0.1", "localhost:80", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:8²", "::1:80", "[::1]",
     "127.0.0.0/8:80", "*:80", "127.0.0.1:-1"],
)  # fmt: skip
def test_allow_addrs_must_be_an_address_and_a_port(text: str) -> None:
    with pytest.raises(ValueError, match="is not an address and port like"):
        parse_addr(text)


BAD_URL = [
    None, "", "   ", "http://", "http:///", "http://:80/", "http://user@8.8.8.8/", "http://user:pw@8.8.8.8/",
    "http://8.8.8.8@127.0.0.1/", "http://good.example:80@127.0.0.1/", "http://good.example%40@127.0.0.1/",
    "http://127.0.0.1:99999/", "http://127.0.0.1:-1/", "http://127.0.0.1:port/", "http://8.8.8.8:0/",
    "http://exa mple.com/", "http://exa\x01mple.com/", "http://example.com\r\n Host: inside/",
    "http://[::1/", "http://::1/", "http://[zz]/", "http://1.2.3.4.5/", "http://256.0.0.1/", "http://09.0.0.1/",
    "http://[fe80::1%25eth0]/", "http://a..b/", "http://" + "a" * 64 + ".com/", "http://" + "a.b" * 90 + "/",
    "http://<script>/", "http://ex%2Fmple.com/", "http://127.0.0.1%00.example.com/", "http://\ud800.com/",
    "http://example.com/" + "a" * 9000, "http://example.com/" + "ä" * 3000, "http://*/", "http://$(id)/", "http://a,b/",
]  # fmt: skip
BAD_SCHEME = [
    "file:///etc/passwd", "FILE:///etc/passwd", "data:image/png;base64,AAAA", "gopher://127.0.0.1:6379/_INFO",
    "ftp://example.com/a.jpg", "ftps://example.com/a.jpg", "javascript:alert(1)", "dict://127.0.0.1:11211/stats",
    "ldap://127.0.0.1/", "jar:http://127.0.0.1!/a", "s3://bucket/a.jpg", "blob:http://127.0.0.1/x", "ws://127.0.0.1/",
    "view-source:http://127.0.0.1/", "about:blank", "//127.0.0.1/a.jpg", "/etc/passwd", "a.jpg",
    "www.example.com/a.jpg", "example.com:80/a.jpg", "unix:/run/docker.sock",
]  # fmt: skip
# {port} is the canary's: without the guard, these would reach it or its neighbours.
DENIED_URL = [
    "http://127.0.0.1:{port}/", "http://127.1:{port}/", "http://127.0.1:{port}/", "http://2130706433:{port}/",
    "http://0x7f000001:{port}/", "http://0x7f.0.0.1:{port}/", "http://0177.0.0.1:{port}/",
    "http://017700000001:{port}/", "http://0x7f.1:{port}/", "http://127.0.0.1.:{port}/", "http://0:{port}/",
    "http://0.0.0.0:{port}/", "http://localhost:{port}/", "http://LOCALHOST:{port}/", "http://localhost.:{port}/",
    "http://１２７.0.0.1:{port}/", "http://１２７．０．０．１:{port}/", "http://127。0。0。1:{port}/",
    "http://①②⑦.0.0.1:{port}/", "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:{port}/", "http://[::1]:{port}/", "http://[0:0:0:0:0:0:0:1]:{port}/",
    "http://[::]:{port}/", "http://[::ffff:127.0.0.1]:{port}/", "http://[::ffff:7f00:1]:{port}/",
    "http://[::127.0.0.1]:{port}/", "http://[64:ff9b::127.0.0.1]:{port}/", "http://[64:ff9b::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/", "http://[2001:0:4136:e378:8000:63bf:80ff:fffe]:{port}/",
    "http://[fec0::1]:{port}/", "http://[fe80::1]:{port}/", "http://[fd00:ec2::254]:{port}/",
    "http://[ff02::1]:{port}/", "http://169.254.169.254/latest/meta-data/", "http://[::ffff:a9fe:a9fe]/",
    "http://100.100.100.200/", "http://192.0.0.192/", "http://168.63.129.16/", "http://10.0.0.1/", "http://172.16.0.1/",
    "http://192.168.1.1/", "http://255.255.255.255/", "http://224.0.0.1/", "https://127.0.0.1:{port}/",
    "HTTP://127.0.0.1:{port}/", " http://127.0.0.1:{port}/ ", "http://127.0.0.1:{port}/#@8.8.8.8/",
    "http://127.0.0.1:{port}?@8.8.8.8/", "http://rebinding.example:{port}/", "http://mixed.example:{port}/",
    "http://sixtofour.example:{port}/", "http://mapped.example:{port}/", "http://teredo.example:{port}/",
    "http://nat64.example:{port}/", "http://0x7f.0x0.0x0.0x1:{port}/", "http://127.0.0.0x1:{port}/",
    "http://0177.0.0x0.1:{port}/", "http://００１７７.0.0.1:{port}/", "http://０ｘ７ｆ．１:{port}/",
    "http://２１３０７０６４３３:{port}/", "http://[::ffff:0:7f00:1]:{port}/", "http://[64:ff9b:1::7f00:1]:{port}/",
    "http://127.0.0.1\\.example.com:{port}/", "http:///127.0.0.1:{port}/", "http:127.0.0.1:{port}/",
    "http://%31%32%37.0.0.1:{port}/", "http://127.0.\t0.1:{port}/", "\x01http://127.0.0.1:{port}/\x00",
    "http://127.0.0.1:{port}\\@8.8.8.8/", "http://127.0.0.2:{open}/", "http://[::ffff:127.0.0.1]:{open}/", "http://[::1]:{open}/",
]  # fmt: skip
# Each is the Location of a redirect, some of them at the end of a chain.
REDIRECTS = [
    *(url for url in DENIED_URL if url.isprintable()), *BAD_SCHEME[:-6],
    "//127.0.0.1:{port}/", "//[::1]:{port}/", "\\\\127.0.0.1:{port}\\",
    "http:\\\\127.0.0.1:{port}/", "http://u:p@127.0.0.1:{port}/", "//u@127.0.0.1:{port}/", "https:127.0.0.1:{port}",
    "http:////127.0.0.1:{port}/", "/\\127.0.0.1:{port}/", "///127.0.0.1:{port}/",
]  # fmt: skip


@pytest.mark.parametrize(
    ("url", "reason"), [*((u, "bad_url") for u in BAD_URL), *((u, "bad_scheme") for u in BAD_SCHEME)]
)
def test_invalid_urls(url: str | None, reason: str) -> None:
    with pytest.raises(FetchError) as caught:
        parse_url(url)
    assert caught.value.reason == reason
    assert caught.value.detail == one_line(caught.value.detail)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("http://example.com/a.jpg#top", "http://example.com/a.jpg"),
        ("HTTPS://EXAMPLE.com./a b.jpg", "https://example.com./a%20b.jpg"),
        (" http://example.com:8080/ü.jpg?q=ä ", "http://example.com:8080/%C3%BC.jpg?q=%C3%A4"),
        ("http://müller.example/", "http://xn--mller-kva.example/"),
        ("http://my_site.example/a%2Fb.jpg", "http://my_site.example/a%2Fb.jpg"),
        ("http://[2606:4700:0::1111]:80/a", "http://[2606:4700::1111]/a"),
        ("http:\\\\example.com\\@127.0.0.1/", "http://example.com/@127.0.0.1/"),
        ("http://example.com/\r\nHost: inside", "http://example.com/Host:%20inside"),
        ("http://:@example.com:0080?", "http://example.com/?"),
        ("http://" + "example.com" + "/" + "a" * 7000, "http://example.com/" + "a" * 7000),
    ],
)
def test_valid_urls(text: str, meant: str) -> None:
    assert str(parse_url(text)) == meant


@pytest.mark.parametrize(
    ("location", "meant"),
    [("b.jpg", "http://h.example/x/b.jpg"), ("/b", "http://h.example/b"), ("//o.example/b", "http://o.example/b")]
    + [("?q", "http://h.example/x/a?q"), ("https://o.example:444/", "https://o.example:444/")],
)
def test_redirects_are_relative_to_the_previous_url(location: str, meant: str) -> None:
    assert str(parse_url(location, base=parse_url("http://h.example/x/a"))) == meant


NAMES = {
    "rebinding.example": ["127.0.0.1"],
    "mixed.example": ["10.0.0.1", "::1"],
    "sixtofour.example": ["2002:7f00:1::"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "teredo.example": ["2001:0:4136:e378:8000:63bf:80ff:fffe"],
    "nat64.example": ["64:ff9b::7f00:1"],
}


def resolve(host: str) -> list[str]:
    if host in NAMES:
        return NAMES[host]
    # Let the system parse numeric addresses in any notation; never resolve names over the network.
    flags = 0 if "localhost" in host else socket.AI_NUMERICHOST
    return [str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=flags)]


def ends(urls: list[str], addr: str, lookup: Lookup = resolve) -> list[str]:
    """The reason of each url, or `fetched`. The allow list contains `addr`, the canary's neighbour, as in a run."""

    async def all_of_them() -> list[bytes | FetchError]:
        async with Client(Limits(timeout=3, retries=0, per_host=100, allow_addrs=(addr,)), lookup) as client:
            return await asyncio.gather(*(body_or_failure(client, url) for url in urls))

    return [r.reason if isinstance(r, FetchError) else "fetched" for r in asyncio.run(all_of_them())]


def test_no_notation_reaches_the_canary() -> None:
    with serving({"": answer(body=JPEG)}) as server:
        urls = [url.format(port=server.canary, open=server.port) for url in DENIED_URL]
        reasons = ends(urls, server.addr)
        # Legacy notations are refused as malformed or, if resolved, for their address.
        assert {url: r for url, r in zip(urls, reasons) if r not in ("addr_denied", "bad_url", "dns")} == {}
        assert reasons.count("addr_denied") >= 40
        assert server.canary_hits == 0
        assert not server.hits


def test_no_redirect_reaches_the_canary() -> None:
    def location(url: str, server: Server) -> bytes:
        return url.strip().replace("{port}", str(server.canary)).replace("{open}", str(server.port)).encode()

    def moved(url: str) -> Answer:
        async def reply(server: Server, writer: asyncio.StreamWriter, _: dict[str, str]) -> None:
            writer.write(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location(url, server) + b"\r\n\r\n")

        return reply

    answers = {f"to{n}": moved(url) for n, url in enumerate(REDIRECTS)}
    chains = {f"chain{n}": redirect(f"/to{n}", "308 Permanent Redirect") for n in range(len(REDIRECTS))}
    with serving(answers | chains) as server:
        names = [*answers, *chains]
        found = dict(zip(names, ends([f"{server.url}/{name}" for name in names], server.addr)))
        # A path that looks like an address stays on the same host, which has no such file.
        refusals = {"addr_denied", "bad_url", "bad_scheme", "dns", "http_404"}
        wrong = {name: (REDIRECTS[int(name.strip("tochain"))], r) for name, r in found.items() if r not in refusals}
        assert wrong == {}
        assert server.canary_hits == 0


def test_each_address_of_a_changing_name_is_checked() -> None:
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["::1"], ["10.0.0.1"]])
    with serving({"a": redirect("http://two.example:{server.port}/b"), "b": answer(body=JPEG)}) as server:
        urls = [f"http://{name}.example:{server.port}/b" for name in ("one", "two", "three", "four")]
        found = [end for url in urls for end in ends([url], server.addr, lambda host: next(answers))]
        assert found == ["fetched", "addr_denied", "addr_denied", "addr_denied"]
        assert server.canary_hits == 0


def test_reasons_are_a_closed_list() -> None:
    assert find("http_404").transient is False
    assert find("http_503").transient is True
    assert find("http_429").transient is True
    assert "999" in find("http_999").meaning
    assert all(reason.meaning for reason in REASONS.values())
    with pytest.raises(KeyError):
        FetchError("no_such_reason")


def test_details_are_one_printable_line() -> None:
    assert one_line("a\r\n\x1b[31mb\ud800 c" + "x" * 500) == ("a [31mb c" + "x" * 500)[:200]
