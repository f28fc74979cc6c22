"""Tar shards: every image member is a range of bytes of the file; nothing is unpacked, names are only names.

Members with the same path up to the first dot of their file name are one sample, as WebDataset has it: `a/1.jpg` and
`a/1.cls` (or `a/1.json` with `label` or `class`). Consecutive members make a sample. A sample that has sidecars has the images
whose whole extension is that of an image (`1.jpg`, not `1.mask.png`), where there is one.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import IO

from embedpipe.data._byte_source import open_file
from embedpipe.data._folder import IMAGE_SUFFIXES, are_splits, folder_row, is_image, keep_alike, split_of_names
from embedpipe.data._manifest import Failure, Listing, Row, name_of
from embedpipe.data._source import Source, join
from embedpipe.errors import EmbedpipeError

READERS = 8  # tars at a time
BLOCK = 512
MOST_HEADER = 1 << 20  # bytes of one extended header
MOST_SIDECAR = 1 << 20
MOST_NAME = 4096  # characters; names only tell people what an image was
BROKEN = (tarfile.TarError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Member:
    """A regular member, whole in the file; `name` is clean: no leading slash, no dots."""

    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        folder, slash, file = self.name.rpartition("/")
        return folder + slash + file.partition(".")[0]

    @property
    def extension(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2].lower()


@dataclass(frozen=True)
class Image:
    """An image in a tar: its name, where it is ("OFFSET+SIZE"), and the label of its sidecar."""

    name: str
    location: str
    label: str | None


@dataclass(frozen=True)
class Shard:
    """What a tar holds.

    ignored : int      members that are no images
    flaw : str         why it is no tar, or from where on it is damaged; "" where it is sound
    warnings : tuple   what else is odd
    """

    images: tuple[Image, ...]
    ignored: int
    flaw: str = ""
    warnings: tuple[str, ...] = ()


def list_tars(source: Source, names: Sequence[str]) -> Listing:
    """Read .tar files of these names in the root of their source."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="list") as threads:
        shards = list(zip(names, threads.map(read_tar, [join(source.root, name) for name in names]), strict=True))
    every = [image for _, shard in shards for image in shard.images]
    folders = {image.name.split("/")[0] for image in every if "/" in image.name}
    has_splits = not any(image.label for image in every) and are_splits(folders, source.argument)
    named, called = split_of_names(names), {name: name_of(source, Row(name)) for name in names}
    listing = Listing(
        source=source,
        rows=tuple(row for name, shard in shards for row in _rows(name, shard, has_splits, named)),
        ignored=sum(shard.ignored for _, shard in shards),
        unreadable=tuple(Failure(called[name], "read", shard.flaw) for name, shard in shards if shard.flaw),
        warnings=tuple(f"{called[name]}: {text}" for name, shard in shards for text in shard.warnings),
    )
    return keep_alike(listing, "have no label")


def _rows(path: str, shard: Shard, has_splits: bool, named: dict[str, str]) -> Iterator[Row]:
    """Yield a row for each image of a tar: what its sidecars say, else its folder."""
    for image in shard.images:
        row = folder_row(image.name, has_splits)
        split = row.split or named.get(path, "")
        yield Row(path, image.label or row.label, split, None, f"{image.location}/{image.name}")


def read_tar(path: str) -> Shard:
    """List the images of an uncompressed tar; of one that is damaged, the whole members before."""
    members: list[Member] = []
    odd: list[str] = []
    try:
        with open_file(path) as stream:
            flaw, unmarked = _scan(stream, members, odd)
            groups = [list(group) for _, group in groupby(members, key=lambda member: member.key)]
            found = [(_images_of(group, stream), group) for group in groups]
    except EmbedpipeError:
        raise
    except OSError as exc:
        return Shard((), 0, exc.strerror or str(exc))
    links = [name for name in odd if is_image(name)]
    warnings = [f"{len(links)} image(s) are links or sparse and were left out, first {name!r}" for name in links[:1]]
    warnings += ["it has no end mark: it may have been cut between two members"] if unmarked else []
    unused = [name for images, group in found for name in _unused(images, group)]
    images = tuple(image for some, _ in found for image in some)
    return Shard(images, len(unused) + len(odd), flaw, tuple(warnings))


def _unused(images: list[Image], group: list[Member]) -> list[str]:
    """Return what is no use in a sample: all where it has no image, else the images that are not taken."""
    taken = {image.name for image in images}
    return [member.name for member in group if not images or (is_image(member.name) and member.name not in taken)]


class _Headers:
    """A stream that refuses to read more at once than a header has."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.tell, self.seek, self._stream = stream.tell, stream.seek, stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MOST_HEADER:
            raise tarfile.ReadError(f"a header says that it has {size} bytes")
        return self._stream.read(size)


def _scan(stream: IO[bytes], members: list[Member], odd: list[str]) -> tuple[str, bool]:
    """Fill in the whole regular members, and the names of all others but folders.

    Returns
    -------
    flaw : str         see `Shard`
    unmarked : bool    the tar ends without blocks of zeros
    """
    end = stream.seek(0, 2)
    stream.seek(0)
    try:
        with tarfile.open(fileobj=_Headers(stream), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:  # type: ignore[call-overload]
            at = _take(tar, end, members, odd)
    except BROKEN as exc:
        return (f"no uncompressed tar: {exc}" if not members else _damaged(members, exc)), False
    if at > end:
        return _damaged(members, f"it is cut at byte {end}"), False
    stream.seek(at)
    block = stream.read(BLOCK)
    if block.strip(b"\0"):
        return _damaged(members, f"no member begins at byte {at}"), False
    return "", len(block) < BLOCK


def _take(tar: tarfile.TarFile, end: int, members: list[Member], odd: list[str]) -> int:
    """Take members until the end mark, the cut or damage; return where the next would begin."""
    at = 0
    while True:
        member = tar.next()
        tar.members.clear()  # type: ignore[attr-defined]  # else names of all members stay in memory
        if member is None:
            return at
        if tar.offset <= at or member.size < 0:
            raise tarfile.ReadError(f"a member of {member.size} bytes at byte {at}")
        data_end = member.offset_data + member.size
        if data_end > end and member.isreg() and not member.issparse():
            return data_end
        at = tar.offset
        if member.isreg() and not member.issparse():
            members.extend(_visible(member))
        elif not member.isdir():
            odd.append(member.name[-MOST_NAME:])


def _visible(member: tarfile.TarInfo) -> Iterator[Member]:
    parts = [part for part in member.name[-MOST_NAME:].replace("\0", " ").split("/") if part not in ("", ".", "..")]
    if parts and not any(part.startswith(".") for part in parts):
        yield Member("/".join(parts), member.offset_data, member.size)


def _damaged(members: list[Member], reason: object) -> str:
    return f"damaged: {reason}; the {len(members)} whole members before are used"


def _images_of(group: list[Member], stream: IO[bytes]) -> list[Image]:
    """Return the images of one sample, with the label that its sidecar gives."""
    images = [member for member in group if is_image(member.name)]
    sidecars = [member for member in group if not is_image(member.name)]
    label = _label_of(sidecars, stream)
    plain = [member for member in images if "." + member.extension in IMAGE_SUFFIXES] if sidecars else []
    return [Image(member.name, f"{member.offset}+{member.size}", label) for member in plain or images]


def _label_of(sidecars: Iterable[Member], stream: IO[bytes]) -> str | None:
    by_extension = {member.extension: member for member in sidecars if member.size <= MOST_SIDECAR}
    if "cls" in by_extension:
        return _text(by_extension["cls"], stream).strip() or None
    try:
        record = json.loads(_text(by_extension["json"], stream)) if "json" in by_extension else None
    except (ValueError, RecursionError):
        return None
    label = record.get("label", record.get("class")) if isinstance(record, dict) else None
    return str(label).strip() or None if isinstance(label, str | int | float) else None


def _text(member: Member, stream: IO[bytes]) -> str:
    stream.seek(member.offset)
    return stream.read(member.size).decode("utf-8", "surrogateescape").replace("\0", " ")
