"""Frozen means frozen, the hand-off is exact, and what is written can be loaded by its own library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import embedpipe as ep
from embedpipe.errors import EmbedpipeError, ModelMismatch, UsageError
from embedpipe.runs import list_runs
from tests.conftest import write_photos

FAST = {"epochs": 2, "batch_size": 8, "lr": 1e-2}


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ep.Classifier:
    """A fitted head on a tiny ResNet with random weights: mechanics only."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos")
    features = ep.extract("photos", "timm:test_resnet", weights="none")
    return ep.fit_head(features, l2=0.1)


def stored(classifier: ep.Classifier) -> dict[str, torch.Tensor]:
    assert classifier.folder is not None
    return load_file(classifier.folder / "model" / "model.safetensors")


def state_of(classifier: ep.Classifier) -> dict[str, torch.Tensor]:
    return dict(classifier.backbone.module.model.state_dict())


@pytest.mark.parametrize(
    ("bn", "statistics_move", "affine_moves"),
    [("frozen", False, False), ("affine", False, True), ("train", True, True)],
)
def test_frozen_parameters_and_buffers_stay_bit_for_bit(
    head: ep.Classifier, bn: Any, statistics_move: bool, affine_moves: bool
) -> None:
    before = {name: tensor.clone() for name, tensor in state_of(head).items()}
    after = stored(ep.finetune(head, unfreeze="layer4", bn=bn, **FAST))
    frozen = [name for name in before if not name.startswith("layer4")]
    assert len(frozen) > 20
    for name in frozen:
        assert torch.equal(before[name], after[name]), name

    def moved(suffix: str) -> bool:
        names = [n for n in before if n.startswith("layer4") and ".bn" in n and n.endswith(suffix)]
        assert names
        return any(not torch.equal(before[n], after[n]) for n in names)

    assert moved("running_mean") is statistics_move
    assert moved("weight") is affine_moves
    assert not torch.equal(before["layer4.0.conv1.weight"], after["layer4.0.conv1.weight"])
    assert all(torch.equal(before[n], t) for n, t in state_of(head).items())  # the caller's model is his


def test_a_frozen_layer_that_changes_fails_the_run(head: ep.Classifier) -> None:
    """A batch norm that counts its batches in eval mode, too, as a layer of a user's own may do."""

    def count(module: torch.nn.Module, *_: object) -> None:
        module.get_buffer("num_batches_tracked").add_(1)

    head.backbone.module.model.get_submodule("layer1.0.bn1").register_forward_hook(count)
    with pytest.raises(
        EmbedpipeError, match=r"1 frozen tensors changed during training, .*layer1\.0\.bn1\.num_batches"
    ):
        ep.finetune(head, unfreeze="layer4", cache_activations="off", **FAST)
    assert not any("finetune" in run.name for run in list_runs(Path("runs")))


def test_epoch_zero_is_the_head(head: ep.Classifier) -> None:
    tuned = ep.finetune(head, unfreeze="layer4", **FAST)
    first = tuned.report["epochs"][0]
    assert first["train_loss"] is None
    assert first["val_loss"] == pytest.approx(head.report["metrics"]["val"]["log_loss"], abs=1e-4)
    assert tuned.report["handoff_max_abs_diff"] < 1e-4


def test_a_backbone_of_other_weights_is_refused(head: ep.Classifier) -> None:
    """The hand-off compares images through the network with the head on cached features."""
    with torch.no_grad():
        next(head.backbone.module.model.parameters()).mul_(3.0)
    with pytest.raises(ModelMismatch, match="expected at most"):
        ep.finetune(head, unfreeze="layer4", **FAST)


def test_training_never_ends_below_its_start(head: ep.Classifier) -> None:
    wild = ep.finetune(head, unfreeze="all", epochs=1, batch_size=8, lr=1.0, head_lr=1.0)
    assert wild.report["metrics"]["val"]["accuracy"] >= wild.report["epochs"][0]["val_accuracy"]


def test_two_learning_rates(head: ep.Classifier) -> None:
    still = stored(ep.finetune(head, unfreeze="layer4", epochs=1, batch_size=8, lr=0.0, weight_decay=0.0))
    for name, tensor in state_of(head).items():
        assert torch.equal(tensor, still[name]), name


def test_the_stored_model_is_the_librarys_own(head: ep.Classifier) -> None:
    tuned = ep.finetune(head, unfreeze="layer4", **FAST)
    assert tuned.folder is not None
    model = timm.create_model(f"local-dir:{tuned.folder / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    path = "photos/red/000.png"
    with torch.inference_mode():
        wanted = model(transform(Image.open(path).convert("RGB"))[None]).softmax(1).numpy()
    np.testing.assert_allclose(tuned.predict_proba([path]), wanted, atol=1e-5)
    again = ep.Classifier.load(tuned.folder)
    np.testing.assert_allclose(again.predict_proba([path]), wanted, atol=1e-5)
    features = ep.extract("photos", str(tuned.folder / "model"))
    np.testing.assert_allclose(
        again.head.predict_proba(features.arrays("test")[0]).argmax(1), features.arrays("test")[1]
    )


def test_what_cannot_be_tuned(head: ep.Classifier) -> None:
    with pytest.raises(UsageError, match="layer9"):
        ep.finetune(head, unfreeze="layer9", **FAST)
    with pytest.raises(UsageError, match="unfreeze"):
        ep.finetune(head)
    knn = ep.fit_head(solver="knn")
    with pytest.raises(UsageError, match="kNN"):
        ep.finetune(knn, unfreeze="layer4", **FAST)


def test_unfreezing_nothing_trains_the_head_alone(head: ep.Classifier) -> None:
    tuned = ep.finetune(head, unfreeze="none", epochs=1, batch_size=8, head_lr=0.1)
    assert tuned.report["unfrozen"] == ["head.weight", "head.bias"]
    after = stored(tuned)
    assert all(torch.equal(t, after[n]) for n, t in state_of(head).items())


def test_the_same_seed_gives_the_same_weights(head: ep.Classifier) -> None:
    first, second = (stored(ep.finetune(head, unfreeze="layer4", augment="flip", **FAST)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
