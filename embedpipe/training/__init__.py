"""The one torch loop: optimiser, schedule, precision, micro-batches, averages, checkpoints, best state by validation.

It knows tensors and modules, nothing of images, caches or heads. What must not move is handed in as modules to keep in
eval mode; what is not trainable has `requires_grad=False` already. timm gives the layers of its models, torchvision
MixUp and CutMix.

>>> trained = train(network, groups, batches, validate, plan=Plan(epochs=10), steps=35, keep_eval=frozen)
"""

from embedpipe.training._epochs import Epoch, Score, Trained
from embedpipe.training._layers import keeps_size, layer_numbers
from embedpipe.training._loop import train
from embedpipe.training._plan import Plan
from embedpipe.training._ranks import Ranks, joined
from embedpipe.training._state import moving_names, moving_state, put

__all__ = [
    "Epoch",
    "Plan",
    "Ranks",
    "Score",
    "Trained",
    "joined",
    "keeps_size",
    "layer_numbers",
    "moving_names",
    "moving_state",
    "put",
    "train",
]
