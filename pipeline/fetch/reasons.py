"""The closed list of reasons why a row has no image. Tables, the ledger and the report use the same words."""

from __future__ import annotations

import re
from typing import NamedTuple


class Reason(NamedTuple):
    meaning: str
    transient: bool
    """True if a retry, soon or in another run, may succeed."""


REASONS: dict[str, Reason] = {
    # The address
    "bad_url": Reason("the url is missing, malformed, longer than 8,000 characters, or has a user name", False),
    "bad_scheme": Reason("the url, or a redirect, is neither http nor https", False),
    "addr_denied": Reason("the host is not a public unicast address, or the port belongs to another protocol", False),
    "dns": Reason("the host name does not exist", False),
    "dns_unavailable": Reason("the resolver did not answer for the host name", True),
    # The connection
    "connect": Reason("the host refused the connection or did not respond", True),
    "unreachable": Reason("no route to host", True),
    "reset": Reason("the server closed the connection before its response began", True),
    "tls": Reason("the TLS handshake failed or the certificate is not valid for the host", False),
    "deadline": Reason("not finished within `timeout` seconds, including redirects and retries", True),
    "too_slow": Reason("the body arrived slower than `min_rate`", True),
    "host_down": Reason("skipped: the host failed `host_failures` times in a row", True),
    "host_busy": Reason("skipped: the row waited more than `host_wait` seconds for its host", True),
    # The publisher
    "robots_disallowed": Reason("the host's robots.txt disallows the path for this crawler", False),
    "robots_unavailable": Reason("skipped: robots.txt could not be fetched, which counts as disallowed", True),
    "opted_out": Reason("X-Robots-Tag, Content-Usage or TDMRep opts out of this use", False),
    # The answer
    "bad_response": Reason("the response is not valid HTTP or is ambiguous", False),
    "redirect_loop": Reason("a redirect led back to a url already visited", False),
    "too_many_redirects": Reason("more than 5 redirects", False),
    "content_encoding": Reason("the body is compressed although we requested identity encoding", False),
    "body_truncated": Reason("the connection ended before the end of the body", True),
    "body_too_large": Reason("the body is larger than `max_bytes`", False),
    "empty_body": Reason("a successful answer with an empty body", False),
    "hash_mismatch": Reason("the hash of the body is not the one in `verify_hash`", False),
    "denied_hash": Reason("the hash of the body is listed in `deny_hashes`", False),
    # The image
    "not_an_image": Reason("the first bytes are not those of a JPEG, PNG, WebP, GIF or AVIF", False),
    "decode_error": Reason("the image is corrupt", False),
    "bad_box": Reason("a box to blur is not [x_min, y_min, x_max, y_max], from 0 to 1, in this order", False),
    "too_small": Reason("the shorter side is under `min_image_size`", False),
    "too_large": Reason("more pixels than `max_image_area`, before or after resizing", False),
    "aspect_ratio": Reason("longer side / shorter side is over `max_aspect_ratio`", False),
    "decoder_crash": Reason("the decoder process crashed on this image", False),
    "decoder_killed": Reason("the decoder process was killed externally three times (out of memory?)", True),
    "decoder_timeout": Reason("decoding exceeded its time limit", False),
    "decoder_memory": Reason("decoding exceeded its memory limit", False),
    # Ourselves
    "unexpected": Reason("internal error of the fetcher; see the detail", False),
}

_HTTP = re.compile(r"http_(\d{3})")
_TRANSIENT_STATUS = frozenset({408, 425, 429})


def find(reason: str) -> Reason:
    """The entry for a reason. `http_NNN` covers every status without the whole picture, except the followed redirects.

    Raises KeyError for an unknown reason.
    """
    if match := _HTTP.fullmatch(reason):
        status = int(match[1])
        return Reason(f"the server returned status {status}", status in _TRANSIENT_STATUS or 500 <= status <= 599)
    return REASONS[reason]


class FetchError(Exception):
    """The failure of one row. `detail` is one printable line, sanitised of what the web put into it."""

    def __init__(self, reason: str, detail: str = "", *, retry_after: float | None = None):
        """`retry_after`: seconds that the server asked us to wait, or None."""
        self.reason = reason
        self.transient = find(reason).transient
        self.detail = one_line(detail)
        self.retry_after = retry_after
        super().__init__(f"{reason}: {self.detail}")

    def __reduce__(self) -> tuple[type[FetchError], tuple[str, str]]:
        # Failures are pickled when decoding runs in another process.
        return FetchError, (self.reason, self.detail)


def one_line(text: str, limit: int = 200) -> str:
    """Printable, valid UTF-8 of at most `limit` characters. Hostile text must not break a table, log or terminal."""
    clean = "".join(c if c.isprintable() else " " for c in text[: 2 * limit])
    return " ".join(clean.split())[:limit]
