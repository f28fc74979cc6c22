"""embedpipe layers MODEL"""

from __future__ import annotations

import rich_click as click

from embedpipe.cli._build import Session, command


@command(None, example="embedpipe layers timm:resnet18")
@click.argument("model")
def layers(session: Session, model: str) -> None:
    """List the layers of a model in the order of execution, as --layer and --unfreeze name them.

    Parameters
    ----------
    model : str
        timm:NAME, torchvision:NAME, or the model/ folder of a fine-tuned run.
    """
    from embedpipe.backbones import describe_layers

    found = describe_layers(model)
    width = max(len(layer.name) for layer in found)
    lines = [f"{'layer':<{width}}  {'parameters':>12}  output shape"]
    lines += [f"{layer.name:<{width}}  {layer.parameters:>12,}  {'x'.join(map(str, layer.shape))}" for layer in found]
    session.finish({"model": model, "layers": [vars(layer) for layer in found]}, "\n".join(lines))
