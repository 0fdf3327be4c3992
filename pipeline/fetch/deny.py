"""Lists of hashes of pictures that must never be kept, whatever their url: abuse material, takedowns by content."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from trainer.hamming import Index

_KINDS = {32: "md5", 40: "sha1", 64: "sha256"}
_PICTURE_DIGITS = 16
MAX_HAMMING = 4
"""Bits in which the pHash of a re-encoded or resized picture may differ from the listed one."""


class DenyList:
    """The digests in a text file: one per line in hex, md5, sha1, sha256 or pHash by length. `#` begins a comment.

    Digests are compared with bodies as fetched, byte for byte. A pHash of 16 digits, as `imagehash.phash` prints it, is
    compared with the picture, and so finds re-encoded copies too: those at a Hamming distance of MAX_HAMMING or less.
    Uses 16 to 32 bytes of memory per digest, some 250 per pHash. Raises OSError, or ValueError with file and line.
    """

    def __init__(self, path: str | Path):
        found: dict[str, set[bytes]] = {}
        pictures: set[int] = set()
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                text = line.partition("#")[0].strip()
                if not text:
                    continue
                kind = _KINDS.get(len(text))
                try:
                    if len(text) == _PICTURE_DIGITS:
                        pictures.add(int.from_bytes(bytes.fromhex(text), "big"))
                        continue
                    if kind is None:
                        raise ValueError
                    found.setdefault(kind, set()).add(bytes.fromhex(text))
                except ValueError:
                    raise ValueError(
                        f"{path}:{number}: {text[:80]!r} is not an md5, sha1, sha256 or pHash in hex (32, 40, 64 or "
                        "16 digits)"
                    ) from None
        if not found and not pictures:
            raise ValueError(f"{path}: lists nothing; expected a digest or pHash in hex a line")
        self._digests = {kind: np.sort(np.array(list(digests))) for kind, digests in sorted(found.items())}
        self._pictures = np.array(sorted(pictures), np.uint64)
        self._index = Index(self._pictures, MAX_HAMMING)

    def __len__(self) -> int:
        return sum(len(digests) for digests in self._digests.values()) + len(self._pictures)

    @property
    def holds_pictures(self) -> bool:
        """Whether there is a pHash among the digests."""
        return len(self._pictures) > 0

    def find_picture(self, bits: int | None) -> str | None:
        """The listed pHash near `bits`, as "phash 1f… at 2 bits"; None if there is none."""
        if bits is None or not self.holds_pictures:
            return None
        (place,), (distance,) = self._index.nearest(np.array([bits], np.uint64))
        return None if place < 0 else f"phash {int(self._pictures[place]):016x} at {distance} bits"

    def find(self, body: bytes) -> str | None:
        """The listed digest of `body`, as "sha256 1f…"; None if it is not listed."""
        for kind, digests in self._digests.items():
            digest = hashlib.new(kind, body).digest()
            at = int(np.searchsorted(digests, np.array(digest)))
            # numpy strips trailing zero bytes. At a fixed length that is unambiguous.
            if at < len(digests) and digests[at] == digest.rstrip(b"\0"):
                return f"{kind} {digest.hex()}"
        return None
