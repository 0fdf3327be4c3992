"""What the shards' own tar writer must share with everybody else's."""

from __future__ import annotations

import io
import tarfile

import pytest

from pipeline.stages.write_shards import _Tar, _tar_header


@pytest.mark.parametrize("sizes", [(0,), (1, 511, 512, 513), (28_000, 3_000_000, 0)])
def test_a_tar_is_byte_for_byte_what_the_standard_library_writes(sizes: tuple[int, ...]) -> None:
    ours, theirs = io.BytesIO(), io.BytesIO()
    tar = _Tar(ours)
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as reference:
        for number, size in enumerate(sizes):
            data = bytes(i % 251 for i in range(size))
            member = tarfile.TarInfo(f"{number:09d}.jpg")
            member.size = size
            reference.addfile(member, io.BytesIO(data))
            offset, length = tar.add(member.name, data)
            assert ours.getvalue()[offset : offset + length] == data
    tar.close()
    assert ours.getvalue() == theirs.getvalue()
    assert tar.offset == len(theirs.getvalue())


@pytest.mark.parametrize(("name", "size"), [(b"1" * 101, b"%011o" % 1), (b"1.jpg", b"%011o" % 8**11)])
def test_what_a_header_has_no_room_for_is_refused(name: bytes, size: bytes) -> None:
    with pytest.raises(ValueError, match="no room in a tar header"):
        _tar_header(name, size)
