"""`--pixels` is gone: `exact` is what happens anyway, `fast` an error; rows that `fast` made are served, new ones are not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedpipe as ep
from embedpipe.backbones import load_backbone, load_model, save_model
from embedpipe.cache import Cache, Space
from embedpipe.errors import EmbedpipeWarning, ModelMismatch, UsageError
from embedpipe.images import Transform
from embedpipe.provenance import fingerprint
from tests.conftest import TINY, Run, write_photo

UNUSED = "--pixels is no longer used"
AGAIN = "embedpipe extract DATA --backbone timm:test_resnet --weights none"


def test_the_identity_of_a_transform_is_what_it_was() -> None:
    clean, view = Transform((224, 224), 256), Transform((224, 224), 256, augment="strong", seed=3, view=2)
    assert fingerprint(clean.to_dict()) == "28b5d658e19fa8847c939516061800076b46d636a3a39afe0c85bbdcf80aa8a8"
    assert fingerprint(view.to_dict()) == "fd50be5806bc29e3fb01582e8bea054412ffefe077bb726ef02b08e7525ab4ec"
    assert list(clean.to_dict())[6:9] == ["channels", "pixels", "orientation"]
    assert Transform.from_dict(clean.to_dict()) == clean
    with pytest.raises(ValueError, match=r"the stored transform has \{'pixels': 'fast'\}, expected"):
        Transform.from_dict({**clean.to_dict(), "pixels": "fast"})


def test_exact_is_a_warning_where_it_is_given(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run("extract", photos, *TINY, "--json")
    assert plain.envelope["warnings"] == []
    loader = json.loads((Path(plain.data["space"]) / "meta.json").read_text())["environments"][0]["loader"]
    assert loader["pixels"] == "exact"
    given = run("extract", photos, *TINY, "--pixels", "exact", "--json")
    assert given.code == 0
    assert given.data["fingerprint"] == plain.data["fingerprint"]
    assert given.data["computed"] == 0
    [warning] = given.envelope["warnings"]
    assert warning.startswith(UNUSED)
    assert UNUSED in run("cache", "why", photos, *TINY, "--pixels", "exact").err
    Path("settings.yaml").write_text("extract: {pixels: exact}\n")
    assert UNUSED in run("extract", photos, *TINY, "--config", "settings.yaml").err
    monkeypatch.setenv("EMBEDPIPE_EXTRACT_PIXELS", "exact")
    assert UNUSED in run("extract", photos, *TINY).err


def test_fast_is_an_error(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("settings.yaml").write_text("extract: {pixels: fast}\n")
    ends = [
        run("extract", photos, *TINY, "--pixels", "fast"),
        run("extract", photos, *TINY, "--config", "settings.yaml"),
        run("cache", "why", photos, *TINY, "--pixels", "fast"),
    ]
    monkeypatch.setenv("EMBEDPIPE_EXTRACT_PIXELS", "fast")
    ends.append(run("extract", photos, *TINY))
    for ended in ends:
        assert ended.code == 2
        assert ended.line.startswith("error: --pixels fast was removed: ")
        assert ended.line.endswith("expected no --pixels or --pixels exact; leave --pixels out")
    assert not Path("cache").exists()


def test_the_same_from_python(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights": "none", "cache_dir": tmp_path / "cache"}
    with pytest.raises(UsageError, match="--pixels fast was removed"):
        ep.extract(photos, "timm:test_resnet", pixels="fast", **options)
    with pytest.raises(UsageError, match="--pixels fast was removed"):
        load_backbone("timm:test_resnet", weights="none", pixels="fast")
    with pytest.warns(EmbedpipeWarning, match=UNUSED):
        ep.extract(photos, "timm:test_resnet", pixels="exact", **options)


@pytest.fixture
def fast(run: Run, photos: Path) -> Space:
    """The only space of the cache, as a version that knew `--pixels fast` wrote it."""
    made = run("extract", photos, *TINY, "--json").data
    cache = Cache(Path("cache"))
    exact = cache.find_space(Path(made["space"]).name)
    spec = {**exact.spec, "transform": {**exact.spec["transform"], "pixels": "fast"}}
    environment = {**exact.environments[0], "loader": {**exact.loader, "pixels": "fast"}}
    space = cache.open_space(spec)
    view = exact.view()
    with space.writer(feature_dim=made["feature_dim"], dtype="float32", environment=environment, pins={}) as writer:
        writer.append([key.tobytes() for key in view.keys], view.read([key.tobytes() for key in view.keys]))
        writer.finish()
    cache.set_latest(made["dataset"], [space.folder.name])
    shutil.rmtree(exact.folder)
    return space


def test_rows_that_are_cached_are_served(run: Run, photos: Path, fast: Space) -> None:
    fitted = run("fit-head", "--json")
    assert fitted.code == 0
    assert json.loads(Path(fitted.data["folder"], "run.json").read_text())["reference"]["spec"] == fast.spec
    predicted = run("predict", fitted.data["run"], photos / "red", "--json")
    assert predicted.code == 0
    assert len(predicted.data["predictions"]) == 12
    assert run("cache", "export").code == 0
    assert run("cache", "ls").code == 0
    verified = run("cache", "verify", "--json")
    assert verified.code == 0
    assert "--pixels fast, which was removed" in verified.out
    assert run("extract", photos, *TINY, "--json").data["computed"] == 36  # in a space of its own


def test_what_has_to_be_decoded_anew_is_refused(run: Run, photos: Path, fast: Space, tmp_path: Path) -> None:
    run_id = run("fit-head", "--json").data["run"]
    new = write_photo(tmp_path / "new.png", (9, 9, 9), 1)
    ends = [run("predict", run_id, new), run("finetune", run_id, "--unfreeze", "layer4"), run("advise")]
    ends.append(run("export", run_id, "--format", "torch"))
    for ended in ends:
        assert ended.code == 4, ended.err
        assert "features of timm:test_resnet were extracted with --pixels fast, which was removed" in ended.line
        assert f"extract again with `{AGAIN}`" in ended.line
    lacking = run("fit-head", "--layer", "layer2")
    assert lacking.code == 2
    assert "--pixels" not in lacking.line
    assert "embedpipe extract" in lacking.line


def test_a_model_whose_transform_was_fast_is_refused(tmp_path: Path) -> None:
    backbone = load_backbone("timm:test_resnet", weights="none")
    fast = replace(backbone, spec={**backbone.spec, "transform": {**backbone.spec["transform"], "pixels": "fast"}})
    save_model(fast, np.zeros((2, fast.feature_dim), np.float32), np.zeros(2, np.float32), ["a", "b"], tmp_path)
    with pytest.raises(ModelMismatch, match=r"'pixels': 'fast'.*extract and fine-tune again"):
        load_model(tmp_path)
    assert load_model(tmp_path, transform=backbone.transform).feature_dim == backbone.feature_dim
