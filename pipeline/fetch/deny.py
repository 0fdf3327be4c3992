"""Lists of hashes of files that must never be kept, whatever their url: known abuse material, takedowns by content."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

_KINDS = {32: "md5", 40: "sha1", 64: "sha256"}


class DenyList:
    """The digests in a text file: one per line in hex, md5, sha1 or sha256 by length. `#` begins a comment.

    Compares bodies as fetched, byte for byte. Uses 16 to 32 bytes of memory per digest. Raises OSError, or ValueError
    that names file and line.
    """

    def __init__(self, path: str | Path):
        found: dict[str, set[bytes]] = {}
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                text = line.partition("#")[0].strip()
                if not text:
                    continue
                kind = _KINDS.get(len(text))
                try:
                    if kind is None:
                        raise ValueError
                    found.setdefault(kind, set()).add(bytes.fromhex(text))
                except ValueError:
                    raise ValueError(
                        f"{path}:{number}: {text[:80]!r} is not an md5, sha1 or sha256 in hex (32, 40 or 64 digits)"
                    ) from None
        self._digests = {kind: np.sort(np.array(list(digests))) for kind, digests in sorted(found.items())}

    def __len__(self) -> int:
        return sum(len(digests) for digests in self._digests.values())

    def find(self, body: bytes) -> str | None:
        """The listed digest of `body`, as "sha256 1f…"; None if it is not listed."""
        for kind, digests in self._digests.items():
            digest = hashlib.new(kind, body).digest()
            at = int(np.searchsorted(digests, np.array(digest)))
            # numpy strips trailing zero bytes. At a fixed length that is unambiguous.
            if at < len(digests) and digests[at] == digest.rstrip(b"\0"):
                return f"{kind} {digest.hex()}"
        return None
