"""finetune: from the fitted head, with the last layers of the backbone unfrozen.

The network starts as backbone + head, and proves before the first step that it gives what the head gave (LP-FT, Kumar et
al., ICLR 2022). What is frozen is compared bit for bit afterwards.

>>> tuned = finetune(head, unfreeze="layer4")
"""

from embedpipe.commands.finetune._finetune import finetune

__all__ = ["finetune"]
