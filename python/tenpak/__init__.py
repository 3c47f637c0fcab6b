"""Shrink language-model weights to one small file, and read them back.

    import tenpak

    report = tenpak.compress("model-folder", "model.tenpak")          # or .safetensors, .gguf, .json, a dict of arrays
    artifact = tenpak.open("model.tenpak")
    weight = artifact.read("model.layers.0.mlp.up_proj.weight")       # a NumPy array
    tenpak.decompress("model.tenpak", "restored-folder")

    encoded = tenpak.encode(array, "int4_opt_v1")
    rebuilt = tenpak.decode(encoded)

    model = tenpak.Model.open("model.tenpak")
    print(model.generate("It was a dark and stormy").text)

Importing this package loads neither CuPy nor torch.
"""

from tenpak._core import __version__
from tenpak.arrays import Encoded, decode, encode
from tenpak.artifact import ArtifactFile, Part, TensorInfo, open
from tenpak.calibrate import CalibrationReport, calibrate
from tenpak.codecs import CodecInfo, PartInfo, codecs
from tenpak.delta import DeltaFile, DeltaReport, MaterializeReport, delta, materialize
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
from tenpak.tune import TuneReport, tune

__all__ = [
    "ArtifactError",
    "ArtifactFile",
    "CalibrationReport",
    "CodecInfo",
    "CompressReport",
    "DecompressReport",
    "DeltaFile",
    "DeltaReport",
    "Encoded",
    "EvalReport",
    "Generation",
    "Group",
    "InputError",
    "InterruptedByUser",
    "MaterializeReport",
    "Model",
    "Part",
    "PartInfo",
    "StorageError",
    "Stream",
    "TenpakError",
    "TensorInfo",
    "TensorReport",
    "TuneReport",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "calibrate",
    "codecs",
    "compress",
    "decode",
    "decompress",
    "delta",
    "encode",
    "evaluate",
    "load_state_dict",
    "materialize",
    "open",
    "tune",
]
