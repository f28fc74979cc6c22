"""The training loop: optimiser, schedule, precision, micro-batches, averages, checkpoints, best state by validation.

It works on tensors and modules, independent of images, caches and heads. Frozen parameters have `requires_grad=False`
before training; frozen modules are passed as `keep_eval`.

>>> trained = train(network, groups, batches, validate, plan=Plan(epochs=10), steps=35, keep_eval=frozen)
"""

from embedpipe.training._plan import Epoch, Plan, Score, Trained
from embedpipe.training._ranks import Ranks, join_process_group
from embedpipe.training._state import load_tensors, moving_names, moving_state
from embedpipe.training._steps import is_exempt_from_decay, layer_numbers
from embedpipe.training._trainer import train
