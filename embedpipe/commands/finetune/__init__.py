"""Fine-tune: start from a fitted head and train it with the last layers of the backbone.

The network of backbone and head must first give the logits of the head on cached features (LP-FT, Kumar et al., ICLR
2022). Frozen tensors are compared bit for bit after training.

>>> tuned = finetune(head, unfreeze="layer4")
"""

from embedpipe.commands.finetune._finetune import finetune
