"""extract: compute the features of images with frozen backbones, once, and store them in the cache.

>>> extract("data/", "timm:resnet18", cache_dir="cache").summary["computed"]
1000
"""

from embedpipe.commands.extract._extract import extract
