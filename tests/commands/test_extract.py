"""Many layers, backbones and views at once, dry runs, executors: from the command line, with random weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import embedpipe as ep
from embedpipe.errors import CacheMismatch, EmbedpipeWarning
from embedpipe.images import Transform, decode_image
from embedpipe.images._augment import AUGMENTS
from tests.conftest import TINY, Run, write_photos


def features_of(space: dict[str, Any]) -> dict[bytes, np.ndarray]:
    with h5py.File(space["features"]) as file:
        return {key.tobytes(): row for key, row in zip(file["keys"][()], file["features"][()], strict=True)}


def assert_close(found: dict[bytes, np.ndarray], expected: dict[bytes, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for key, row in expected.items():
        np.testing.assert_allclose(found[key], row, rtol=0, atol=1e-5 * np.abs(row).max())


def test_layers_and_backbones_in_one_pass_are_those_of_passes_of_their_own(run: Run, photos: Path) -> None:
    layers = ["--layer", "layer2", "--layer", "layer3"]
    together = run("extract", photos, *TINY, *layers, "--json").data
    assert [space["computed"] for space in together["spaces"]] == [36, 36]
    for space in together["spaces"]:
        alone = run("extract", photos, *TINY, "--layer", space["layer"], "--cache-dir", "alone", "--json").data
        assert alone["fingerprint"] == space["fingerprint"]
        assert_close(features_of(space), features_of(alone))


def test_two_backbones_in_one_pass(run: Run, photos: Path) -> None:
    names = ["--backbone", "timm:test_resnet", "--backbone", "timm:test_vit", "--weights", "none"]
    together = run("extract", photos, *names, "--json").data
    assert [space["backbone"] for space in together["spaces"]] == ["timm:test_resnet", "timm:test_vit"]
    for space in together["spaces"]:
        one = ["--backbone", space["backbone"], "--weights", "none", "--cache-dir", "alone"]
        assert_close(features_of(space), features_of(run("extract", photos, *one, "--json").data))


def test_all_layers_and_what_is_there_already(run: Run, photos: Path) -> None:
    run("extract", photos, *TINY, "--layer", "layer2", "--limit", 10)
    spaces = run("extract", photos, *TINY, "--layer", "all", "--json").data["spaces"]
    assert [space["layer"] for space in spaces][-4:] == ["layer1", "layer2", "layer3", "layer4"]
    assert {space["layer"]: (space["computed"], space["reused"]) for space in spaces}["layer2"] == (26, 10)
    assert all(space["rows"] == 36 for space in spaces)
    again = run("extract", photos, *TINY, "--layer", "all", "--json").data
    assert [space["reused"] for space in again["spaces"]] == [36] * len(spaces)


def test_what_is_asked_for_twice_is_computed_once(run: Run, photos: Path) -> None:
    twice = ["--backbone", "test_resnet", "--layer", "layer2", "--layer", "all"]
    found = run("extract", photos, *TINY, *twice, "--json").data
    folders = [space["space"] for space in found["spaces"]]
    assert len(set(folders)) < len(folders)
    assert all(space["rows"] == 36 for space in found["spaces"])


def test_a_backbone_handed_over_takes_layer_and_pool(photos: Path) -> None:
    import embedpipe as ep

    backbone = ep.load_backbone("timm:test_resnet", weights="none")
    names = {
        pool: ep.extract(photos, backbone, layer=("layer2",), pool=pool).summary["fingerprint"]
        for pool in ("avg", "max")
    }
    assert names["avg"] != names["max"]


class Untraceable(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not images.is_meta and torch.jit.is_tracing():
            raise RuntimeError("not to be traced")
        return images.mean((2, 3))


def test_an_interrupted_extraction_whose_executor_fails_here_is_refused(photos: Path, tmp_path: Path) -> None:
    odd = ep.load_backbone(Untraceable(), transform=Transform((16, 16), 16))
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache"}
    interrupt(ep.extract(photos / "red", odd, **options).space.folder, executor="openvino", batch_size=2)
    with pytest.warns(EmbedpipeWarning, match="openvino cannot run"), pytest.raises(CacheMismatch) as refused:
        ep.extract(photos, odd, **options)
    assert refused.value.exit_code == 4
    assert "was interrupted under" in str(refused.value)


def test_a_second_run_chooses_by_what_the_first_ones_took(photos: Path, tmp_path: Path) -> None:
    """Two named runs leave a record each; auto takes the one that the records say is faster, without a trial."""
    from embedpipe.inference._executor_selection import read_records, record

    many = write_photos(tmp_path / "many", per_class=25)
    options: dict[str, Any] = {"weights": "none", "cache_dir": tmp_path / "cache"}
    for executor in ("eager", "openvino"):
        features = ep.extract(many, "timm:test_resnet", executor=executor, **options)
        shutil.rmtree(features.space.folder)
    (memo,) = (tmp_path / "cache" / "graphs").glob("*.json")
    assert {name: sorted(known) for name, known in read_records(memo).items()} == {
        "eager": ["run_s"],
        "openvino": ["run_s", "warm_up_s"],
    }
    for slow, fast in (("eager", "openvino"), ("openvino", "eager")):
        for _ in range(5):
            record(memo, slow, "run_s", 1e3)
            record(memo, fast, "run_s", 1e-3)
        features = ep.extract(many, "timm:test_resnet", **options)
        assert features.summary["executor"] == fast
        shutil.rmtree(features.space.folder)


def test_a_known_failure_of_one_space_is_one_of_the_other(run: Run, photos: Path) -> None:
    (photos / "red" / "000.png").write_bytes(b"no image")
    assert run("extract", photos, *TINY, "--layer", "layer2").code == 3
    ended = run("extract", photos, *TINY, "--layer", "layer2", "--layer", "layer3", "--json")
    assert ended.code == 3
    assert [len(space["failed"]) for space in ended.data["spaces"]] == [1, 1]


def test_views_are_of_training_images_only_and_change_with_seed_and_kind(run: Run, photos: Path) -> None:
    found = run("extract", photos, *TINY, "--views", 2, "--json").data
    train = found["splits"]["train"]
    assert [(space["view"], space["rows"]) for space in found["spaces"]] == [(0, 36), (1, train), (2, train)]
    rows = [features_of(space) for space in found["spaces"]]
    for key in rows[1]:
        assert len({row[key].tobytes() for row in rows}) == 3
    others = [["--seed", 1], ["--augment", "flip"], ["--augment", "strong"]]
    names = [
        run("extract", photos, *TINY, "--views", 1, *other, "--json").data["spaces"][1]["space"] for other in others
    ]
    assert len({*names, found["spaces"][1]["space"]}) == 4
    again = run("extract", photos, *TINY, "--views", 2, "--cache-dir", "again", "--json").data
    for space, row in zip(again["spaces"], rows, strict=True):
        assert {k: v.tobytes() for k, v in features_of(space).items()} == {k: v.tobytes() for k, v in row.items()}
    assert run("fit-head", "--json").data["n_train"] == train  # on the clean ones


def test_a_view_has_another_identity_than_the_image(run: Run, photos: Path) -> None:
    usual = run("extract", photos, *TINY, "--json").data["fingerprint"]
    views = run("extract", photos, *TINY, "--views", 1, "--json").data["spaces"]
    assert views[0]["fingerprint"] == usual != views[1]["fingerprint"]


@pytest.mark.parametrize("name", AUGMENTS)
def test_a_view_is_the_same_for_the_same_image_seed_and_number(photos: Path, name: str) -> None:
    image = decode_image((photos / "red" / "000.png").read_bytes())

    def view(number: int, key: str, seed: int = 0) -> bytes:
        transform = Transform((32, 32), 36, augment=name, view=number, seed=seed)
        return transform.window(image, key).tobytes()

    first = [view(n, "a") for n in range(1, 9)]
    assert [view(n, "a") for n in range(1, 9)] == first
    assert first != [view(n, "b") for n in range(1, 9)]
    assert first != [view(n, "a", seed=1) for n in range(1, 9)]
    assert len(set(first)) > (1 if name == "flip" else 7)


@pytest.mark.parametrize(("augment", "view"), [("none", 1), ("flip", 0), ("twirl", 1)])
def test_views_that_make_no_sense(augment: str, view: int) -> None:
    with pytest.raises(ValueError, match="expected view 0"):
        Transform((32, 32), 36, augment=augment, view=view)


def test_a_dry_run_writes_nothing_and_tells_hits_and_misses(run: Run, photos: Path, tmp_path: Path) -> None:
    def names() -> list[str]:
        return sorted(str(path) for path in tmp_path.rglob("*"))

    before = names()
    plan = run("extract", photos, *TINY, "--layer", "layer2", "--layer", "layer3", "--dry-run", "--json").data
    assert names() == before
    assert (plan["images"], plan["hits"], plan["misses"]) == (36, 0, 72)
    assert plan["bytes"] == sum(36 * (4 * space["feature_dim"] + 32) for space in plan["spaces"])
    assert plan["seconds_expected"] > 0
    run("extract", photos, *TINY, "--layer", "layer2", "--limit", 12)
    plan = run("extract", photos, *TINY, "--layer", "layer2", "--dry-run", "--json").data
    assert (plan["hits"], plan["misses"]) == (12, 24)
    run("extract", photos, *TINY, "--layer", "layer2")
    before = names()
    plan = run("extract", photos, *TINY, "--layer", "layer2", "--dry-run", "--json").data
    assert (plan["hits"], plan["misses"], plan["bytes"], plan["seconds_expected"]) == (36, 0, 0, 0)
    assert names() == before
    assert "nothing was written" in run("extract", photos, *TINY, "--dry-run").out


def test_openvino_gives_the_features_of_eager_torch(run: Run, photos: Path) -> None:
    eager = run("extract", photos, *TINY, "--executor", "eager", "--json").data
    other = run("extract", photos, *TINY, "--executor", "openvino", "--cache-dir", "other", "--json").data
    assert (eager["executor"], other["executor"]) == ("eager", "openvino")
    assert eager["fingerprint"] == other["fingerprint"]
    assert 0 < other["executor_difference"] < 1e-5
    assert_close(features_of(other), features_of(eager))


def test_an_interrupted_extraction_goes_on_with_its_executor(
    run: Run, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    import signal
    import time

    many = write_photos(tmp_path / "many", per_class=150)
    whole = run("extract", many, *TINY, "--executor", "openvino", "--cache-dir", "whole", "--json").data
    process = start("extract", many, *TINY, "--executor", "openvino", "--shard-rows", 8, "--workers", 1)
    shards = Path("cache/spaces")
    deadline = time.monotonic() + 300
    while not list(shards.glob("*/shards/[!.]*.h5")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 5
    (meta,) = shards.glob("*/meta.json")
    assert json.loads(meta.read_text())["pins"]["executor"] == "openvino"
    resumed = run("extract", many, *TINY, "--json").data
    assert resumed["executor"] == "openvino"
    assert 0 < resumed["computed"] < 450
    assert Path(resumed["features"]).read_bytes() == Path(whole["features"]).read_bytes()


def test_advice_names_what_to_change(run: Run, photos: Path) -> None:
    found = run("extract", photos, *TINY, "--json").data
    assert found["bottleneck"] in ("decode", "forward", "commit")
    assert found["advice"]
    assert run("extract", photos, *TINY, "--json").data["advice"] == ""


def test_a_negative_number_of_views(run: Run, photos: Path) -> None:
    ended = run("extract", photos, *TINY, "--views", -1)
    assert (ended.code, "--views is -1" in ended.err) == (2, True)
    assert not os.path.exists("cache")


def test_one_layer_may_be_named_without_a_list(photos: Path, tmp_path: Path) -> None:
    named = [
        ep.extract(photos, "timm:test_resnet", weights="none", layer=layer, cache_dir=tmp_path / "cache").space.folder
        for layer in ("layer1", ("layer1",))
    ]
    assert named[0] == named[1]


def interrupt(space: Path, **pins: Any) -> dict[str, Any]:
    """Let a space say that its extraction was interrupted under other pins, and return these."""
    from dataclasses import replace

    from embedpipe.cache._meta import read_meta, write_meta

    meta = read_meta(space)
    assert meta is not None
    environments = tuple({**one, "pins": {**one["pins"], **pins}} for one in meta.environments)
    changed = replace(meta, environments=environments, pins={**meta.environments[-1]["pins"], **pins})
    write_meta(space, changed)
    return dict(changed.pins or {})


def test_the_removed_executor_means_auto(run: Run, photos: Path) -> None:
    done = run("extract", photos, *TINY, "--executor", "fused", "--json")
    assert (done.code, done.data["executor"]) == (0, "eager")
    assert [text for text in done.envelope["warnings"] if "--executor fused is no longer used" in text]
    with pytest.warns(EmbedpipeWarning, match="--executor fused is no longer used"):
        assert ep.extract(photos, "timm:test_resnet", weights="none", executor="fused").summary["reused"] == 36


def test_complete_spaces_of_the_removed_executor_are_served(run: Run, photos: Path) -> None:
    space = Path(run("extract", photos / "red", *TINY, "--json").data["space"])
    interrupt(space, executor="fused")
    from dataclasses import replace

    from embedpipe.cache._meta import read_meta, write_meta

    meta = read_meta(space)
    assert meta is not None
    write_meta(space, replace(meta, pins=None))
    served = run("extract", photos / "red", *TINY, "--json")
    assert (served.data["computed"], served.data["reused"], served.envelope["warnings"]) == (0, 12, [])
    more = run("extract", photos, *TINY, "--json").data
    assert (more["computed"], more["reused"]) == (24, 12)


def test_an_extraction_that_the_removed_executor_began_starts_again(run: Run, photos: Path) -> None:
    whole = run("extract", photos, *TINY, "--cache-dir", "whole", "--json").data
    space = Path(run("extract", photos / "red", *TINY, "--json").data["space"])
    (space / "shards" / f"{1:08d}-{'0' * 32}.h5").write_bytes((space / "features.h5").read_bytes())
    (space / "features.h5").unlink()  # as it was before the merge
    interrupt(space, executor="fused", batch_size=8)
    again = run("extract", photos, *TINY, "--json")
    assert (again.code, again.data["computed"], again.data["reused"]) == (0, 36, 0)
    assert [text for text in again.envelope["warnings"] if "are computed again" in text]
    assert Path(again.data["features"]).read_bytes() == Path(whole["features"]).read_bytes()
    assert run("extract", photos, *TINY, "--json").data["reused"] == 36
