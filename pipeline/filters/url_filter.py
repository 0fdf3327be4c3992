from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.step import FILE, Estimate, Filter
from pipeline.text.url import InvalidUrlError, host_name, listed_domain

# A URL by RFC 3986. The second branch captures the scheme of URLs such as "data:…". A backslash before the path is
# invalid, because browsers and libraries disagree on the host.
_URL = (
    r"^(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*):"
    r"(?://(?:[^/?#\\]*@)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^/?#@:\\\[\]]+)(?::(?P<port>[0-9]{0,5}))?"
    r"(?P<path>/[^?#]*)?(?:[?#].*)?|.*)$"
)
_CONTROL = r"[\x00-\x1f\x7f]"
# Laxer than RFC 1123, like real hosts: allows underscores, and hyphens at the end of a label.
_HOST = r"^(?:\[.*\]|[a-z0-9_\-]{1,63}(?:\.[a-z0-9_\-]{1,63})*)$"
_MAX_HOST = 253  # RFC 1035, without the trailing dot


@dataclass(kw_only=True)
class UrlFilter(Filter):
    """Drops rows by URL. Reasons: `bad_url`, `scheme`, `blocked_host`, `not_allowed_host`, `extension`, `too_long`.

    A listed host includes its subdomains: `example.org` covers `img.example.org`, but not `badexample.org`. Hosts may
    be in any case, in Unicode or Punycode. A host on both lists is blocked. This step does not check the host's
    address; the fetcher does, for every request and redirect.
    """

    schemes: list[str] = field(default_factory=lambda: ["http", "https"])
    """Schemes to keep."""
    block_hosts: list[str] | str = field(default_factory=list, metadata=FILE)
    """Hosts to drop: a list, or the path of a file with one host per line (`#` starts a comment)."""
    allow_hosts: list[str] | str = field(default_factory=list, metadata=FILE)
    """If given, the only hosts to keep: a list or a file, as above."""
    # Formats that are not photographs. `php` and `html` are not listed: pictures are often served under such names.
    block_extensions: list[str] = field(default_factory=lambda: ["svg", "svgz", "ico", "pdf", "swf", "mp4", "webm"])
    """File name extensions to drop, without the dot, in any case."""
    max_length: int = 2000
    """Maximum number of characters. Longer URLs are mostly inlined data or session state, and many servers refuse
    them."""

    needs = ("url",)
    version = 2

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.99, 500_000, "keep assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.schemes:
            yield "schemes", "is empty, which drops every row; expected [http, https]"
        for extension in self.block_extensions:
            if extension.startswith("."):
                yield "block_extensions", f"{extension!r} has a dot; expected {extension.lstrip('.')!r}"
        if self.max_length < 1:
            yield "max_length", f"{self.max_length} drops every row; expected at least 1 character"
        for key in ("block_hosts", "allow_hosts"):
            try:
                entries = list(_entries(getattr(self, key)))
            except Exception as e:  # object stores raise their own exceptions
                yield key, f"cannot read the list of hosts {getattr(self, key)!r}: {e}"
                continue
            wrong = [entry for entry in entries if not _is_host(_canonical(entry))]
            if wrong:
                where = f"{getattr(self, key)}: " if isinstance(getattr(self, key), str) else ""
                expected = "expected one like 'example.org', without scheme or path"
                yield key, f"{where}{wrong[0]!r} is not a host name; {expected}"
            if not entries and isinstance(getattr(self, key), str):
                yield key, f"{getattr(self, key)!r} lists no host"

    def fingerprint(self) -> object:
        return [sorted(_entries(hosts)) for hosts in (self.block_hosts, self.allow_hosts) if isinstance(hosts, str)]

    def setup(self) -> None:
        self._blocked = {_canonical(entry) for entry in _entries(self.block_hosts)}
        self._allowed = {_canonical(entry) for entry in _entries(self.allow_hosts)}

    def judge(self, batch: pa.Table) -> pa.StringArray:
        url = pc.utf8_trim_whitespace(pc.fill_null(batch["url"], "")).combine_chunks()
        part = pc.extract_regex(url, _URL)
        scheme, host, port, path = (
            pc.fill_null(pc.struct_field(part, name), "") for name in ("scheme", "host", "port", "path")
        )
        hosts = host.dictionary_encode()
        canonical = [_canonical(name) for name in hosts.dictionary.to_pylist()]

        def of_host(verdicts: list[bool]) -> pa.BooleanArray:
            return pa.array(verdicts, pa.bool_()).take(hosts.indices)

        not_allowed = [bool(self._allowed) and not listed_domain(name, self._allowed) for name in canonical]
        bad_port = pc.greater(pc.if_else(pc.equal(port, ""), "0", port).cast(pa.int32()), 65535)
        bad_host = pc.or_(of_host([not _is_host(name) for name in canonical]), bad_port)
        wanted_scheme = pc.is_in(pc.utf8_lower(scheme), pa.array([s.lower() for s in self.schemes], pa.string()))
        endings = pa.array([e.lower() for e in self.block_extensions], pa.string())
        ending = pc.utf8_lower(pc.struct_field(pc.extract_regex(path, r"\.(?P<ending>[^./]+)$"), "ending"))
        # The first verdict that holds is the reason.
        verdicts = [
            ("bad_url", pc.or_(pc.equal(scheme, ""), pc.match_substring_regex(url, _CONTROL))),
            ("scheme", pc.invert(wanted_scheme)),
            ("bad_url", bad_host),
            ("blocked_host", of_host([bool(listed_domain(name, self._blocked)) for name in canonical])),
            ("not_allowed_host", of_host(not_allowed)),
            ("extension", pc.is_in(ending, endings)),
            ("too_long", pc.greater(pc.utf8_length(url), self.max_length)),
        ]
        return pc.case_when(pc.make_struct(*(holds for _, holds in verdicts)), *(pa.scalar(r) for r, _ in verdicts))

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        url = pc.utf8_trim_whitespace(pc.fill_null(dropped["url"], ""))
        host = pc.struct_field(pc.extract_regex(url, _URL), "host")
        return pc.if_else(pc.equal(host, ""), pa.scalar(None, pa.string()), host)


def _entries(hosts: list[str] | str) -> Iterable[str]:
    if not isinstance(hosts, str):
        return hosts
    with fsspec.open(hosts, "rt", encoding="utf-8") as lines:
        entries = [line.partition("#")[0].strip() for line in lines]
    return [entry for entry in entries if entry]


def _canonical(host: str) -> str:
    """The host as the fetcher requests it, without a trailing dot; "" if it is not a host name."""
    if len(host) > 4 * _MAX_HOST:  # with escapes
        return ""
    try:
        return host_name(host).removesuffix(".")
    except InvalidUrlError:
        return ""


def _is_host(host: str) -> bool:
    return len(host) <= _MAX_HOST and re.match(_HOST, host) is not None
