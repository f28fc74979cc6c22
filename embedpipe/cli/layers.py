"""embedpipe layers MODEL"""

from __future__ import annotations

import rich_click as click

from embedpipe.cli._build import Session, command


@command(None, example="embedpipe layers timm:resnet18")
@click.argument("model")
def layers(session: Session, model: str) -> None:
    """List a model's layers in the order of execution: what --layer and --unfreeze take.

    Parameters
    ----------
    model : str
        timm:NAME, torchvision:NAME, or the model/ folder of a fine-tuned run.
    """
    from embedpipe.backbones import describe_layers

    found = describe_layers(model)
    width = max(len(layer.name) for layer in found)
    lines = [f"{'layer':<{width}}  {'parameters':>12}  output shape"]
    lines += [f"{one.name:<{width}}  {one.parameters:>12,}  {'x'.join(map(str, one.shape))}" for one in found]
    session.finish({"model": model, "layers": [vars(layer) for layer in found]}, "\n".join(lines))
