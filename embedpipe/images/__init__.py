"""Bytes to tensors: decode, orientation, colour policy, canonical transform, batches from threads.

torch is imported when a transform first needs it, not with this package.

>>> image = decode_image(Path("cat.jpg").read_bytes())
>>> Transform(crop_size=(224, 224), resize_size=256)(image).shape
torch.Size([3, 224, 224])
"""

from embedpipe.images._batches import ALL, Batch, Failed, image_batches
from embedpipe.images._decode import DECODER, MAX_PIXELS, decode_image
from embedpipe.images._isolation import LIMITS, Limits, start_decoders
from embedpipe.images._transform import Transform
