# SPDX-License-Identifier: Apache-2.0
"""Tar archives against `tarfile`: every format, long names, folders, links, and damaged files."""

import io
import random
import tarfile

import pytest

from llm2clip_hf.data.shards import iterate_members, open_archive, read_member


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write(path, kind: str) -> None:
    source = random.Random(0)
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for number in range(40):
            folder = ["", "some/folder/", "x" * 90 + "/" + "y" * 40 + "/"][number % 3]
            member = tarfile.TarInfo(f"{folder}{number:05d}.jpg")
            member.size = source.choice([0, 1, 511, 512, 513, 5000])
            if kind == "pax":
                member.mtime = number + 0.5
            tar.addfile(member, io.BytesIO(source.randbytes(member.size)))
            if number % 7 == 0:
                special = tarfile.TarInfo(f"special{number}")
                special.type = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE][number % 3]
                special.linkname = "00000.jpg"
                tar.addfile(special)
        member = tarfile.TarInfo("caf\u00e9/\u732b.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"cat"))


@pytest.mark.parametrize("kind", FORMATS)
def test_members_are_those_of_tarfile(tmp_path, kind):
    path = tmp_path / "a.tar"
    write(path, kind)
    with tarfile.open(path) as tar:
        expected = [(member.name, tar.extractfile(member).read()) for member in tar if member.isreg()]
    assert len(expected) == 41
    with open_archive(path) as file:
        assert [(member.name, read_member(file, member)) for member in iterate_members(file)] == expected


@pytest.mark.parametrize("kind", FORMATS)
def test_no_cut_passes_silently(tmp_path, kind):
    path = tmp_path / "a.tar"
    write(path, kind)
    content = path.read_bytes()
    with open_archive(path) as file:
        end = max(member.offset + -(-member.size // 512) * 512 for member in iterate_members(file))
    for length in [0, 1, 511, *range(512, end, 1021), end - 1, end, end + 511]:
        path.write_bytes(content[:length])
        with open_archive(path) as file, pytest.raises(tarfile.TarError):
            list(iterate_members(file))
    path.write_bytes(content[: end + 512])
    with open_archive(path) as file:
        assert len(list(iterate_members(file))) == 41


def test_a_changed_header_is_refused_with_its_place(tmp_path):
    path = tmp_path / "a.tar"
    write(path, "ustar")
    content = bytearray(path.read_bytes())
    with open_archive(path) as file:
        header = [member.offset for member in iterate_members(file)][5] - 512
    content[header + 3] ^= 1
    path.write_bytes(content)
    with open_archive(path) as file, pytest.raises(tarfile.TarError, match=f"no valid header at byte {header}"):
        list(iterate_members(file))
