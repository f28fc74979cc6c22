"""A disk in memory that loses its power: replays a trace of system calls, and says what may be left at any moment.

The model is that of POSIX, as strict as LazyFS: the bytes of a file are safe after fsync of the file, the names in a folder
after fsync of the folder. Whatever is not safe is kept, lost or torn, each piece on its own.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TRACED = (
    "openat,open,creat,write,pwrite64,writev,pwritev,lseek,fsync,fdatasync,rename,renameat,renameat2,link,linkat,"
    "unlink,unlinkat,rmdir,mkdir,mkdirat,ftruncate,truncate,fallocate,sendfile,copy_file_range,close"
)
STRACE = ("-xx", "-s", "100000000", f"--trace={TRACED}")
SECTOR = 512
Choose = Callable[[], str]  # "kept", "lost" or "torn"


@dataclass(frozen=True)
class Step:
    """One system call that succeeded: its name, its arguments (texts, bytes as bytes) and its result."""

    call: str
    arguments: tuple[Any, ...]
    result: int


@dataclass(eq=False)
class File:
    """Bytes that are safe, and writes (offset, bytes) or new sizes (size, None) that are not."""

    safe: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)


@dataclass(eq=False)
class Folder:
    """Names that are safe, and changes to them that are not; a change is atomic: a rename sets one name and frees another."""

    safe: dict[str, Node] = field(default_factory=dict)
    pending: list[dict[str, Node | None]] = field(default_factory=list)

    def now(self) -> dict[str, Node]:
        names = dict(self.safe)
        for change in self.pending:
            _rename(names, change)
        return names


Node = File | Folder
Tree = dict[str, "bytes | Tree"]


def _rename(names: dict[str, Node], change: dict[str, Node | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def read_trace(log: Path) -> list[Step]:
    """Parse a log of `strace -f -o LOG` under the options STRACE; a call of another kind is an error."""
    steps = []
    for line in log.read_text().splitlines():
        match = re.match(r"(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)", line)
        if match is None:
            assert re.match(r"(\d+ +)?(\+\+\+|---)", line) or "= ?" in line or "<unfinished" in line, line[:200]
        elif int(match[3]) >= 0:
            arguments = tuple(_argument(one) for one in match[2].split(", "))
            steps.append(Step(match[1], arguments, int(match[3])))
    return steps


def _argument(text: str) -> Any:
    if text.startswith('"'):
        return bytes.fromhex(text.strip('".').replace("\\x", ""))
    return int(text) if text.isdigit() else text


class Disk:
    """What one folder holds, and what of it would survive.

    Parameters
    ----------
    root : Path    only what lies below it is modelled; it is there and safe from the beginning

    Attributes
    ----------
    said : list    what the process told on its standard output to be safe
    sites : set    the lines of code that it told to come next
    """

    def __init__(self, root: Path) -> None:
        self.root, self.top = str(root).encode(), Folder()
        self.said: list[dict[str, Any]] = []
        self.sites: set[str] = set()
        self._files: dict[int, Node] = {}
        self._places: dict[int, int] = {}

    def restart(self) -> None:
        """The process was killed: what it had open is closed; nothing becomes safe by that."""
        self._files.clear()

    def do(self, step: Step) -> None:
        """Apply one system call."""
        act = getattr(self, f"_{step.call}", None)
        if act is not None:
            act(*step.arguments, result=step.result)
        elif step.call != "lseek":
            ours = any(isinstance(one, bytes) and one.startswith(self.root) for one in step.arguments)
            known = not ours and step.arguments[0] not in self._files
            assert known, f"a call that the model does not know: {step}"

    def _at(self, path: bytes) -> tuple[Folder, str] | None:
        """Return the folder of a path and its name therein; None outside of the root."""
        if not path.startswith(self.root + b"/"):
            return None
        *above, name = path[len(self.root) + 1 :].decode().split("/")
        folder = self.top
        for part in above:
            found = folder.now()[part]
            assert isinstance(found, Folder)
            folder = found
        return folder, name

    def _openat(self, _: Any, path: bytes, flags: str, *__: Any, result: int) -> None:
        self._files.pop(result, None)
        if path == self.root:
            self._files[result] = self.top
        elif place := self._at(path):
            folder, name = place
            node = folder.now().get(name)
            if node is None:
                node = File()
                folder.pending.append({name: node})
            if "O_TRUNC" in flags and isinstance(node, File):
                node.pending.append((0, None))
            self._files[result], self._places[result] = node, 0

    def _lseek(self, descriptor: int, *_: Any, result: int) -> None:
        self._places[descriptor] = result

    def _write(self, descriptor: int, raw: bytes, *_: Any, result: int) -> None:
        if descriptor == 1 and 1 not in self._files:
            messages = [json.loads(line) for line in raw.splitlines()]
            self.said += [message for message in messages if "site" not in message]
            self.sites |= {message["site"] for message in messages if "site" in message}
        if isinstance(node := self._files.get(descriptor), File):
            node.pending.append((self._places[descriptor], raw[:result]))
            self._places[descriptor] += result

    def _pwrite64(self, descriptor: int, raw: bytes, _: int, offset: int, *, result: int) -> None:
        if isinstance(node := self._files.get(descriptor), File):
            node.pending.append((offset, raw[:result]))

    def _ftruncate(self, descriptor: int, size: int, *, result: int) -> None:
        if isinstance(node := self._files.get(descriptor), File):
            node.pending.append((size, None))

    def _fsync(self, descriptor: int, *, result: int) -> None:
        node = self._files.get(descriptor)
        if isinstance(node, File):
            node.safe, node.pending = _bytes(node, lambda: "kept"), []
        elif isinstance(node, Folder):
            node.safe, node.pending = node.now(), []

    _fdatasync = _fsync

    def _close(self, descriptor: int, *, result: int) -> None:
        self._files.pop(descriptor, None)

    def _rename(self, old: bytes, new: bytes, *, result: int) -> None:
        if (before := self._at(old)) and (after := self._at(new)):
            assert before[0] is after[0], "a rename from folder to folder is not modelled"
            before[0].pending.append({after[1]: before[0].now()[before[1]], before[1]: None})

    def _unlink(self, path: bytes, *, result: int) -> None:
        if place := self._at(path):
            place[0].pending.append({place[1]: None})

    def _mkdir(self, path: bytes, *_: Any, result: int) -> None:
        if place := self._at(path):
            place[0].pending.append({place[1]: Folder()})

    def pieces(self) -> int:
        """How many pieces are not safe."""
        count = 0

        def counting() -> str:
            nonlocal count
            count += 1
            return "kept"

        self.left(counting)
        return count

    def left(self, choose: Choose) -> Tree:
        """Return what the power cut leaves, `choose` being asked for each piece that is not safe."""
        return _tree(self.top, choose)

    def outcomes(self, chance: random.Random, more: int) -> Iterator[Tree]:
        """Yield what may be left: all kept, all lost, each piece alone kept, lost or torn; and `more` by chance."""
        pieces = self.pieces()
        yield self.left(lambda: "kept")
        if pieces:
            yield self.left(lambda: "lost")
            for odd, rest in (("lost", "kept"), ("torn", "kept"), ("kept", "lost")):
                for piece in range(pieces):
                    yield self.left(_one_odd(piece, odd, rest))
            for _ in range(more):
                yield self.left(lambda: chance.choice(("kept", "lost", "torn")))


def _one_odd(piece: int, odd: str, rest: str) -> Choose:
    asked = iter(range(1 << 30))
    return lambda: odd if next(asked) == piece else rest


def _tree(folder: Folder, choose: Choose) -> Tree:
    names = dict(folder.safe)
    for change in folder.pending:
        if choose() == "kept":
            _rename(names, change)
    return {
        name: _tree(node, choose) if isinstance(node, Folder) else _bytes(node, choose)
        for name, node in sorted(names.items())
    }


def _bytes(file: File, choose: Choose) -> bytes:
    """Return the bytes of a file; a torn write leaves the space it took, and of its sectors every other one."""
    content = bytearray(file.safe)
    for offset, raw in file.pending:
        fate = choose()
        if raw is None and fate == "kept":
            del content[offset:]
            content += bytes(max(0, offset - len(content)))
        elif raw is not None and fate != "lost":
            content += bytes(max(0, offset + len(raw) - len(content)))
            for start in range(0, len(raw), SECTOR):
                if fate == "kept" or start // SECTOR % 2:
                    sector = raw[start : start + SECTOR]
                    content[offset + start : offset + start + len(sector)] = sector
    return bytes(content)


def lay_out(tree: Tree, folder: Path) -> None:
    """Write a tree to a real folder."""
    folder.mkdir()
    for name, node in tree.items():
        if isinstance(node, bytes):
            (folder / name).write_bytes(node)
        else:
            lay_out(node, folder / name)


def read_tree(folder: Path) -> Tree:
    """Read a real folder."""
    return {one.name: read_tree(one) if one.is_dir() else one.read_bytes() for one in sorted(folder.iterdir())}


def site_of(step: Step) -> str | None:
    """Return which fsync a process announces with this step; see `publishing.main`."""
    if step.call == "write" and step.arguments[0] == 1 and b'"site"' in step.arguments[1]:
        site: str = json.loads(step.arguments[1])["site"]
        return site
    return None


def without(steps: Iterable[Step], site: str) -> list[Step]:
    """Return a trace without the fsyncs of one line of code."""
    kept, announced = [], None
    for step in steps:
        announced = site_of(step) or announced
        if step.call != "fsync" or announced != site:
            kept.append(step)
    return kept
