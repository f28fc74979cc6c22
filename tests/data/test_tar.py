"""Tar shards: byte ranges, WebDataset's grouping, and tars that are odd, cut or no tars."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from embedpipe.data import ByteSource, Manifest, read_manifest
from embedpipe.errors import UsageError

Entry = tuple[str, bytes | tarfile.TarInfo]


def key_of(place: ByteSource) -> bytes:
    return hashlib.sha256(place.read()).digest()


def write(path: Path, *entries: Entry, format: int = tarfile.PAX_FORMAT) -> Path:
    """Write members with these bytes, or as they stand."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name) if isinstance(content, bytes) else content
            data = content if isinstance(content, bytes) else b""
            info.name, info.size = name, len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(*data: Path | str, **options: object) -> Manifest:
    return read_manifest(data, key_of=key_of, **options)


def labels(manifest: Manifest) -> dict[str, str | None]:
    return {manifest.display_name(s): s.label for s in manifest.samples}


def link(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, "cat/1.jpg"
    return info


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_ranges_with_their_bytes(tmp_path: Path, format: int) -> None:
    long = "d" * 90 + "/" + "n" * 60 + ".png"
    entries = [("cat/1.jpg", b"one"), ("./dog/ü 2.PNG", b"two" * 999), (long, b"three")]
    tar = write(tmp_path / "x.tar", *entries, format=format)
    manifest = read(tar)
    assert [manifest.byte_source_of(s).read() for s in manifest.samples] == [content for _, content in entries]
    assert all(manifest.byte_source_of(s).is_local_range for s in manifest.samples)
    assert labels(manifest) == {f"{tar}/cat/1.jpg": "cat", f"{tar}/dog/ü 2.PNG": "dog", f"{tar}/{long}": "d" * 90}
    assert manifest.ignored == 0


def test_sidecars_give_labels(tmp_path: Path) -> None:
    tar = write(
        tmp_path / "x.tar",
        ("a/1.jpg", b"1"),
        ("a/1.cls", b"7\n"),
        ("a/1.mask.png", b"mask"),
        ("a/2.json", json.dumps({"class": "oak", "split": 3}).encode()),
        ("a/2.jpg", b"2"),
        ("a/3.jpg", b"3"),
        ("a/3.json", json.dumps({"label": 0}).encode()),
        ("a/3.cls", b"elm"),
        ("a/4.v.1.jpg", b"4"),
        ("a/4.cls", b"ash"),
    )
    manifest = read(tar)
    assert list(labels(manifest).values()) == ["7", "oak", "elm", "ash"]
    assert manifest.ignored == 1  # the mask


def test_what_has_no_label_is_left_out_where_others_have_one(tmp_path: Path) -> None:
    tar = write(
        tmp_path / "x.tar", ("1.jpg", b"1"), ("1.cls", b"7"), ("2.jpg", b"2"), ("3.jpg", b"3"), ("3.json", b"{")
    )
    manifest = read(tar)
    assert list(labels(manifest)) == [f"{tar}/1.jpg"]
    assert any(
        "2 image(s)" in text and "have no label" in text and "'x.tar/2.jpg'" in text for text in manifest.warnings
    )
    assert read(write(tmp_path / "y.tar", ("1.jpg", b"1"), ("2.jpg", b"2"))).splits == {"all": 2}


def test_names_are_only_names(tmp_path: Path) -> None:
    entries = [("/etc/1.jpg", b"1"), ("../../up/2.jpg", b"2"), ("up/._2.jpg", b"mac"), ("up/.git/3.jpg", b"3")]
    manifest = read(write(tmp_path / "x.tar", *entries))
    assert labels(manifest) == {f"{tmp_path}/x.tar/etc/1.jpg": "etc", f"{tmp_path}/x.tar/up/2.jpg": "up"}
    assert {manifest.byte_source_of(s).path for s in manifest.samples} == {str(tmp_path / "x.tar")}


def test_links_devices_and_sparse_members_are_left_out(tmp_path: Path) -> None:
    sparse = link(tarfile.GNUTYPE_SPARSE)
    odd = [
        (f"cat/{k.decode()}.jpg", link(k))
        for k in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    ]
    tar = write(tmp_path / "x.tar", ("cat/1.jpg", b"1"), *odd, ("cat/s.jpg", sparse), ("dog/2.jpg", b"2"))
    manifest = read(tar)
    assert list(labels(manifest)) == [f"{tar}/cat/1.jpg", f"{tar}/dog/2.jpg"]
    assert any("5 image(s) are links or sparse" in text for text in manifest.warnings)
    assert manifest.ignored == 5


def test_several_shards_are_one_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(12):
        write(tmp_path / f"s/p-{k:02}.tar", (f"{'ab'[k % 2]}/{k}.jpg", b"%d" % k))
    monkeypatch.chdir(tmp_path)
    names = [f"s/p-{k:02}.tar/{'ab'[k % 2]}/{k}.jpg" for k in range(12)]
    assert list(labels(read("s/p-{00..11}.tar"))) == names
    assert list(labels(read("s"))) == names
    assert list(labels(read("s/p-{03,05}.tar"))) == [names[3], names[5]]
    assert list(labels(read("s/p-00.tar", "s/p-01.tar"))) == names[:2]
    with pytest.raises(UsageError, match=r"'s/p-12.tar' does not exist"):
        read("s/p-{00..12}.tar")
    with pytest.raises(UsageError, match="more than 1000000 files"):
        read("s/p-{0..99999999}.tar")
    assert {Path(p).name for p in (read("s").sources[0].absolute, read("s/p-{00..11}.tar").sources[0].absolute)} == {
        "s",
        "p-{00..11}.tar",
    }


def test_splits_from_folders_and_names(tmp_path: Path) -> None:
    inside = write(tmp_path / "in.tar", ("train/a/1.jpg", b"1"), ("val/b/2.jpg", b"2"))
    assert [(s.label, s.split) for s in read(inside).samples] == [("a", "train"), ("b", "val")]
    for name in ("x-train-0", "x-val-0", "crash-test-0"):
        write(tmp_path / f"by/{name}.tar", ("a/1.jpg", name.encode()))
    assert [s.split for s in read(tmp_path / "by", split_by="folder").samples] == ["test", "train", "val"]
    (tmp_path / "by/x-train-0.tar").unlink()
    assert {s.split for s in read(tmp_path / "by/crash-test-0.tar").samples} == {"train"}  # by hash: a lone image


def test_of_a_cut_tar_the_whole_members_before_are_used(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.tar", *[(f"{c}/{k}.jpg", b"%d" % k * 700) for c in "ab" for k in range(5)])
    data = whole.read_bytes()
    (tmp_path / "y.tar").write_bytes(data[: 512 * 3 * 8 + 600])  # in the ninth of ten members
    manifest = read(tmp_path / "y.tar")
    assert len(manifest.samples) == 8
    assert [(f.path, f.stage) for f in manifest.unreadable] == [(str(tmp_path / "y.tar"), "read")]
    assert "cut at byte" in manifest.unreadable[0].reason
    assert "the 8 whole members before are used" in manifest.unreadable[0].reason
    (tmp_path / "y.tar").write_bytes(data[: 512 * 3 * 8])
    manifest = read(tmp_path / "y.tar")
    assert (len(manifest.samples), manifest.unreadable) == (8, ())
    assert any("no end mark" in text for text in manifest.warnings)
    (tmp_path / "y.tar").write_bytes(data[: 512 * 3 * 8] + b"?" * 5000)
    assert "no member begins at byte 12288" in read(tmp_path / "y.tar").unreadable[0].reason


def test_headers_that_lie(tmp_path: Path) -> None:
    data = bytearray(
        write(tmp_path / "x.tar", ("a/1.jpg", b"1"), ("b/2.jpg", b"2"), format=tarfile.GNU_FORMAT).read_bytes()
    )
    for kind, size in ((b"0", b"\xff" * 12), (b"L", b"\x80" + b"\0" * 6 + b"\xff" * 5), (b"x", b"\xff" * 12)):
        header = bytearray(data[1024:1536])
        header[124:136], header[156:157], header[148:156] = size, kind, b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "y.tar").write_bytes(data[:1024] + header + data[1536:])
        manifest = read(tmp_path / "y.tar")
        assert len(manifest.samples) == 1
        assert "damaged" in manifest.unreadable[0].reason


@pytest.mark.parametrize("content", [b"", b"garbage" * 999, b"\0" * 10240])
def test_what_is_no_tar_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UsageError, match=r"no image in '.*x\.tar'"):
        read(tmp_path / "x.tar")
    write(tmp_path / "y.tar", ("a/1.jpg", b"1"))
    assert len(read(tmp_path).unreadable) == (content[:1] != b"\0")


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.zst"])
def test_compressed_tars_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    for data in (tmp_path / name, tmp_path):
        with pytest.raises(UsageError, match=r"is compressed, expected an uncompressed \.tar"):
            read(data)


def test_tars_beside_images_are_told_of(tmp_path: Path) -> None:
    write(tmp_path / "x.tar", ("a/1.jpg", b"1"))
    (tmp_path / "2.jpg").write_bytes(b"2")
    manifest = read(tmp_path)
    assert [s.path for s in manifest.samples] == ["2.jpg"]
    assert any("1 shard(s)" in text for text in manifest.warnings)


def test_a_member_that_is_gone_is_unreadable(tmp_path: Path) -> None:
    tar = write(tmp_path / "x.tar", ("a/1.jpg", b"1" * 2000))
    (sample,) = read(tar).samples
    place = read(tar).byte_source_of(sample)
    os.truncate(tar, 1000)
    with pytest.raises(OSError, match="changed while reading"):
        place.read()
