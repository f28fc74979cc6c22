"""extract: every image through frozen backbones once, their features into the cache.

The doors enter here.

>>> extract("data/", "timm:resnet18", cache_dir="cache").summary["computed"]
"""

from embedpipe.commands.extract._extract import extract

__all__ = ["extract"]
