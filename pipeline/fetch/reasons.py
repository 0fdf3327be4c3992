"""Why a row has no image: the closed list, the same words in the table, the ledger and the report."""

from __future__ import annotations

import re
from typing import NamedTuple


class Reason(NamedTuple):
    meaning: str
    transient: bool
    """True where asking again, in a moment or in another run, may well succeed."""


REASONS: dict[str, Reason] = {
    # The address
    "bad_url": Reason("the url is missing, malformed, longer than 8,000 characters, or has a user name", False),
    "bad_scheme": Reason("the url, or a redirect, is neither http nor https", False),
    "addr_denied": Reason("the host is not a public unicast address, or the port belongs to another protocol", False),
    "dns": Reason("the host name does not exist", False),
    "dns_unavailable": Reason("the resolver did not answer for the host name", True),
    # The connection
    "connect": Reason("the host refused the connection, or did not answer it", True),
    "unreachable": Reason("no route to host", True),
    "reset": Reason("the server closed the connection before its response began", True),
    "tls": Reason("the TLS handshake failed or the certificate is not valid for the host", False),
    "deadline": Reason("not finished within `timeout` seconds, redirects and retries included", True),
    "too_slow": Reason("the body came in slower than the minimum rate", True),
    "host_down": Reason("skipped: the host failed `host_failures` times in a row", True),
    "host_busy": Reason("skipped: the row waited `host_wait` seconds for its turn at the host", True),
    # The publisher
    "robots_disallowed": Reason("the host's robots.txt forbids the path to us", False),
    "robots_unavailable": Reason("skipped: the host's robots.txt could not be fetched, which counts as a no", True),
    "opted_out": Reason("X-Robots-Tag, Content-Usage or TDMRep asks for this image not to be used", False),
    # The answer
    "bad_response": Reason("the response is not HTTP, or can be read in two ways", False),
    "redirect_loop": Reason("a redirect led back to a url already visited", False),
    "too_many_redirects": Reason("more than 5 redirects", False),
    "content_encoding": Reason("the body is compressed in transit although we asked for it uncompressed", False),
    "body_truncated": Reason("the connection ended before the announced end of the body", True),
    "body_too_large": Reason("the body is larger than `max_bytes`", False),
    "empty_body": Reason("status 200 and no body", False),
    "hash_mismatch": Reason("the body is not the one that `verify_hash` expects", False),
    "denied_hash": Reason("the body is on the list of `deny_hashes`", False),
    # The image
    "not_an_image": Reason("the first bytes are not those of a JPEG, PNG, WebP, GIF or AVIF", False),
    "decode_error": Reason("an image by its first bytes, but broken", False),
    "too_small": Reason("the shorter side is under `min_image_size`", False),
    "too_large": Reason("more pixels than `max_image_area`, or would be after resizing", False),
    "aspect_ratio": Reason("longer side / shorter side is over `max_aspect_ratio`", False),
    "decoder_crash": Reason("the decoder's process died on this image", False),
    "decoder_timeout": Reason("the decoder was not done with this image within its time", False),
    "decoder_memory": Reason("the decoder needed more memory for this image than it may have", False),
    # Ourselves
    "unexpected": Reason("a fault of the fetcher itself, named in the detail", False),
}

_HTTP = re.compile(r"http_(\d{3})")
_TRANSIENT_STATUS = frozenset({408, 425, 429})


def find(reason: str) -> Reason:
    """The entry for a reason; `http_NNN` stands for every status other than 200 and the followed redirects.

    Raises KeyError for a word that is not on the list.
    """
    if match := _HTTP.fullmatch(reason):
        status = int(match[1])
        return Reason(f"the server answered with status {status}", status in _TRANSIENT_STATUS or 500 <= status <= 599)
    return REASONS[reason]


class FetchError(Exception):
    """One row's end without an image. `detail` is one line for people, cleaned of what the web put into it."""

    def __init__(self, reason: str, detail: str = "", *, retry_after: float | None = None):
        """`retry_after`: seconds that the server asked us to wait, if it did."""
        self.reason = reason
        self.transient = find(reason).transient
        self.detail = one_line(detail)
        self.retry_after = retry_after
        super().__init__(f"{reason}: {self.detail}")

    def __reduce__(self) -> tuple[type[FetchError], tuple[str, str]]:
        # Failures cross process borders when decoding runs in another process.
        return FetchError, (self.reason, self.detail)


def one_line(text: str, limit: int = 200) -> str:
    """Printable, valid UTF-8, at most `limit` characters: hostile text must not break a table, a log or a terminal."""
    clean = "".join(c if c.isprintable() else " " for c in text[: 2 * limit])
    return " ".join(clean.split())[:limit]
