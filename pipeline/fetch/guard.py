"""Restricts connections to public unicast addresses, whatever name or notation they come from.

Checks the address that the socket is about to connect to, on every hop. Redirects, names that resolve to private
addresses, and names that change between check and use (DNS rebinding) cannot bypass it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from yarl import URL

from pipeline.fetch.reasons import FetchError
from pipeline.text.url import InvalidUrlError, WebAddress, web_address

MAX_URL = 8000
"""Longest url, in characters. Apache and nginx reject request lines over 8 KB."""

# IANA IPv4 Special-Purpose Address Registry, plus multicast and reserved space. `ipaddress.is_global` is not enough: it
# accepts 192.0.0.8 and 224.0.0.1.
_DENIED_V4 = [
    ipaddress.IPv4Network(net)
    for net in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's WireServer: a public address reachable only from inside a virtual machine
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
]
# All public unicast IPv6 addresses are in 2000::/3 (RFC 4291 and IANA's allocations). This excludes mapped, compatible,
# NAT64, unique-local, site-local, link-local and multicast addresses.
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_DENIED_V6 = [
    ipaddress.IPv6Network(net)
    for net in (
        "2001::/23",  # Teredo (2001::/32), benchmarking, ORCHID
        "2001:db8::/32",
        "2002::/16",  # 6to4: embeds an IPv4 address, possibly a private one
        "3fff::/20",
    )
]
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)  # RFC 5214: the interface identifier of an embedded IPv4 address

# Ports that browsers block because they belong to other protocols (WHATWG Fetch, "bad port").
_BAD_PORTS = frozenset(
    [0, 1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104, 109]
    + [110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515, 526, 530]
    + [531, 532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049, 3659, 4045, 4190]
    + [5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080]
)


def is_public(address: str) -> bool:
    """True for a numeric public unicast IPv4 or IPv6 address; False for anything else, including scope ids."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in net for net in _DENIED_V4)
    if ip.scope_id is not None or ip not in _GLOBAL_V6 or any(ip in net for net in _DENIED_V6):
        return False
    return (int(ip) >> 32) & 0xFFFF_FFFF not in _ISATAP


class Guard:
    """Checks addresses and ports. `allow_addrs` ("127.0.0.1:8765", "[::1]:80") exempts exactly those pairs."""

    def __init__(self, allow_addrs: Iterable[str] = ()):
        self._allowed = {parse_addr(text) for text in allow_addrs}

    def check(self, address: str, port: int) -> None:
        """Raises FetchError("addr_denied") unless this address may be dialled on this port."""
        if self._allowed and (_canonical(address), port) in self._allowed:
            return
        if not is_public(address):
            raise FetchError("addr_denied", f"{address} is not a public unicast address")
        if port in _BAD_PORTS:
            raise FetchError("addr_denied", f"port {port} belongs to another protocol")


def parse_addr(text: str) -> tuple[str, int]:
    """Parses `"ip:port"` or `"[ip]:port"` into (canonical ip, port). Raises ValueError."""
    host, _, port = text.rpartition(":")
    try:
        if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if ":" in bare and bare == host:
            raise ValueError
        return str(ipaddress.ip_address(bare)), int(port)
    except ValueError:
        raise ValueError(f'{text!r} is not an address and port like "127.0.0.1:8765" or "[::1]:8765"') from None


def _canonical(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return address


# Lone surrogates.
_BROKEN = re.compile("[\ud800-\udfff]")


def parse_url(text: str | None, base: URL | None = None) -> URL:
    """The http(s) URL that a browser would request for `text` (relative to `base` for a redirect), without fragment.

    `raw_path_qs` of the result is the request target; see `pipeline.text.url.web_address`. Raises FetchError with
    `bad_url` or `bad_scheme`. Does not check the host's address; see `Guard`.
    """
    text = text or ""
    if not text.strip():
        raise FetchError("bad_url", "empty")
    if len(text) > MAX_URL:
        raise FetchError("bad_url", f"{len(text)} characters, limit {MAX_URL}")
    if _BROKEN.search(text):
        raise FetchError("bad_url", "invalid Unicode")
    try:
        address = web_address(text, _address_of(base) if base else None)
    except InvalidUrlError as error:
        detail = str(error)
        # `example.com:80/a.jpg` parses as the scheme "example.com".
        raise FetchError("bad_scheme" if "scheme" in detail.split() else "bad_url", detail) from None
    if address.user.strip(":"):
        # Credentials in an image url are a leak or a spoof (http://good.example@evil.example/).
        raise FetchError("bad_url", "contains a user name")
    if address.port == 0:
        raise FetchError("bad_url", "port 0")
    if len(address.target) > MAX_URL:
        raise FetchError("bad_url", f"{len(address.target)} characters when escaped, limit {MAX_URL}")
    # Pass the query as part of the path: yarl drops the "?" of an empty query.
    return URL.build(scheme=address.scheme, authority=address.authority, path=address.target, encoded=True)


def _address_of(url: URL) -> WebAddress:
    return WebAddress(url.scheme, "", url.host_subcomponent or "", url.explicit_port, url.raw_path_qs)
