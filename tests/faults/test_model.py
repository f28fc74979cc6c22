"""Any order of changes, extractions, kills and damage against a model in memory: dictionaries of what must be there."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from embedpipe.cache import Cache, KeyIndex
from embedpipe.commands.cache import collect_garbage
from embedpipe.commands.verify import verify_cache
from embedpipe.data import read_manifest
from embedpipe.errors import CacheMismatch, Stopped

from ._proving import OPTIONS, SPEC, features_of, fork, read_all, wait
from ._tier import tier

LABELS = st.sampled_from(["a", "b", "c"])
NAMES = st.sampled_from([f"{number}.png" for number in range(6)])
CONTENTS = st.sampled_from(
    [*(f"image {number}".encode() for number in range(40)), *(f"bad {number}".encode() for number in range(6))]
)
IMAGES = st.dictionaries(st.tuples(LABELS, NAMES), CONTENTS, min_size=1, max_size=6)
RECORD = ("decode", "not an image", "stub 1")
CALLS = ("fsync", "rename", "unlink", "chmod", "mkdir")
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


def key_of(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def extract(
    root: Path, *, shard: int, told: Callable[[list[bytes]], object] = id, stop_after: int | None = None
) -> int:
    """Extract with a stub for decoder and backbone; report what is committed; return how many rows were new."""
    cache, index = Cache(root / "cache"), KeyIndex(root / "index.sqlite")
    manifest = read_manifest([root / "data"], key_of=index.key_of)
    index.close()
    space, pending = cache.open_space(SPEC), []
    with space.writer(**OPTIONS) as writer:
        view = space.view()
        files = {sample.key: manifest.byte_source_of(sample) for sample in manifest.samples}
        missing = [key for key in files if key not in view and key not in view.failures]
        for number, key in enumerate(missing):
            if number == stop_after:
                raise Stopped("SIGTERM")
            if files[key].read().startswith(b"bad"):
                writer.fail(key, *RECORD)
            else:
                writer.append([key], features_of([key]))
            pending.append(key)
            if len(pending) == shard:
                writer.commit()
                told(pending)
                pending = []
        writer.finish()
        told(pending)
    cache.set_latest(cache.write_dataset(manifest), [space.folder.name])
    return len(missing)


def kill_at(number: int, *, before: bool) -> None:
    """Arrange for SIGKILL at the `number`-th system call that changes a folder or makes something durable."""
    left = number

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **named)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))


class CacheMachine(RuleBasedStateMachine):
    """`files` is the data set, `rows` and `failed` are what the space holds, `table` is the last sample table."""

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp(dir=MEMORY))
        (self.root / "data").mkdir()
        self.cache = Cache(self.root / "cache")
        self.space = self.cache.open_space(SPEC)
        self.files: dict[tuple[str, str], bytes] = {}
        self.rows: set[bytes] = set()
        self.failed: set[bytes] = set()
        self.table: dict[str, tuple[str, bytes]] | None = None

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    # what users do to their data

    @rule(images=IMAGES)
    def add_or_edit(self, images: dict[tuple[str, str], bytes]) -> None:
        for (label, name), content in images.items():
            path = self.root / "data" / label / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        self.files |= images

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        label, name = data.draw(st.sampled_from(sorted(self.files)))
        (self.root / "data" / label / name).unlink()
        del self.files[label, name]

    @precondition(lambda self: self.files)
    @rule(data=st.data(), label=LABELS, name=NAMES, copies=st.booleans())
    def rename_relabel_or_copy(self, data: st.DataObject, label: str, name: str, copies: bool) -> None:
        old = data.draw(st.sampled_from(sorted(self.files)))
        source, target = (self.root.joinpath("data", *place) for place in (old, (label, name)))
        target.parent.mkdir(exist_ok=True)
        if source != target:
            (shutil.copy2 if copies else os.replace)(source, target)
            self.files[label, name] = self.files[old] if copies else self.files.pop(old)

    # what embedpipe does

    @precondition(lambda self: self.files)
    @rule(shard=st.integers(1, 4))
    def extract(self, shard: int) -> None:
        new = self.wanted - self.rows - self.failed
        assert extract(self.root, shard=shard) == len(new)
        self.finished()

    @rule(images=IMAGES, shard=st.integers(1, 4), number=st.integers(1, 45), before=st.booleans())
    def kill(self, images: dict[tuple[str, str], bytes], shard: int, number: int, before: bool) -> None:
        self.add_or_edit(images)
        told, tell = os.pipe()

        def body() -> None:
            kill_at(number, before=before)
            extract(self.root, shard=shard, told=lambda keys: os.write(tell, b"".join(keys)))

        ended = wait(fork(body))
        os.close(tell)
        with os.fdopen(told, "rb") as stream:
            reported = stream.read()
        safe = {reported[start : start + 32] for start in range(0, len(reported), 32)}
        assert ended in (0, -signal.SIGKILL)
        if ended == 0:
            self.finished()
            return
        present, failed = read_all(self.space), set(self.space.view().failures)
        assert self.rows | (safe & self.good) <= present <= self.rows | self.good
        assert self.failed | (safe - self.good) <= failed <= self.failed | (self.wanted - self.good)
        assert self.stored() in (self.table, self.wished())
        self.rows, self.failed, self.table = present, failed, self.stored()

    @rule(images=IMAGES, shard=st.integers(1, 4), after=st.integers(0, 6))
    def stop(self, images: dict[tuple[str, str], bytes], shard: int, after: int) -> None:
        """SIGTERM: what is pending is committed on the way out."""
        self.add_or_edit(images)
        before = len(self.rows) + len(self.failed)
        try:
            extract(self.root, shard=shard, stop_after=after)
        except Stopped:
            present, failed = read_all(self.space), set(self.space.view().failures)
            assert len(present) + len(failed) == before + after
            assert self.rows <= present <= self.rows | self.good
            assert self.failed <= failed <= self.failed | (self.wanted - self.good)
            self.rows, self.failed = present, failed
        else:
            self.finished()

    @precondition(lambda self: self.rows or self.failed)
    @rule(data=st.data(), bit=st.integers(0, 7), cut=st.booleans())
    def damage(self, data: st.DataObject, bit: int, cut: bool) -> None:
        """Damage any file: verifying finds it; put back, all is as it was."""
        files = sorted(path for path in self.cache.root.rglob("*") if path.is_file() and path.name != ".lock")
        files = [path for path in files if not path.name.startswith(".tmp-")]
        path = data.draw(st.sampled_from(files))
        intact = path.read_bytes()
        place = data.draw(st.integers(0, len(intact) - 1))
        harmed = bytearray(intact[:place] if cut else intact)
        if not cut:
            harmed[place] ^= 1 << bit
        path.write_bytes(harmed)
        assert verify_cache(sample=0, cache_dir=self.cache.root).damaged
        with pytest.raises(CacheMismatch):
            self.agrees()
        path.write_bytes(intact)

    @rule()
    def verify(self) -> None:
        done = verify_cache(sample=0, cache_dir=self.cache.root)
        assert not done.damaged
        kinds = {finding.kind for finding in done.findings}
        known, now = {path: key for path, (_, key) in (self.table or {}).items()}, self.wished()
        assert ("orphaned" in kinds) == bool(self.rows - set(known.values()))
        assert ("unreadable" in kinds) == any(path not in now for path in known)
        assert ("changed" in kinds) == any(path in now and now[path][1] != key for path, key in known.items())

    @rule()
    def collect_garbage(self) -> None:
        named = {key for _, key in (self.table or {}).values()}
        done = collect_garbage(unused=True, cache_dir=self.cache.root)
        assert not done.skipped
        if named.isdisjoint(self.rows | self.failed):
            self.rows, self.failed = set(), set()

    # what must hold after every step

    @property
    def wanted(self) -> set[bytes]:
        return {key_of(content) for content in self.files.values()}

    @property
    def good(self) -> set[bytes]:
        return {key_of(content) for content in self.files.values() if not content.startswith(b"bad")}

    def wished(self) -> dict[str, tuple[str, bytes]]:
        return {f"{label}/{name}": (label, key_of(content)) for (label, name), content in self.files.items()}

    def stored(self) -> dict[str, tuple[str, bytes]] | None:
        tables = [self.cache.read_dataset(name) for name in self.cache.datasets()]
        if not tables:
            return None
        assert len(tables) == 1
        splits: dict[bytes, set[str]] = {}
        for sample in tables[0].samples:
            splits.setdefault(sample.key, set()).add(sample.split)
        assert all(len(found) == 1 for found in splits.values()), "one image in two splits"
        return {sample.path: (sample.label or "", sample.key) for sample in tables[0].samples}

    def finished(self) -> None:
        self.rows |= self.good
        self.failed |= self.wanted - self.good
        self.table = self.wished()
        assert (self.space.pending_shards, self.space.interrupted) == (0, False)
        assert not list(self.space.folder.rglob(".tmp-*"))
        assert (self.cache.latest() or {})["spaces"] == [self.space.folder.name]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "rows"):
            return
        self.cache.latest()
        self.cache.spaces()
        assert self.space.interrupted in (True, False)
        assert read_all(self.space) == self.rows
        assert self.space.view().failures == dict.fromkeys(self.failed, RECORD)
        assert self.stored() == self.table


CacheMachine.TestCase.settings = settings(
    max_examples=tier(12, 500),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=tier(True, False),
    phases=tier((Phase.generate,), (Phase.generate, Phase.shrink)),  # shrinking takes minutes
    database=None,
    print_blob=True,
)
TestCache = pytest.mark.timeout(3600)(CacheMachine.TestCase)
