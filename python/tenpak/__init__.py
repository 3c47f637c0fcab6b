"""Shrink language-model weights to one small file, and read them back.

    import tenpak

    report = tenpak.compress("model-folder", "model.tenpak")          # or .safetensors, .gguf, .json, a dict of arrays
    artifact = tenpak.open("model.tenpak")
    weight = artifact.read("model.layers.0.mlp.up_proj.weight")       # a NumPy array
    tenpak.decompress("model.tenpak", "restored-folder")

    encoded = tenpak.encode(array, "int4_opt_v1")
    rebuilt = tenpak.decode(encoded)

Importing this package loads neither CuPy nor torch.
"""

from tenpak._core import __version__
from tenpak.arrays import Encoded, decode, encode
from tenpak.artifact import ArtifactFile, Part, TensorInfo, open
from tenpak.calibrate import CalibrationReport, calibrate
from tenpak.codecs import CodecInfo, PartInfo, codecs
from tenpak.errors import (
    ArtifactError,
    InputError,
    InterruptedByUser,
    StorageError,
    TenpakError,
    UnsupportedError,
    UsageError,
)
from tenpak.evaluate import EvalReport, evaluate
from tenpak.model import Generation, Model, Stream
from tenpak.models import (
    CompressReport,
    DecompressReport,
    Group,
    TensorReport,
    compress,
    decompress,
    load_state_dict,
)

__all__ = [
    "ArtifactError",
    "ArtifactFile",
    "CalibrationReport",
    "CodecInfo",
    "CompressReport",
    "DecompressReport",
    "Encoded",
    "EvalReport",
    "Generation",
    "Group",
    "InputError",
    "InterruptedByUser",
    "Model",
    "Part",
    "PartInfo",
    "StorageError",
    "Stream",
    "TenpakError",
    "TensorInfo",
    "TensorReport",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "calibrate",
    "codecs",
    "compress",
    "decode",
    "decompress",
    "encode",
    "evaluate",
    "load_state_dict",
    "open",
]
