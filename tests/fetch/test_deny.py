"""Only listed files are found. An invalid list is refused with the line number."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import pytest
from PIL import Image

from pipeline.fetch.decoder import Rules, decode
from pipeline.fetch.deny import DenyList
from pipeline.fetch.reasons import FetchError
from tests.fetch.server import JPEG, jpeg


def test_bodies_are_found_by_any_kind_of_hash(tmp_path: Path) -> None:
    bodies = [f"body {i}".encode() for i in range(3000)]
    # Enough to include digests that end in a zero byte, and one that begins with it.
    assert any(hashlib.sha256(b).digest().endswith(b"\0") for b in bodies[:1500])
    path = tmp_path / "deny.txt"
    lines = [hashlib.sha256(b).hexdigest().upper() for b in bodies[:1500]]
    lines += ["# abuse", "", hashlib.md5(b"by md5").hexdigest() + "  # a comment", hashlib.sha1(b"by sha1").hexdigest()]
    path.write_text("\n".join(lines))
    deny = pickle.loads(pickle.dumps(DenyList(path)))
    assert len(deny) == 1502
    assert all(deny.find(b) == f"sha256 {hashlib.sha256(b).hexdigest()}" for b in bodies[:1500])
    assert not any(deny.find(b) for b in bodies[1500:])
    assert (deny.find(b"by md5") or "").startswith("md5 ")
    assert (deny.find(b"by sha1") or "").startswith("sha1 ")


def test_a_listed_file_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "deny.txt"
    path.write_text(hashlib.sha256(JPEG).hexdigest() + "\n" + hashlib.md5(b"no picture").hexdigest())
    rules = Rules(deny_hashes=DenyList(path))
    for body in (JPEG, b"no picture"):
        with pytest.raises(FetchError, match="denied_hash"):
            decode(body, rules)
    assert decode(jpeg(seed=1), rules).width == 120


@pytest.mark.parametrize("line", ["xyz", "abab abab abab a", "é" * 32])
def test_the_error_names_the_bad_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "deny.txt"
    path.write_text("# ok\n" + "a" * 64 + f"\n{line}\n")
    with pytest.raises(ValueError, match=rf"deny\.txt:3: '{line}' is not an md5"):
        DenyList(path)


def test_a_re_encoded_copy_of_a_listed_picture_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "deny.txt"
    listed = decode(jpeg(seed=3), Rules()).phash
    assert listed is not None
    path.write_text(f"{listed:016x}  # by picture\n{hashlib.sha256(b'x').hexdigest()}")
    rules = Rules(deny_hashes=DenyList(path), compute_phash=False)
    with Image.open(io.BytesIO(jpeg(seed=3))) as picture:
        again = io.BytesIO()
        picture.resize((picture.width * 2 // 3, picture.height * 2 // 3)).save(again, "WEBP", quality=70)
    for body in (jpeg(seed=3), again.getvalue()):
        with pytest.raises(FetchError, match=rf"phash {listed:016x} at \d bits") as caught:
            decode(body, rules)
        assert caught.value.reason == "denied_hash"
    kept = decode(jpeg(seed=4), rules)
    assert kept.phash is None
    assert decode(jpeg(seed=4), Rules(deny_hashes=DenyList(path))).phash is not None
