"""How fast are features extracted, beside what people use today?

Same images, same weights, a process of its own for every run, all ways interleaved. Each peer is used as its own README
says; where it cannot load our weights, its loader is handed our model (said in benchmarks/README.md).

python benchmarks/peers.py --images 256 --repeats 3 --backbones resnet18 vit_small_patch16_224
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from measuring import (
    Parity,
    Spread,
    answered,
    extract_steadily,
    interleave,
    one_or_more,
    print_table,
    run_way,
    save_features,
)
from photos import SETS, add_options, list_images
from weights import read_model, recipe, write_weights

BACKBONES = ("resnet18", "resnet50", "tf_efficientnet_lite0", "vit_small_patch16_224")
BATCH = 32
WORKERS = 2
WARM = 32  # images that are run before the clock starts
TOLERANCE = 1e-7  # of the centred cosine distance
POOLED = {"vit_small_patch16_224": "head_drop"}  # the module whose output enters the classifier; else global_pool
TORCHVISION = ("resnet18", "resnet50")  # what img2vec-pytorch knows of these

Features = Callable[[Sequence[Path]], Any]


def steady(features: Features, paths: Sequence[Path], save: str) -> dict[str, Any]:
    """Run on some images, then on all with the clock on; the first is left out of the time in all."""
    began = time.monotonic()
    features(paths[:WARM])
    start = time.monotonic()
    found = features(paths)
    seconds = time.monotonic() - start
    save_features(save, paths, found)
    return {"images": len(paths), "steady_s": seconds, "spare_s": start - began, "executor": "eager"}


def tutorial(data: str, backbone: str, save: str) -> dict[str, Any]:
    """The loop of the tutorials: a Dataset, a DataLoader, a model under no_grad."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    model, transform = read_model(backbone), recipe(backbone)

    class Images(Dataset):  # type: ignore[type-arg]
        def __init__(self, paths: Sequence[Path]) -> None:
            self.paths = paths

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, number: int) -> Any:
            return transform(Image.open(self.paths[number]).convert("RGB"))

    def features(paths: Sequence[Path]) -> Any:
        loader = DataLoader(Images(paths), batch_size=BATCH, num_workers=WORKERS)
        with torch.no_grad():
            return torch.cat([model(images) for images in loader]).numpy()

    return steady(features, list_images(Path(data)), save)


def timm_loader(data: str, backbone: str, save: str) -> dict[str, Any]:
    """timm's own data set, loader (with its prefetcher) and model, as its inference.py puts them together."""
    import torch
    from timm.data import create_dataset, create_loader, resolve_data_config

    model = read_model(backbone)
    config = resolve_data_config({}, model=model)
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    device = torch.device("cpu")

    def features(paths: Sequence[Path]) -> Any:
        dataset = create_dataset("", root=data)
        wanted = set(map(str, paths))
        dataset.reader.samples = [sample for sample in dataset.reader.samples if sample[0] in wanted]
        chosen = {name: config[name] for name in names}
        loader = create_loader(dataset, batch_size=BATCH, num_workers=WORKERS, device=device, **chosen)
        with torch.inference_mode():
            return torch.cat([model(images) for images, _ in loader]).numpy()

    return steady(features, list_images(Path(data)), save)


def thingsvision(data: str, backbone: str, save: str) -> dict[str, Any]:
    """thingsvision's extractor for a model of one's own, with its image data set and its loader."""
    _stand_in_for_tensorflow()
    from thingsvision import get_extractor_from_model
    from thingsvision.utils.data import DataLoader, ImageDataset

    extractor = get_extractor_from_model(
        model=read_model(backbone, headless=False), device="cpu", preprocess=recipe(backbone), backend="pt"
    )

    def features(paths: Sequence[Path]) -> Any:
        with tempfile.TemporaryDirectory() as out:
            dataset = ImageDataset(
                root=data, out_path=out, backend=extractor.get_backend(), transforms=extractor.get_transformations()
            )
        dataset.samples = [str(path) for path in paths]
        batches = DataLoader(dataset=dataset, batch_size=BATCH, backend=extractor.get_backend())
        layer = POOLED.get(backbone, "global_pool")
        return extractor.extract_features(batches=batches, module_name=layer, flatten_acts=True, output_type="ndarray")

    return steady(features, list_images(Path(data)), save)


def img2vec(data: str, backbone: str, save: str) -> dict[str, Any]:
    """img2vec-pytorch on lists of PIL images; its own pixels (the whole image squashed to 224 x 224)."""
    import torch
    import torchvision
    from img2vec_pytorch import Img2Vec, img_to_vec
    from PIL import Image

    def build(**_: Any) -> Any:
        model = torchvision.models.get_model(backbone)
        model.load_state_dict(torch.load(write_weights(backbone), weights_only=True))
        return model

    setattr(img_to_vec, backbone, build)  # it can only download
    extractor = Img2Vec(model=backbone, layer_output_size=512 if backbone == "resnet18" else 2048)

    def features(paths: Sequence[Path]) -> Any:
        batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
        return np.concatenate([extractor.get_vec([Image.open(p).convert("RGB") for p in batch]) for batch in batches])

    return steady(features, list_images(Path(data)), save)


def embetter(data: str, backbone: str, save: str) -> dict[str, Any]:
    """embetter's scikit-learn pipeline; its model stays in training mode, as it leaves it."""
    from embetter.vision import ImageLoader, TimmEncoder, _torchvis
    from sklearn.pipeline import make_pipeline

    def build(*_: Any, **__: Any) -> Any:
        return read_model(backbone).train()  # as timm.create_model returns it

    _torchvis.timm = SimpleNamespace(create_model=build)  # it can only download
    pipeline = make_pipeline(ImageLoader(convert="RGB"), TimmEncoder(name=backbone))
    return steady(lambda paths: pipeline.fit_transform([str(path) for path in paths]), list_images(Path(data)), save)


def ours(data: str, backbone: str, save: str, **options: Any) -> dict[str, Any]:
    """embedpipe.extract into a fresh cache."""
    weights = str(write_weights(backbone))
    return extract_steadily(data, f"timm:{backbone}", weights=weights, save=save, **options)


def _stand_in_for_tensorflow() -> None:
    """Let thingsvision import TensorFlow, which it does for its Keras models, and NumPy 1's AxisError."""
    import importlib.abc
    import importlib.machinery
    import sys
    from unittest.mock import MagicMock

    class Stand(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            ours = name.partition(".")[0] == "tensorflow"
            return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

        def create_module(self, spec: Any) -> Any:
            return MagicMock(name=spec.name, __path__=[], __spec__=spec)

        def exec_module(self, module: Any) -> None:
            pass

    sys.meta_path.append(Stand())
    np.AxisError = np.exceptions.AxisError  # type: ignore[attr-defined]


OURS: dict[str, dict[str, Any]] = {"embedpipe": {}, "embedpipe, openvino": {"executor": "openvino"}}
PEERS = {
    "tutorial loop": tutorial,
    "timm loader": timm_loader,
    "thingsvision": thingsvision,
    "img2vec-pytorch": img2vec,
    "embetter": embetter,
}
OWN_WAYS = {"img2vec-pytorch": "own pixels", "embetter": "training mode"}  # features of another recipe
WAYS = {"ours": ours, **PEERS}


def compare(backbone: str, options: argparse.Namespace) -> list[str]:
    """Measure all ways with one backbone and print their table; return what breaks parity."""
    folder = str(SETS[options.set](options.images))
    write_weights(backbone)
    with tempfile.TemporaryDirectory() as out:
        files = {name: f"{out}/{number}.npy" for number, name in enumerate((*OURS, *PEERS))}
        common: dict[str, Any] = {"data": folder, "backbone": backbone}

        def start(name: str) -> Callable[[], dict[str, Any]]:
            way, more = ("ours", OURS[name]) if name in OURS else (name, {})
            return lambda: run_way(__file__, way, save=files[name], **common, **more)

        names = [name for name in files if name in options.ways and _can(name, backbone)]
        found = interleave({name: start(name) for name in names}, options.repeats)
        reference = np.load(files["tutorial loop"])
        parities = {name: Parity.of(np.load(files[name]), reference) for name in names}
    _print(backbone, options, found, parities, _between(reference))
    return [f"{backbone}, {name}" for name in names if parities[name].centred > _tolerance(name)]


def _can(name: str, backbone: str) -> bool:
    return name != "img2vec-pytorch" or backbone in TORCHVISION


def _tolerance(name: str) -> float:
    return float("inf") if name in OWN_WAYS else TOLERANCE


def _between(reference: np.ndarray) -> Parity:
    """Return how far apart different images are, to judge the distances by."""
    return Parity.of(np.roll(reference, 1, axis=0), reference)


def _print(
    backbone: str, options: argparse.Namespace, found: dict[str, Any], parities: dict[str, Parity], between: Parity
) -> None:
    rates = {name: [one["images"] / one["steady_s"] for one in runs] for name, runs in found.items()}
    base = rates["tutorial loop"]
    rows = []
    for name, runs in found.items():
        rows.append(
            (
                name + (f" [{OWN_WAYS[name]}]" if name in OWN_WAYS else ""),
                runs[-1]["executor"],
                Spread.of(rates[name]).text(),
                Spread.of([rate / one for rate, one in zip(rates[name], base, strict=True)]).text(2),
                Spread.of([one["whole_s"] for one in runs]).text(),
                f"{max(one['peak_mib'] for one in runs):.0f}",
                f"{parities[name].plain:.0e}",
                f"{parities[name].centred:.0e}",
            )
        )
    header = ("way", "executor", "images/s, steady", "x tutorial", "s in all", "peak MiB", "cosine distance", "centred")
    title = (
        f"{backbone} (random weights), {options.images} of {options.set}, {options.repeats} repeats: median (min-max)"
    )
    print_table(
        title,
        header,
        rows,
        "steady: model loaded and a batch run before the clock; ours: from the first report of `progress` (executor chosen, "
        "converted, warm) to the return of `extract`, rows committed and merged",
        "s in all: from the start of the process to the features: imports, model, conversion, listing, hashing; "
        "of the others less the batch run before the clock",
        "cosine distance: the largest to the tutorial loop's features of the same image; centred: both less their mean; "
        f"of two different images at most {between.plain:.0e} and {between.centred:.0e}",
        "peak: proportional set sizes of the process and its children, sampled once a second",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, images=256)
    parser.add_argument("--repeats", type=one_or_more, default=3)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument("--ways", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    options = parser.parse_args()
    options.ways = {*options.ways, "tutorial loop"}  # what all others are held against
    broken = [one for backbone in options.backbones for one in compare(backbone, options)]
    if broken:
        raise SystemExit(f"features differ from the plain recipe: {'; '.join(broken)}")


if __name__ == "__main__" and not answered(WAYS):
    main()
