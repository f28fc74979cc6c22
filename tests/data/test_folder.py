"""Folder layouts, names, links, and what is said when there is nothing."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from embedpipe.data import ByteSource, Manifest, list_images, read_manifest
from embedpipe.errors import UsageError


def key_of(place: ByteSource) -> bytes:
    return hashlib.sha256(place.read()).digest()


def write(root: Path, *paths: str) -> Path:
    """Write files whose content is their own path: all different."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(os.fsencode(path))
    return root


def read(*data: Path | str, **options: object) -> Manifest:
    return read_manifest(data, key_of=key_of, **options)


def facts(manifest: Manifest) -> list[tuple[str, str | None, str]]:
    return [(s.path, s.label, s.split) for s in manifest.samples]


def test_class_folders(tmp_path: Path) -> None:
    write(tmp_path, *(f"{c}/{d}{i}.png" for c in ("b", "a") for d in ("", "deep/x/") for i in range(20)))
    write(tmp_path, "README.md", "a/notes.txt")
    manifest = read(tmp_path)
    assert manifest.classes == ("a", "b")
    assert manifest.labelled
    assert [s.path for s in manifest.samples] == sorted(s.path for s in manifest.samples)
    assert all(s.label == s.path.split("/")[0] for s in manifest.samples)
    assert sum(manifest.splits.values()) == 80
    assert list(manifest.splits) == ["train", "val", "test"]
    assert manifest.ignored == 2
    assert manifest.warnings == ()
    assert manifest.samples[0].key == hashlib.sha256(b"a/0.png").digest()


def test_plain_order_of_class_names(tmp_path: Path) -> None:
    write(tmp_path, "class_2/a.png", "class_10/a.png", "Class_1/a.png")
    assert read(tmp_path).classes == ("Class_1", "class_10", "class_2")


def test_split_folders(tmp_path: Path) -> None:
    write(tmp_path, "train/a/1.png", "train/b/2.png", "Validation/a/3.png", "test/b/deep/4.png")
    assert facts(read(tmp_path)) == [
        ("Validation/a/3.png", "a", "val"),
        ("test/b/deep/4.png", "b", "test"),
        ("train/a/1.png", "a", "train"),
        ("train/b/2.png", "b", "train"),
    ]
    assert read(tmp_path, split_by="folder").splits == {"train": 2, "val": 1, "test": 1}


def test_hash_overrules_split_folders(tmp_path: Path) -> None:
    write(tmp_path, *(f"train/{c}/{i}.png" for c in "ab" for i in range(30)), "val/a/x.png")
    manifest = read(tmp_path, split_by="hash")
    assert manifest.classes == ("a", "b")
    assert set(manifest.splits) == {"train", "val", "test"}


def test_split_folders_without_classes(tmp_path: Path) -> None:
    write(tmp_path, "train/1.png", "test/2.png")
    manifest = read(tmp_path)
    assert facts(manifest) == [("test/2.png", None, "test"), ("train/1.png", None, "train")]
    assert not manifest.labelled


def test_a_class_called_train(tmp_path: Path) -> None:
    write(tmp_path, "train/1.png", "train/2.png", "bus/3.png", "bus/4.png")
    assert read(tmp_path).classes == ("bus", "train")


def test_a_folder_beside_splits_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train/a/1.png", "val/a/2.png", "extra/a/3.png", "docs/readme.txt")
    with pytest.raises(UsageError, match="'extra' beside train, val"):
        read(tmp_path)
    (tmp_path / "extra/a/3.png").unlink()
    assert read(tmp_path).splits == {"train": 1, "val": 1}


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    write(tmp_path, "2.png", "1.PNG", "3.JpEg", "x.txt")
    manifest = read(tmp_path)
    assert facts(manifest) == [(n, None, "all") for n in ("1.PNG", "2.png", "3.JpEg")]
    assert manifest.classes == ()
    assert manifest.splits == {"all": 3}


def test_images_beside_class_folders_are_left_out_aloud(tmp_path: Path) -> None:
    write(tmp_path, "cover.png", "a/1.png", "b/2.png")
    manifest = read(tmp_path)
    assert len(manifest.samples) == 2
    assert manifest.ignored == 1
    assert "'cover.png'" in manifest.warnings[0]


def test_candidates_by_extension(tmp_path: Path) -> None:
    names = "jpg jpeg jpe jfif png webp bmp gif tif tiff avif JPG".split()  # noqa: SIM905
    write(tmp_path, *(f"{i}.{name}" for i, name in enumerate(names)), "a.svg", "png", "b.heic")
    manifest = read(tmp_path)
    assert len(manifest.samples) == len(names)
    assert manifest.ignored == 3


def test_hidden_names_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "a/.2.png", ".git/3.png", "b/4.png", ".DS_Store")
    manifest = read(tmp_path)
    assert [s.path for s in manifest.samples] == ["a/1.png", "b/4.png"]
    assert manifest.ignored == 0


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    store = write(tmp_path / "store", "1.png", "2.png")
    data = write(tmp_path / "data", "b/3.png")
    (data / "a").symlink_to(store)
    (data / "b" / "up").symlink_to(data)
    (data / "b" / "self.png").symlink_to("self.png")
    manifest = read(data)
    assert [s.path for s in manifest.samples] == ["a/1.png", "a/2.png", "b/3.png"]
    assert [f.path for f in manifest.unreadable] == [f"{data}/b/self.png"]


def test_broken_link_is_unreadable_and_pipe_is_ignored(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "gone.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    manifest = read(tmp_path)
    (failure,) = manifest.unreadable
    assert failure.path == f"{tmp_path}/a/gone.png"
    assert (failure.stage, failure.reason) == ("read", "No such file or directory")
    assert manifest.ignored == 1


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff.png", "wb") as stream:
        stream.write(b"x")
    write(tmp_path, "b/1.png")
    manifest = read(tmp_path)
    odd = next(s for s in manifest.samples if s.label != "b")
    assert os.fsencode(odd.path) == b"caf\xe9/\xff.png"
    assert manifest.byte_source_of(odd).read() == b"x"
    assert manifest.classes == tuple(sorted(["b", os.fsdecode(b"caf\xe9")]))


def test_several_sources_are_one_data_set(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, "one/a/1.png", "one/b/2.png", "two/b/3.png", "two/c/4.png")
    monkeypatch.chdir(tmp_path)
    manifest = read("one", "./two/")
    assert manifest.classes == ("a", "b", "c")
    assert [manifest.display_name(s) for s in manifest.samples] == [
        "one/a/1.png",
        "one/b/2.png",
        "./two/b/3.png",
        "./two/c/4.png",
    ]
    assert manifest.byte_source_of(manifest.samples[2]) == ByteSource.from_path(tmp_path / "two/b/3.png")
    assert manifest.name == "one-and-1-more"
    assert read("one").name == "one"


def test_sources_must_agree(tmp_path: Path) -> None:
    write(tmp_path, "lab/a/1.png", "lab/b/2.png", "flat/3.png", "cut/train/a/4.png", "cut/val/a/5.png")
    with pytest.raises(UsageError, match="has labels"):
        read(tmp_path / "lab", tmp_path / "flat")
    with pytest.raises(UsageError, match="has splits"):
        read(tmp_path / "lab", tmp_path / "cut")
    assert len(read(tmp_path / "lab", tmp_path / "cut", split_by="hash").samples) == 4


def test_nothing_there(tmp_path: Path) -> None:
    write(tmp_path, "text/readme.txt", "file.png")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "missing": "does not exist",
        "empty": "no image",
        "text": "1 other files",
        "file.png": "another kind of file",
    }.items():
        with pytest.raises(UsageError, match=message) as caught:
            read(tmp_path / name)
        assert caught.value.exit_code == 2
        assert caught.value.hint
    with pytest.raises(UsageError, match="no data"):
        read()


@pytest.mark.parametrize(
    "options",
    [
        {"split_by": "colour"},
        {"split_by": "folder"},
        {"split_by": "column"},
        {"val_fraction": -0.1},
        {"val_fraction": 0.5, "test_fraction": 0.5},
        {"val_fraction": float("nan")},
        {"limit": 0},
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, object]) -> None:
    write(tmp_path, "a/1.png", "b/2.png")
    with pytest.raises(UsageError):
        read(tmp_path, **options)


def test_one_class_is_said(tmp_path: Path) -> None:
    write(tmp_path, *(f"only/{i}.png" for i in range(9)))
    assert any("one class only, 'only'" in text for text in read(tmp_path).warnings)


def test_unreadable_files_do_not_stop_the_rest(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "a/2.png", "b/3.png")

    def picky(place: ByteSource) -> bytes:
        if place.path.endswith("2.png"):
            raise PermissionError(13, "Permission denied")
        return key_of(place)

    manifest = read_manifest([tmp_path], key_of=picky)
    assert [s.path for s in manifest.samples] == ["a/1.png", "b/3.png"]
    assert manifest.unreadable[0].reason == "Permission denied"

    def refuse(place: ByteSource) -> bytes:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(UsageError, match="no image can be read, first of 3"):
        read_manifest([tmp_path], key_of=refuse)


def test_a_limit_sees_all_classes_and_grows_by_addition(tmp_path: Path) -> None:
    write(tmp_path, *(f"{c}/{i:02}.png" for c in "abc" for i in range(30)))
    small, large = read(tmp_path, limit=6), read(tmp_path, limit=30)
    assert [s.path for s in small.samples] == [f"{c}/{i:02}.png" for c in "abc" for i in range(2)]
    assert {s.path for s in small.samples} < {s.path for s in large.samples}
    assert len(large.samples) == 30


def test_a_limit_is_not_hashed_beyond(tmp_path: Path) -> None:
    write(tmp_path, *(f"a/{i}.png" for i in range(30)))
    asked: list[ByteSource] = []
    read_manifest([tmp_path], key_of=lambda place: asked.append(place) or key_of(place), limit=5)
    assert len(asked) == 5


def test_list_images(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, "d/b.png", "d/a.png", "d/x.txt", "odd.dat", "d/sub/.h.png", "d/sub/c.jpg")
    monkeypatch.chdir(tmp_path)
    assert [str(p) for p in list_images(["odd.dat", "d"])] == ["odd.dat", "d/a.png", "d/b.png", "d/sub/c.jpg"]
    with pytest.raises(UsageError, match="does not exist"):
        list_images(["gone.png"])
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="no image in none"):
        list_images(["none"])
