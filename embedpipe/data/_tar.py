"""Tar shards: each image member is a range of bytes of the file, and nothing is unpacked.

Labels, as in WebDataset: consecutive members with the same path up to the first dot of their file name are one sample.
`a/1.jpg` has the label in `a/1.cls`, or in `label` or `class` of `a/1.json`. In a sample with such sidecars, only members
whose whole extension is that of an image are images (`1.jpg`, not `1.mask.png`), if there is one. Without sidecars,
labels and splits come from the folders in the member names, and splits also from the names of the shards.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import IO

from embedpipe.data._files import open_file
from embedpipe.data._folder import IMAGE_SUFFIXES, are_splits, drop_incomplete, folder_row, is_image, splits_of_shards
from embedpipe.data._source import Failure, Listing, Row, Source, join
from embedpipe.errors import EmbedpipeError

READERS = 8  # tars at a time
BLOCK = 512
MAX_HEADER = 1 << 20  # bytes of one extended header
MAX_SIDECAR = 1 << 20
MAX_NAME = 4096  # characters; names are only displayed


@dataclass(frozen=True)
class Member:
    """A regular, complete member of a tar.

    name : str             without a leading slash, "." and ".."
    label : str or None    from the sidecar of an image
    """

    name: str
    offset: int
    size: int
    label: str | None = None

    @property
    def sample(self) -> str:
        """The path up to the first dot of the file name."""
        folder, slash, file = self.name.rpartition("/")
        return folder + slash + file.partition(".")[0]

    @property
    def extension(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2].lower()


@dataclass(frozen=True)
class Shard:
    """The content of a tar.

    ignored : int      members that are not images
    flaw : str         why it is not a tar, or where it is damaged; "" if it is intact
    warnings : tuple   other peculiarities
    """

    images: tuple[Member, ...]
    ignored: int
    flaw: str = ""
    warnings: tuple[str, ...] = ()


def list_tars(source: Source, names: Sequence[str]) -> Listing:
    """List the images of .tar files with these names, relative to the root of their source."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="list") as threads:
        shards = list(zip(names, threads.map(read_tar, [join(source.root, name) for name in names]), strict=True))
    images = [image for _, shard in shards for image in shard.images]
    folders = {image.name.split("/")[0] for image in images if "/" in image.name}
    has_splits = not any(image.label for image in images) and are_splits(folders, source.argument)
    splits, display = splits_of_shards(names), {name: source.display_name(name) for name in names}
    rows = []
    for name, shard in shards:
        for image in shard.images:
            row = folder_row(image.name, has_splits)
            part = f"{image.offset}+{image.size}/{image.name}"
            rows.append(Row(name, image.label or row.label, row.split or splits.get(name, ""), None, part))
    listing = Listing(
        source=source,
        rows=tuple(rows),
        ignored=sum(shard.ignored for _, shard in shards),
        unreadable=tuple(Failure(display[name], "read", shard.flaw) for name, shard in shards if shard.flaw),
        warnings=tuple(f"{display[name]}: {text}" for name, shard in shards for text in shard.warnings),
    )
    return drop_incomplete(listing, "have no label")


def read_tar(path: str) -> Shard:
    """List the images of an uncompressed tar; of a damaged one, those before the damage."""
    members: list[Member] = []
    others: list[str] = []
    try:
        with open_file(path) as stream:
            flaw, is_unmarked = _scan(stream, members, others)
            groups = groupby(members, key=lambda member: member.sample)
            samples = [_images_of(list(group), stream) for _, group in groups]
    except EmbedpipeError:
        raise
    except OSError as exc:
        return Shard((), 0, exc.strerror or str(exc))
    links = [name for name in others if is_image(name)]
    warnings = [f"{len(links)} image(s) are links or sparse and were left out, first {name!r}" for name in links[:1]]
    warnings += ["it has no end mark: it may have been cut between two members"] if is_unmarked else []
    images = tuple(image for used, _ in samples for image in used)
    ignored = len(others) + sum(count for _, count in samples)
    return Shard(images, ignored, flaw, tuple(warnings))


class _Headers:
    """A stream that refuses to read more at once than a header can have."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.tell, self.seek, self._stream = stream.tell, stream.seek, stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header claims to have {size} bytes")
        return self._stream.read(size)


def _scan(stream: IO[bytes], members: list[Member], others: list[str]) -> tuple[str, bool]:
    """Append the regular, complete members to `members`, and the names of all others but folders to `others`.

    Returns
    -------
    flaw : str            see `Shard`
    is_unmarked : bool    the tar does not end with a block of zeros
    """
    end = stream.seek(0, 2)
    stream.seek(0)
    try:
        with tarfile.open(fileobj=_Headers(stream), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:  # type: ignore[call-overload]
            at = _take(tar, end, members, others)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as exc:
        return (_damaged(members, exc) if members else f"not an uncompressed tar: {exc}"), False
    if at > end:
        return _damaged(members, f"it is cut at byte {end}"), False
    stream.seek(at)
    block = stream.read(BLOCK)
    if block.strip(b"\0"):
        return _damaged(members, f"no member begins at byte {at}"), False
    return "", len(block) < BLOCK


def _take(tar: tarfile.TarFile, end: int, members: list[Member], others: list[str]) -> int:
    """Read members up to the end mark, a cut or damage; return the byte at which the next member would begin."""
    at = 0
    while True:
        member = tar.next()
        tar.members.clear()  # type: ignore[attr-defined]  # else all members stay in memory
        if member is None:
            return at
        if tar.offset <= at or member.size < 0:
            raise tarfile.ReadError(f"a member of {member.size} bytes at byte {at}")
        is_regular = member.isreg() and not member.issparse()
        data_end = member.offset_data + member.size
        if data_end > end and is_regular:
            return data_end
        at = tar.offset
        if is_regular:
            name = member.name[-MAX_NAME:].replace("\0", " ")
            parts = [part for part in name.split("/") if part not in ("", ".", "..")]
            if parts and not any(part.startswith(".") for part in parts):  # else it is hidden
                members.append(Member("/".join(parts), member.offset_data, member.size))
        elif not member.isdir():
            others.append(member.name[-MAX_NAME:])


def _damaged(members: list[Member], reason: object) -> str:
    return f"damaged: {reason}; the {len(members)} whole members before are used"


def _images_of(group: list[Member], stream: IO[bytes]) -> tuple[list[Member], int]:
    """Return the images of one sample with the label of its sidecar, and the number of ignored members.

    All members are ignored if there is no image, else the images that are not used.
    """
    images = [member for member in group if is_image(member.name)]
    sidecars = [member for member in group if not is_image(member.name)]
    label = _label_of(sidecars, stream)
    exact = [member for member in images if "." + member.extension in IMAGE_SUFFIXES] if sidecars else []
    used = [replace(member, label=label) for member in exact or images]
    return used, len(images) - len(used) if used else len(group)


def _label_of(sidecars: Iterable[Member], stream: IO[bytes]) -> str | None:
    by_extension = {member.extension: member for member in sidecars if member.size <= MAX_SIDECAR}
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
