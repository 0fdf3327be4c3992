"""What the shards' own tar writer must share with everybody else's."""

from __future__ import annotations

import io
import tarfile

import pytest

from pipeline.stages.write_shards import _Tar


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
