"""Files made to harm: refused with exit 2 or 4 in one line, and nothing outside of what the user named is opened."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from embedpipe.backbones import load_backbone, save_model
from embedpipe.cache import Cache
from embedpipe.cache._datasets import write_table
from embedpipe.cache._sealed import seal
from embedpipe.data import Manifest, Sample, Source
from embedpipe.errors import CacheMismatch, ModelMismatch
from embedpipe.provenance import fingerprint
from tests.cache.test_hostile import CRAFTS, KEYS, X, forge, replace
from tests.conftest import TINY, Run, write_photo

from ._tracing import opened, trace

SPEC = {"schema": 1, "source": "timm", "architecture": "resnet18"}
REFUSED = (2, 4)


# HDF5 -------------------------------------------------------------------------------------------------------------


def external_features(file: h5py.File, outside: Path) -> None:
    file.create_dataset("features", X.shape, "<f4", external=[(str(outside), 0, X.nbytes)])


def virtual_features(file: h5py.File, outside: Path) -> None:
    layout = h5py.VirtualLayout(shape=X.shape, dtype="<f4")
    layout[:] = h5py.VirtualSource(str(outside), "features", shape=X.shape)
    file.create_virtual_dataset("features", layout)


def external_group(file: h5py.File, outside: Path) -> None:
    del file["failed"]
    file["failed"] = h5py.ExternalLink(str(outside), "/")


def linked_group(file: h5py.File, outside: Path) -> None:
    file.move("failed", "kept")
    file["failed"] = h5py.SoftLink("/kept")


def root_in_itself(file: h5py.File, outside: Path) -> None:
    file["again"] = file["/"]


def compound(file: h5py.File, outside: Path) -> None:
    replace(file, "keys", data=np.zeros((4, 32), [("a", "u1"), ("b", "u1")]))


def references(file: h5py.File, outside: Path) -> None:
    replace(file, "keys", data=np.full((4, 32), file["blocks"].ref, h5py.ref_dtype), dtype=h5py.ref_dtype)


def regions(file: h5py.File, outside: Path) -> None:
    replace(file, "keys", shape=(4, 32), dtype=h5py.regionref_dtype)


def vlen_texts(file: h5py.File, outside: Path) -> None:
    replace(file, "failed/reason", data=["a" * 100], dtype=h5py.string_dtype())


def vlen_arrays(file: h5py.File, outside: Path) -> None:
    replace(file, "keys", shape=(4, 32), dtype=h5py.vlen_dtype(np.uint8))


def opaque(file: h5py.File, outside: Path) -> None:
    replace(file, "keys", data=np.zeros((4, 32), "V1"))


def array_type(file: h5py.File, outside: Path) -> None:
    replace(file, "keys", shape=(4,), dtype="(32,)u1")


def big_endian_blocks(file: h5py.File, outside: Path) -> None:
    replace(file, "blocks", data=np.zeros((2, 32), ">u2"))


def float64(file: h5py.File, outside: Path) -> None:
    file["features"] = X.astype("<f8")


def unknown_filter(file: h5py.File, outside: Path) -> None:
    del file["keys"]
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((4, 32))
    creation.set_filter(32999, h5py.h5z.FLAG_OPTIONAL, (1, 2))
    h5py.h5d.create(file.id, b"keys", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((4, 32)), creation)


def compact(file: h5py.File, outside: Path) -> None:
    del file["keys"]
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.COMPACT)
    h5py.h5d.create(file.id, b"keys", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((4, 32)), creation)


def product_wraps(file: h5py.File, outside: Path) -> None:
    replace(file, "keys", shape=(1 << 60, 32), maxshape=(None, 32), chunks=(1, 32), dtype="u1")


def unlimited(file: h5py.File, outside: Path) -> None:
    replace(file, "blocks", data=np.zeros((2, 32), "u1"), maxshape=(None, 32))


def many_dimensions(file: h5py.File, outside: Path) -> None:
    replace(file, "keys", data=np.zeros((1,) * 32, "u1"))


def huge_text(file: h5py.File, outside: Path) -> None:
    file.attrs["spec"] = np.full(60000, b"x", "S1")


def many_attributes(file: h5py.File, outside: Path) -> None:
    for number in range(200):
        file.attrs[f"more {number}"] = np.full(50, number)


def named_type(file: h5py.File, outside: Path) -> None:
    file["type"] = np.dtype("<f4")


def deep_groups(file: h5py.File, outside: Path) -> None:
    file.create_group("/".join("a" * 200))


def odd_name(file: h5py.File, outside: Path) -> None:
    file["../../outside"] = np.zeros(3)


Craft = Callable[[h5py.File, Path], None]
MORE_CRAFTS: list[Craft] = [
    external_features, virtual_features, external_group, linked_group, root_in_itself, compound, references, regions,
    vlen_texts, vlen_arrays, opaque, array_type, big_endian_blocks, float64, unknown_filter, compact, product_wraps,
    unlimited, many_dimensions, huge_text, many_attributes, named_type, deep_groups, odd_name,
]  # fmt: skip

OPEN_EACH = """
import sys
from pathlib import Path
from embedpipe.cache import Cache
from embedpipe.backbones import load_backbone, save_model
from embedpipe.errors import CacheMismatch, ModelMismatch
refused = served = 0
for root in sorted(Path(sys.argv[1]).glob("crafted-*")):
    try:
        for space in Cache(root).spaces():
            view = space.view()
            view.read(key.tobytes() for key in view.keys)
        print("served", root.name)
    except CacheMismatch as exc:
        assert "secret" not in str(exc) and chr(10) not in str(exc)
        refused += 1
print("refused", refused)
"""


def forge_each(tmp_path: Path, crafts: list[Craft]) -> Path:
    """Put a forged file into a cache of its own for each craft; return the file that they lead to."""
    outside = tmp_path / "outside.h5"
    with h5py.File(outside, "w") as file:
        file["keys"], file["features"] = np.zeros((4, 32), "u1"), X
        file["secret"] = np.frombuffer(b"secret" * 40, "u1")
    for craft in crafts:
        space = Cache(tmp_path / f"crafted-{craft.__name__}").open_space(SPEC)
        forge(space, craft, outside)
    return outside


def test_no_crafted_file_is_served_or_opens_another(tmp_path: Path) -> None:
    crafts = [*(craft for craft, _ in CRAFTS), *MORE_CRAFTS]
    outside = forge_each(tmp_path, crafts)
    done, log = trace(OPEN_EACH, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"refused {len(crafts)}\n"
    paths = opened(log)
    assert sum("/crafted-" in path for path in paths) >= len(crafts)
    assert not [path for path in paths if os.path.basename(path) == outside.name]


def test_the_tracer_sees_what_plain_hdf5_opens(tmp_path: Path) -> None:
    """Were the reader plain h5py, the test above would fail: this shows the outside file being read."""
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"secret" * 40)
    with h5py.File(tmp_path / "harmless.h5", "w") as file:
        file.create_dataset("keys", (4, 32), "u1", external=[(str(outside), 0, 128)])
    code = "import sys, h5py; print(h5py.File(sys.argv[1] + '/harmless.h5')['keys'][:].tobytes()[:6])"
    done, log = trace(code, tmp_path)
    assert done.stdout == "b'secret'\n"
    assert str(outside) in opened(log)


def table(**changes: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Return a craft that changes arrays (or, in capitals, attributes) of a sample table."""

    def craft(arrays: dict[str, Any], attrs: dict[str, Any]) -> None:
        for name, value in changes.items():
            (attrs if name.isupper() else arrays)[name.lower().replace("__", "/")] = value

    return craft


TABLES = {
    "fewer paths": table(path=np.array([b"a"])),
    "other width of keys": table(key=np.zeros((2, 31), np.uint8)),
    "a source that is none": table(source=np.array([0, 7], "<i4")),
    "a source below none": table(source=np.array([0, -1], "<i4")),
    "a source less": table(sources__root=np.array([b"/a", b"/b"])),
    "texts of objects": table(label=np.array(["a", "b"], object)),
    "a name that is no hex": table(NAME=np.bytes_(b"zz")),
    "a name of lists": table(NAME=np.zeros(3, "<i8")),
    "numbers as floats": table(source=np.zeros(2, "<f8")),
    "two dimensions": table(path=np.full((2, 2), b"a")),
    "one column more": table(payload=np.zeros(3, "u1")),
}


@pytest.mark.parametrize("name", TABLES)
def test_forged_sample_tables_are_refused(tmp_path: Path, run: Run, name: str) -> None:
    cache = Cache(tmp_path / "work" / "cache")
    samples = tuple(Sample(f"{i}.png", "a", "train", None, bytes([i]) * 32) for i in range(2))
    path = cache.root / "datasets" / "photos-0123456789ab.h5"
    write_table(path, Manifest("photos", (Source("/a", Path("/a")),), samples, ("a",), 0, (), ()))
    assert len(cache.read_dataset("photos").samples) == 2
    forge_table(path, TABLES[name])
    ended = run("fit-head", "photos")
    assert ended.code == 4, ended.err
    assert "damaged or foreign" in ended.line


def forge_table(path: Path, craft: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    with h5py.File(path) as real:
        arrays: dict[str, Any] = {}
        real.visititems(lambda name, one: arrays.update({name: one[()]}) if isinstance(one, h5py.Dataset) else None)
        attrs = dict(real.attrs)
    craft(arrays, attrs)
    forged = path.with_suffix(".forged")
    with h5py.File(forged, "w", libver="earliest", userblock_size=512) as file:
        for name, value in arrays.items():
            dtype = h5py.string_dtype() if value.dtype == object else None
            file.create_dataset(name, data=value, dtype=dtype)
        for name, value in attrs.items():
            file.attrs[name] = value
    path.write_bytes(seal(forged.read_bytes(), 0))
    forged.unlink()


@pytest.mark.parametrize(
    "change",
    [
        {"feature_dim": -1}, {"feature_dim": "8"}, {"feature_dim": 8.0}, {"dtype": "object"}, {"dtype": "float64"},
        {"dtype": ["float32"]}, {"environments": [1]}, {"environments": "abc"}, {"pins": [1]}, {"name": None},
        {"more": 1}, {"spec": []}, {"format_version": "1"}, {"format_version": 99},
    ],
)  # fmt: skip
def test_a_forged_record_of_a_space_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """Its seal is computed again, as a forger would."""
    space = Cache(tmp_path).open_space(SPEC)
    with space.writer(feature_dim=8, dtype="float32", environment={}, pins={}) as writer:
        writer.append(KEYS, X)
        writer.finish()
    path = space.folder / "meta.json"
    fields = {name: value for name, value in json.loads(path.read_bytes()).items() if name != "seal"} | change
    path.write_text(json.dumps({**fields, "seal": fingerprint(fields)}, indent=1, sort_keys=True) + "\n")
    with pytest.raises(CacheMismatch):
        space.view()


def test_the_record_of_the_latest_names_no_table_elsewhere(tmp_path: Path, run: Run) -> None:
    cache = Cache(tmp_path / "work" / "cache")
    elsewhere = tmp_path / "elsewhere.h5"
    write_table(elsewhere, Manifest("x", (Source("/a", Path("/a")),), (), ("a",), 0, (), ()))
    for name in (str(elsewhere.with_suffix("")), "../../../elsewhere"):
        cache.set_latest(name, [])
        ended = run("fit-head")
        assert ended.code == 2, ended.err
        assert "no data set" in ended.line


# Pickles ----------------------------------------------------------------------------------------------------------


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


def payloads(folder: Path, made: Path) -> Iterator[Path]:
    """Write files that run code when unpickled, under every name that weights may have."""
    state = {"conv1.weight": torch.zeros(2), "payload": Payload(made)}
    for name in ("plain.pth", "plain.pt", "plain.safetensors", "plain.bin", "plain"):
        (folder / name).write_bytes(pickle.dumps(state))
        yield folder / name
    for protocol, zipped in ((2, True), (2, False), (4, True)):
        path = folder / f"torch-{protocol}-{zipped}.pth"
        torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        yield path
    torch.save(torch.nn.Linear(2, 2), folder / "module.pth")
    yield folder / "module.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "script.pt")
    yield folder / "script.pt"


@pytest.mark.filterwarnings("ignore")
def test_weights_run_no_code(tmp_path: Path, run: Run) -> None:
    photo, made = write_photo(tmp_path / "photos" / "a.png", (1, 2, 3), 0), tmp_path / "made"
    (tmp_path / "weights").mkdir()
    for path in payloads(tmp_path / "weights", made):
        ended = run("extract", photo.parent, "--backbone", "timm:test_resnet", "--weights", path)
        assert ended.code in REFUSED, (path.name, ended.err)
        assert ended.line
        assert not made.exists(), path.name
    pickle.loads(pickle.dumps(Payload(made)))
    assert made.is_dir()  # the payload does work


@pytest.mark.timeout(300)
def test_a_stored_run_is_never_unpickled(tmp_path: Path, run: Run, photos: Path) -> None:
    assert run("extract", photos, *TINY).code == 0
    assert run("fit-head", "--json").code == 0
    (folder,) = (tmp_path / "work" / "runs").iterdir()
    made, image = tmp_path / "made", photos / "red" / "000.png"
    bombs = [pickle.dumps(Payload(made)), b"[" * 100_000, b"\xff\xfe", b"", b"null", b'{"verb": 1}', b"9" * 9000]
    bombs += [b'{"verb": 1, "reference": {}}', b'{"verb": 1, "reference": {"spec": 1, "loader": 1, "exec": 1}}']
    for name in sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors")):
        if name == "metrics.json":
            continue
        intact = (folder / name).read_bytes()
        for bomb in bombs:
            (folder / name).write_bytes(bomb)
            ended = run("predict", folder, image)
            assert ended.code in REFUSED, (name, bomb[:20], ended.err)
            assert ended.line
            assert not made.exists(), name
        (folder / name).write_bytes(intact)
    assert run("predict", folder, image).code == 0


@pytest.mark.parametrize(
    "change",
    [
        {"build": {"checkpoint_path": "OUTSIDE"}}, {"build": {"pretrained": True}}, {"build": {"img_size": 32}},
        {"name": "timm:local-dir:OUTSIDE"}, {"name": "torch:x"}, {"name": 3}, {"layer": 1}, {"image_size": [64]},
        {"image_size": ["64", "64"]}, {"transform": {}}, {"transform": None}, {"build": None}, {"schema": 2},
    ],
)  # fmt: skip
def test_a_stored_model_names_nothing_else_to_load(tmp_path: Path, change: dict[str, Any]) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside.pth"
    folder.mkdir()
    backbone = load_backbone("timm:test_resnet", weights="none")
    save_model(backbone, np.zeros((2, backbone.feature_dim)), np.zeros(2), ["a", "b"], folder)
    torch.save({}, outside)
    assert load_backbone(folder).spec == backbone.spec
    path = folder / "embedpipe.json"
    stored = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps(stored).replace("OUTSIDE", str(outside)))
    with pytest.raises(ModelMismatch) as caught:
        load_backbone(folder)
    assert "\n" not in str(caught.value)


# YAML -------------------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
YAML = {
    "a call": "extract: !!python/object/apply:os.mkdir [made]",
    "a new object": "seed: !!python/object/new:os.mkdir [made]",
    "a name": "extract: {device: !!python/name:os.system}",
    "a module": "seed: !!python/module:os",
    "laughs": LAUGHS + "extract: *a59",
    "laughs as a value": LAUGHS + "extract: {layer: *a59}",
    "merged mappings": MERGES + "extract: *a11",
    "a list in itself": "extract: &a [*a]",
    "a mapping in itself": "extract: &a {device: *a}",
    "deep lists": "seed: " + "[" * 5000,
    "deep mappings": "seed: " + "{a: " * 3000 + "1" + "}" * 3000,
    "a long number": "seed: " + "9" * 5000,
    "a date that is none": "seed: 2024-99-99",
    "a key of a list": "? [a]\n: 1",
    "a key that is a number": "extract: {1: 2}",
    "a key that is nothing": "extract: {~: 2}",
    "bytes": "seed: !!binary aGFsbG8=",
    "a set": "extract: !!set {batch_size}",
    "a mapping for a number": "seed: {a: 1}",
    "a list for a number": "seed: [1, 2]",
    "a mapping for a folder": "cache_dir: {a: 1}",
    "nothing but tags": "!!python/tuple [1]",
    "control characters": "seed: \x07",
    "two documents": "seed: 1\n---\nseed: 2",
    "much": "# " + "x" * (1 << 21),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", YAML)
def test_hostile_yaml_is_one_line_at_once(tmp_path: Path, run: Run, name: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "work" / "c.yaml").write_text(YAML[name])
    started = time.monotonic()
    ended = run("extract", tmp_path / "photos", "--config", "c.yaml")
    assert ended.code == 2, ended.err
    assert len(ended.line) < 1000
    assert time.monotonic() - started < 5
    assert not (tmp_path / "work" / "made").exists()
    assert "photos" not in ended.line  # refused for its own sake


def test_no_file_is_too_large_to_be_refused(tmp_path: Path, run: Run) -> None:
    for endless in ("/dev/zero", tmp_path):
        ended = run("extract", tmp_path, "--config", endless)
        assert ended.code == 2
        assert ended.line


# Manifests --------------------------------------------------------------------------------------------------------

READ_EACH = """
import sys, glob
from embedpipe.cache import KeyIndex
from embedpipe.errors import UsageError
from embedpipe.data import read_manifest
for name in sorted(glob.glob(sys.argv[1] + "/data/*.csv") + glob.glob(sys.argv[1] + "/data/*.jsonl")):
    try:
        read_manifest([name], key_of=KeyIndex().key_of)
        print("read", name)
    except UsageError as exc:
        assert "leaves the folder" in str(exc), str(exc)
        print("refused")
"""


@pytest.fixture
def tables(tmp_path: Path) -> list[Path]:
    """Tables that name a file beside their folder: by name, and through links of all kinds."""
    data, outside = tmp_path / "data", tmp_path / "outside"
    write_photo(outside / "secret.png", (1, 2, 3), 0)
    write_photo(data / "inside" / "a.png", (1, 2, 3), 1)
    (data / "file.png").symlink_to(outside / "secret.png")
    (data / "relative.png").symlink_to("../outside/secret.png")
    (data / "folder").symlink_to(outside)
    (data / "twice").symlink_to("folder")
    (data / "up").symlink_to("..")
    (data / "inside" / "back").symlink_to("../inside/../../outside")
    ways = [
        "../outside/secret.png", "inside/../../outside/secret.png", str(outside / "secret.png"), "file.png",
        "relative.png", "folder/secret.png", "twice/secret.png", "up/outside/secret.png", "inside/back/secret.png",
        "folder/../folder/secret.png", "./folder//secret.png", "up/data/folder/secret.png", "folder/absent.png",
    ]  # fmt: skip
    made = []
    for number, way in enumerate(ways):
        made += [data / f"{number:02d}.csv", data / f"{number:02d}.jsonl"]
        made[-2].write_text(f"path\ninside/a.png\n{way}\n")
        made[-1].write_text(json.dumps({"path": way}) + "\n")
    return made


def test_no_table_reads_beside_its_folder(tmp_path: Path, tables: list[Path]) -> None:
    done, log = trace(READ_EACH, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "refused\n" * len(tables)
    paths = opened(log)
    assert sum(path.endswith((".csv", ".jsonl")) for path in paths) == len(tables)
    assert not [path for path in paths if path.endswith(".png")]


def test_the_command_reads_nothing_beside_the_folder_of_a_table(tmp_path: Path, tables: list[Path]) -> None:
    command = "import sys; from embedpipe.cli import main; main(sys.argv[2:])"
    for table in tables[::7]:
        done, log = trace(command, tmp_path, "extract", table, *TINY, "--cache-dir", tmp_path / "cache")
        assert done.returncode == 2, done.stderr
        assert str(table) in opened(log)
        assert not [path for path in opened(log) if path.endswith(".png")]


def test_a_table_that_leaves_its_folder_needs_leave(tmp_path: Path, tables: list[Path], run: Run) -> None:
    for number in (0, 3, 5):
        ended = run("extract", tmp_path / "data" / f"{number:02d}.csv", *TINY)
        assert ended.code == 2
        assert "--allow-outside" in ended.line
    ended = run("extract", tmp_path / "data" / "05.csv", *TINY, "--allow-outside", "--json")
    assert ended.data["computed"] == 2


def test_links_that_stay_below_the_table_are_followed(tmp_path: Path, run: Run) -> None:
    real = tmp_path / "real"
    write_photo(real / "a" / "1.png", (1, 2, 3), 0)
    (real / "b").symlink_to("a")
    (real / "2.png").symlink_to(real / "a" / "1.png")
    (real / "list.csv").write_text("path\na/1.png\nb/1.png\n2.png\n")
    (tmp_path / "named").symlink_to(real)  # the folder that the user names may be a link itself
    for folder in ("real", "named"):
        assert run("extract", tmp_path / folder / "list.csv", *TINY, "--json").data["images"] == 3


def test_class_folders_follow_the_links_that_the_user_put_there(tmp_path: Path, run: Run) -> None:
    write_photo(tmp_path / "elsewhere" / "1.png", (1, 2, 3), 0)
    write_photo(tmp_path / "data" / "a" / "1.png", (3, 2, 1), 0)
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    assert run("extract", tmp_path / "data", *TINY, "--json").data["classes"] == ["a", "b"]
