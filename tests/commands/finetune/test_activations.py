"""Training from activations cached at the cut is training on the images, and what cannot be kept is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import embedpipe as ep
from embedpipe.cache import Cache
from embedpipe.errors import Stopped, UsageError
from tests.commands.finetune.conftest import stop_at
from tests.conftest import write_photos

PLAIN: dict[str, Any] = {"unfreeze": "layer4", "epochs": 2, "batch_size": 8, "lr": 1e-2, "optimizer": "sgd"}


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ep.Classifier:
    """A fitted head on a tiny ResNet with random weights: mechanics only."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos")
    features = ep.extract("photos", "timm:test_resnet", weights="none")
    return ep.fit_head(features, l2=0.1, standardize=False)  # dead features would enlarge what rounding does


def head_with_large_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ep.Classifier:
    """Return a head on a ResNet in which the inputs of layer2 and layer4 are too large for float16.

    Their first convolutions divide them again, so the model computes what it would without.
    """
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos")
    backbone = ep.load_backbone("timm:test_resnet", weights="none")
    model = backbone.module.model
    for before, layer in (("layer1", "layer2"), ("layer3", "layer4")):
        model.get_submodule(before).register_forward_hook(lambda *call: call[-1] * 2.0**24)
        for name in ("conv1", "downsample.1"):
            module = model.get_submodule(f"{layer}.0.{name}")
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2.0**-24,))
    return ep.fit_head(ep.extract("photos", backbone), l2=0.1, standardize=False)


def stored(tuned: ep.Classifier) -> dict[str, torch.Tensor]:
    assert tuned.folder is not None
    return load_file(tuned.folder / "model" / "model.safetensors")


def largest_difference(one: ep.Classifier, other: ep.Classifier) -> float:
    pairs = [(tensor.double(), stored(other)[name].double()) for name, tensor in stored(one).items()]
    return max(float((a - b).abs().max()) for a, b in pairs if a.numel())


@pytest.mark.parametrize("unfreeze", ["layer4", "layer4.0.conv2", "layer2", "none"])
def test_activations_give_what_images_give(tmp_path: Path, unfreeze: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are stored in float32, so that nothing else differs."""
    head = head_with_large_activations(tmp_path, monkeypatch)
    images = ep.finetune(head, **PLAIN | {"unfreeze": unfreeze}, cache_activations="off")
    kept = ep.finetune(head, **PLAIN | {"unfreeze": unfreeze}, cache_activations="on")
    assert images.report["cut"] is None
    assert not images.report["activations"]["cached"]
    assert kept.report["cut"] == {"layer4.0.conv2": "layer4", "none": "head"}.get(unfreeze, unfreeze)
    assert kept.report["activations"]["stored_dtype"] == "float32"
    assert kept.report["epochs"][2]["train_loss"] == pytest.approx(images.report["epochs"][2]["train_loss"], abs=1e-5)
    assert kept.report["unfrozen"] == images.report["unfrozen"]
    assert largest_difference(images, kept) < 1e-5
    assert [e["val_loss"] for e in kept.report["epochs"]] == pytest.approx(
        [e["val_loss"] for e in images.report["epochs"]], abs=1e-5
    )


def test_float16_is_near_and_its_error_is_told(head: ep.Classifier) -> None:
    """Val and test are kept in float32: their scores are those of the model that is saved."""
    kept = ep.finetune(head, **PLAIN, cache_activations="on")
    told = kept.report["activations"]
    assert told["stored_dtype"] == "float16"
    assert 0 < told["float16_max_abs_diff"] < 0.05
    assert (told["rows"], told["reused"]) == (36, 0)
    assert 0 < largest_difference(ep.finetune(head, **PLAIN, cache_activations="off"), kept) < 1e-2
    manifest = Cache(Path("cache")).read_dataset(kept.dataset)
    val = [sample for sample in manifest.samples if sample.split == "val"]
    rows = kept.predict_proba([manifest.display_name(sample) for sample in val])
    truth = [manifest.classes.index(sample.label or "") for sample in val]
    losses = -np.log(rows[np.arange(len(val)), truth])
    assert kept.report["metrics"]["val"]["log_loss"] == pytest.approx(losses.mean(), abs=1e-5)


def test_activations_too_large_for_float16_stay_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_with_large_activations(tmp_path, monkeypatch)
    activations = ep.finetune(head, **PLAIN, cache_activations="on").report["activations"]
    assert (activations["stored_dtype"], activations["float16_max_abs_diff"]) == ("float32", float("inf"))


def test_a_second_run_computes_no_activation(head: ep.Classifier) -> None:
    first = ep.finetune(head, **PLAIN, cache_activations="on").report
    again = ep.finetune(head, **PLAIN | {"lr": 1e-3}, cache_activations="auto").report
    assert (first["activations"]["reused"], again["activations"]["reused"]) == (0, 36)
    assert again["activations"]["cached"]
    assert "ms per image" in again["activations"]["reason"]
    other = ep.finetune(head, **PLAIN | {"unfreeze": "layer3"}, cache_activations="on").report
    assert other["activations"]["reused"] == 0  # another cut


def test_views_are_kept_and_drawn(head: ep.Classifier) -> None:
    own = PLAIN | {"augment": "standard", "views": 3, "cache_activations": "on"}
    tuned = ep.finetune(head, **own)
    counts = head.report["metrics"]
    n_train, n_held = head.report["n_train"], counts["val"]["n"] + counts["test"]["n"]
    assert tuned.report["activations"]["rows"] == 3 * n_train + n_held
    assert tuned.report["activations"]["views"] == 3
    spaces = [space for space in Cache(Path("cache")).spaces() if "cut" in space.spec]
    assert sorted((space.spec["view"], len(space.view())) for space in spaces) == [
        *((0, n_held), (1, n_train), (2, n_train), (3, n_train))
    ]
    assert largest_difference(tuned, ep.finetune(head, **own)) == 0.0
    assert largest_difference(tuned, ep.finetune(head, **own | {"views": 1})) > 0.0
    assert largest_difference(tuned, ep.finetune(head, **PLAIN, cache_activations="on")) > 0.0


def test_spaces_of_activations_are_no_features_to_fit_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_with_large_activations(tmp_path, monkeypatch)  # in float32: one space holds every image
    ep.finetune(head, **PLAIN, cache_activations="on")
    ranked = ep.fit_head(l2=0.1, compare_layers=True)
    assert [one["layer"] for one in ranked.report["ranking"]] == ["penultimate"]
    assert ep.fit_head(l2=0.1, layer=("all",)).reference.spec == head.reference.spec


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"unfreeze": "all"}, "timm:test_resnet cannot be cut so that"),
        ({"augment": "flip"}, "--views 4 would cache four views of each"),
        ({"cutmix": 1.0}, "--cutmix changes images in every epoch"),
        ({"max_cache_size": "10KB"}, "--max-cache-size is 10.0 kB"),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_told(head: ep.Classifier, options: dict[str, Any], why: str) -> None:
    report = ep.finetune(head, **PLAIN | options).report
    assert report["cut"] is None
    assert not report["activations"]["cached"]
    assert why in report["activations"]["reason"]
    with pytest.raises(UsageError, match="cannot cache activations"):
        ep.finetune(head, **PLAIN | options, cache_activations="on")


def test_one_epoch_is_not_worth_a_file(head: ep.Classifier) -> None:
    told = ep.finetune(head, **PLAIN | {"epochs": 1, "unfreeze": "layer3"}).report["activations"]
    assert "s with activations" in told["reason"]


def test_views_of_nothing_are_refused(head: ep.Classifier) -> None:
    with pytest.raises(UsageError, match="--views 2 without --augment"):
        ep.finetune(head, **PLAIN, views=2)


def test_mixup_at_the_cut_of_a_transformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are no image; they are mixed all the same."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos")
    head = ep.fit_head(ep.extract("photos", "timm:test_vit", weights="none"), l2=0.1)
    mixed = ep.finetune(head, **PLAIN | {"unfreeze": "blocks.1", "mixup": 0.5}, cache_activations="on")
    assert mixed.report["cut"] == "blocks.1"
    assert mixed.report["activations"]["cached"]


def test_a_resumed_run_trains_on_what_it_trained_on(head: ep.Classifier) -> None:
    """Images, though the activations that were not worth a file are in the cache by now."""
    once = PLAIN | {"epochs": 1, "max_cache_size": "10KB"}
    whole = ep.finetune(head, **once)
    with pytest.raises(Stopped):
        ep.finetune(head, **once, progress=stop_at(1, Stopped("now")))
    [unfinished] = Path("runs").glob(".unfinished-*/checkpoint.pt")
    written = torch.load(unfinished, weights_only=True)
    written["options"]["max_cache_size"] = "20GB"  # nothing but what was decided then is in the way
    torch.save(written, unfinished)
    ep.finetune(head, **PLAIN, cache_activations="on")
    resumed = ep.finetune(resume=True)
    assert resumed.report["resumed"]
    assert resumed.report["activations"] == whole.report["activations"]
    assert largest_difference(resumed, whole) == 0.0
