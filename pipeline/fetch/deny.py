"""Lists of hashes of pictures that must never be kept, from any url: abuse material, takedowns by content."""

from __future__ import annotations

import binascii
import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np

from trainer.hamming import Index

_KINDS = {16: "phash", 32: "md5", 40: "sha1", 64: "sha256"}
"""Kinds of hashes by their number of hex digits."""
MAX_HAMMING = 4
"""Most bits in which the pHash of a re-encoded or resized picture may differ from the listed one."""


class DenyList:
    """The hashes in a text file, one per line in hex. `#` begins a comment. The length of a hash determines its kind.

    An md5, sha1 or sha256 is compared with the digest of the body as fetched. A pHash, as printed by `imagehash.phash`,
    is compared with the pHash of the picture, so it also finds re-encoded copies: pictures at a Hamming distance of
    MAX_HAMMING or less. Uses 16 to 32 bytes of memory per digest and about 250 per pHash. Raises OSError, or ValueError
    with file and line.
    """

    def __init__(self, path: str | Path):
        found: dict[str, set[bytes]] = defaultdict(set)
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                text = line.partition("#")[0].strip()
                if not text:
                    continue
                try:
                    found[_KINDS[len(text)]].add(binascii.unhexlify(text))  # unlike bytes.fromhex, takes no blanks
                except (KeyError, ValueError):
                    raise ValueError(
                        f"{path}:{number}: {text[:80]!r} is not an md5, sha1, sha256 or pHash in hex (32, 40, 64 or "
                        "16 digits)"
                    ) from None
        if not found:
            raise ValueError(f"{path}: lists nothing; expected one digest or pHash in hex per line")
        pictures = sorted(int.from_bytes(bits, "big") for bits in found.pop("phash", ()))
        self._pictures = np.array(pictures, np.uint64)
        self._index = Index(self._pictures, MAX_HAMMING)
        self._digests = {kind: np.sort(np.array(list(digests))) for kind, digests in sorted(found.items())}

    def __len__(self) -> int:
        return sum(len(digests) for digests in self._digests.values()) + len(self._pictures)

    @property
    def holds_pictures(self) -> bool:
        """True if the list has a pHash."""
        return len(self._pictures) > 0

    def find_picture(self, bits: int | None) -> str | None:
        """The listed pHash nearest to `bits`, as "phash 1f… at 2 bits"; None if none is within MAX_HAMMING."""
        if bits is None or not self.holds_pictures:
            return None
        (place,), (distance,) = self._index.nearest(np.array([bits], np.uint64))
        return None if place < 0 else f"phash {int(self._pictures[place]):016x} at {distance} bits"

    def find(self, body: bytes) -> str | None:
        """The listed digest of `body`, as "sha256 1f…"; None if it is not listed."""
        for kind, digests in self._digests.items():
            digest = hashlib.new(kind, body).digest()
            at = int(np.searchsorted(digests, np.array(digest)))
            # numpy strips trailing zero bytes, which is unambiguous at a fixed length.
            if at < len(digests) and digests[at] == digest.rstrip(b"\0"):
                return f"{kind} {digest.hex()}"
        return None
