"""Runs decoders of the GPT-2 and Llama families in FP32, on NumPy or CuPy: the reference for everything faster.

from tenpak.decoder import Decoder

model = Decoder.open("model.tenpak")
logits = model.logits([model.encode_text("It was a dark and stormy")])
"""

from tenpak.decoder.block import Block, Observe, ObserveBackward
from tenpak.decoder.cache import Cache
from tenpak.decoder.config import Config, Rope
from tenpak.decoder.decoder import Decoder, Head
from tenpak.decoder.linear import Linear
from tenpak.decoder.source import Source, open_source

__all__ = [
    "Block",
    "Cache",
    "Config",
    "Decoder",
    "Head",
    "Linear",
    "Observe",
    "ObserveBackward",
    "Rope",
    "Source",
    "open_source",
]
