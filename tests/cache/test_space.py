"""Rows are read back as they were written: through shards, merges, failures, resumes and retries."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from embedpipe.cache import Cache, Space
from embedpipe.errors import CacheMismatch, NonFiniteFeatures, Stopped, StorageError, UsageError

from .conftest import DIM, SPEC, rows, write

OPTIONS = {"feature_dim": DIM, "dtype": "float32", "environment": {}, "pins": {}}


def test_reads_what_was_written_in_any_order(space: Space) -> None:
    keys, X = rows(100)
    write(space, keys[:60], X[:60], shard_rows=16)
    write(space, keys[60:], X[60:], shard_rows=16)
    view = space.view()
    assert len(view) == 100
    assert (view.keys == sorted(map(list, keys))).all()
    assert (view.read(keys[::-1]) == X[::-1]).all()
    assert view.read(keys).dtype == np.float32
    assert keys[3] in view
    assert bytes(32) not in view
    with pytest.raises(KeyError):
        view.read([bytes(32)])


def test_nothing_is_made_before_the_first_writer(cache: Cache, space: Space) -> None:
    assert (len(space.view()), space.feature_dim, space.meta) == (0, None, None)
    assert space.view().read([]).shape[0] == 0
    assert (cache.spaces(), cache.datasets(), cache.latest()) == ([], [], None)
    assert not cache.root.exists()


def test_pending_rows_are_read_from_shards(space: Space) -> None:
    keys, X = rows(20)
    with space.writer(**OPTIONS, shard_rows=5) as writer:
        writer.append(keys[:10], X[:10])
        assert space.pending_shards == 1
        writer.append(keys[10:12], X[10:12])
        assert len(space.view()) == 10
        writer.commit()
        assert (space.view().read(keys[:12]) == X[:12]).all()
    assert not space.features_path.exists()


def test_rows_are_committed_when_the_oldest_has_waited(space: Space) -> None:
    keys, X = rows(2)
    with space.writer(**OPTIONS, commit_seconds=0) as writer:
        writer.append(keys[:1], X[:1])
        assert len(space.view()) == 1


def test_order_and_shards_do_not_change_the_file(tmp_path: Path) -> None:
    keys, X = rows(50)
    spaces = [Cache(tmp_path / name).open_space(SPEC) for name in "abc"]
    write(spaces[0], keys, X)
    write(spaces[1], keys[::-1], X[::-1], shard_rows=3)
    write(spaces[2], keys[:20], X[:20])
    write(spaces[2], keys[10:], X[10:])
    assert len({space.features_path.read_bytes() for space in spaces}) == 1


def test_plain_h5py_reads_the_documented_schema(space: Space) -> None:
    keys, X = rows(3000, 256)
    write(space, keys, X)
    with h5py.File(space.features_path) as file:
        features, stored, blocks = file["features"], file["keys"], file["blocks"]
        assert [bytes(key) for key in stored] == sorted(keys)
        assert (features[:] == X[np.argsort(keys)]).all()
        assert features.chunks is None
        assert features.id.get_offset() % 64 == 0
        raw = [features[:].tobytes(), stored[:].tobytes()]
        expected = [
            hashlib.sha256(part[start : start + (1 << 20)]).digest()
            for part in raw
            for start in range(0, len(part), 1 << 20)
        ]
        assert [bytes(block) for block in blocks] == expected
        assert file.attrs["fingerprint"].decode() == space.fingerprint
        assert (file.attrs["rows"], file.attrs["format_version"]) == (3000, 1)
        assert file.userblock_size == 512


def test_float16_is_stored_as_such(space: Space) -> None:
    keys, X = rows(5)
    write(space, keys, X, dtype="float16")
    assert space.meta is not None
    assert space.meta.dtype == "float16"
    assert (space.view().read(keys) == X.astype(np.float16)).all()
    with pytest.raises(CacheMismatch, match="8 x float16"):
        write(space, keys, X, dtype="float32")


def test_duplicates_are_dropped(space: Space) -> None:
    keys, X = rows(6)
    write(space, keys, X)
    with space.writer(**OPTIONS) as writer:
        writer.append(keys, X)
        writer.commit()
        assert len(space.view()) == 6
        writer.finish()
    assert len(space.view()) == 6


def test_failures_stay_until_forgotten_or_computed(space: Space) -> None:
    keys, X = rows(4)
    with space.writer(**OPTIONS) as writer:
        writer.append(keys[:1], X[:1])
        for key in keys[1:]:
            writer.fail(key, "decode", "trüncated\nfile", "pillow 13")
        assert space.view().failures == {}
        writer.finish()
    assert space.view().failures == dict.fromkeys(keys[1:], ("decode", "trüncated\nfile", "pillow 13"))
    with space.writer(**OPTIONS) as writer:
        writer.forget_failures(keys[1:3])
        writer.append(keys[3:], X[3:])
        writer.fail(keys[2], "decode", "again", "pillow 14")
    for _ in range(2):
        assert space.view().failures == {keys[2]: ("decode", "again", "pillow 14")}
        with space.writer(**OPTIONS) as writer:
            writer.finish()
    assert space.pending_shards == 0


def test_failures_alone_are_committed(space: Space) -> None:
    with space.writer(**OPTIONS) as writer:
        writer.fail(bytes(range(32)), "decode", "empty", "pillow 13")
        writer.finish()
    assert list(space.view().failures) == [bytes(range(32))]
    assert len(space.view()) == 0


@pytest.mark.parametrize(("dtype", "value"), [("float32", np.nan), ("float16", 70000.0)])
def test_non_finite_rows_are_refused(space: Space, dtype: str, value: float) -> None:
    keys, X = rows(4)
    X[2, 1] = value
    with space.writer(**{**OPTIONS, "dtype": dtype}) as writer:
        with pytest.raises(NonFiniteFeatures) as caught:
            writer.append(keys, X)
        assert caught.value.rows == [2]  # type: ignore[attr-defined]
        writer.finish()
    assert len(space.view()) == 0


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Stopped("SIGTERM"), ValueError])
def test_pending_rows_are_committed_on_the_way_out(space: Space, stop: BaseException) -> None:
    keys, X = rows(3)

    def interrupted() -> None:
        with space.writer(**OPTIONS) as writer:
            writer.append(keys, X)
            raise stop

    with pytest.raises(stop if isinstance(stop, type) else type(stop)):
        interrupted()
    assert (space.view().read(keys) == X).all()
    write(space, [], X[:0])


def test_pins_hold_until_the_extraction_finishes(space: Space) -> None:
    keys, X = rows(3)
    first, second = {"batch_size": 32}, {"batch_size": 64}
    with space.writer(**{**OPTIONS, "pins": first, "environment": {"torch": "1"}}) as writer:
        writer.append(keys, X)
    assert space.interrupted
    with space.writer(**{**OPTIONS, "pins": second, "environment": {"torch": "2"}}) as writer:
        assert writer.pins == first
        writer.finish()
    assert not space.interrupted
    with space.writer(**{**OPTIONS, "pins": second}) as writer:
        assert writer.pins == second
    assert space.environments == ({"torch": "1"}, {"torch": "2"}, {})


def test_a_view_stays_valid_after_a_merge(space: Space) -> None:
    keys, X = rows(12)
    with space.writer(**OPTIONS, shard_rows=1) as writer:
        for key, x in zip(keys, X, strict=True):
            writer.append([key], x[None])
        view = space.view(max_open_files=5)
        assert space.pending_shards == 12
        writer.append(keys[:1], X[:1])
        writer.finish()
    assert space.pending_shards == 0
    assert (view.read(keys) == X).all()
    assert (pickle.loads(pickle.dumps(view)).read(keys) == X).all()


def test_a_few_new_rows_do_not_rewrite_a_large_base(space: Space) -> None:
    large = {"merge_below_bytes": 0}
    keys, X = rows(1000, 512)
    write(space, keys[:600], X[:600], large)
    before = space.features_path.stat().st_ino
    write(space, keys[600:603], X[600:603], large)
    assert (space.pending_shards, space.features_path.stat().st_ino) == (1, before)
    assert (space.view().read(keys[:603]) == X[:603]).all()
    write(space, keys[603:], X[603:], large)
    assert space.pending_shards == 0
    assert (space.view().read(keys) == X).all()


def test_a_merge_streams_in_chunks(space: Space) -> None:
    keys, X = rows(50)
    write(space, keys, X, {"chunk_bytes": 100}, shard_rows=9)
    view = space.view()
    assert (view.read(keys) == X).all()
    chunks = list(view.read_chunks(keys, chunk_bytes=100))
    assert [len(chunk) for chunk in chunks] == [3] * 16 + [2]
    assert (np.concatenate(chunks) == X).all()


def test_rows_across_blocks_are_checked(space: Space) -> None:
    keys, X = rows(5, 400_000)
    write(space, keys, X)
    assert (space.view().read(keys[2:3]) == X[2]).all()


def test_spaces_are_found_by_a_unique_prefix(cache: Cache, space: Space) -> None:
    keys, X = rows(2)
    other = cache.open_space({**SPEC, "layer": "layer4"})
    write(space, keys, X)
    write(other, keys, X)
    assert {one.fingerprint for one in cache.spaces()} == {space.fingerprint, other.fingerprint}
    assert cache.find_space(space.folder.name[:-3]) == space
    with pytest.raises(UsageError, match=r"'timm' is ambiguous: it matches 2 spaces, .*use a longer prefix"):
        cache.find_space("timm")
    with pytest.raises(UsageError, match="did you mean timm-resnet18"):
        cache.find_space("tim-resnet18")


def test_a_name_without_its_digest_wins_over_longer_names(cache: Cache, space: Space) -> None:
    keys, X = rows(2)
    longer = cache.open_space({**SPEC, "architecture": "resnet18-d"})
    for one in (space, longer):
        write(one, keys, X)
    assert cache.find_space(space.folder.name.rpartition("-")[0]) == space
    assert cache.find_space(longer.folder.name.rpartition("-")[0]) == longer


def test_a_file_of_another_space_is_refused(cache: Cache, space: Space) -> None:
    keys, X = rows(2)
    other = cache.open_space({**SPEC, "layer": "layer4"})
    write(space, keys, X)
    write(other, keys, X)
    other.features_path.replace(space.features_path)
    with pytest.raises(CacheMismatch, match="belongs to the space"):
        space.view()


def test_a_root_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    space = Cache(tmp_path / "file").open_space(SPEC)
    with pytest.raises(StorageError, match="could not"):
        write(space, *rows(1))
