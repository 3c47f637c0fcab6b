"""An independent reader of .tenpak files: plain Python and NumPy, written from docs/format.md alone."""

from __future__ import annotations

import json
import math
import struct
import sys

import numpy as np

try:
    import blake3
except ImportError:  # optional: digests are then not checked
    blake3 = None
try:
    import xxhash
except ImportError:
    xxhash = None

ALIGN = 256
PLAIN = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F64": "<f8",
    "BOOL": "?",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
}
PLAIN |= {f"{kind.upper()}{bits}": f"<{kind}{bits // 8}" for kind in "iu" for bits in (8, 16, 32, 64)}
TABLES = np.array(
    [
        [-126, -106, -88, -70, -53, -38, -24, -11, 1, 14, 28, 42, 57, 74, 95, 127],
        [-127, -103, -81, -61, -44, -30, -17, -4, 8, 21, 34, 48, 63, 79, 98, 119],
        [-127, -90, -64, -49, -36, -25, -14, -4, 6, 16, 26, 36, 47, 60, 75, 116],
        [-127, -76, -59, -45, -33, -22, -12, -2, 8, 19, 30, 42, 55, 69, 86, 120],
    ],
    dtype=np.float32,
)


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def u32(data: bytes, at: int) -> int:
    return struct.unpack_from("<I", data, at)[0]


def up(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


def runs(n: int, length: int) -> int:
    return -(-n // length)


def fp16_layout(n):
    def per_group(cols):
        return runs(cols, n)

    parts = [
        ("codes", "u1", lambda c: runs(c, 2)),
        ("scales", "<f2", per_group),
        ("offsets", "<f2", per_group),
    ]
    return parts, lambda p, c: affine(nibbles(p["codes"], c), c, n, p["scales"], p["offsets"])


def u8_layout(n, bits=4):
    sizes = [("codes", 2), ("scales", n), ("offsets", n)]
    parts = [(name, "u1", lambda c, length=length: runs(c, length)) for name, length in sizes]
    parts.append(("row_params", "<f2", lambda c: 4))
    if bits > 4:
        parts.append(("high", "u1", lambda c: runs(c * (bits - 4), 8)))

    def rebuild(p, c):
        scale0, scale_step, offset0, offset_step = np.hsplit(p["row_params"].astype(np.float32), 4)
        scales = scale0 + p["scales"].astype(np.float32) * scale_step
        q = nibbles(p["codes"], c)
        if bits > 4:
            each = np.unpackbits(p["high"], axis=1, bitorder="little")[:, : c * (bits - 4)]
            weights = 1 << np.arange(bits - 4)
            q = q + 16 * (each.reshape(len(q), c, bits - 4) * weights).sum(axis=-1)
        offsets = offset0 + p["offsets"].astype(np.float32) * offset_step
        return affine(q, c, n, scales, offsets)

    return parts, rebuild


def nibbles(codes, cols):
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), codes.shape[1] * 2)[:, :cols]


def spread(values, n, cols):
    return np.repeat(values.astype(np.float32), n, axis=1)[:, :cols]


def affine(q, cols, n, scales, offsets):
    return q.astype(np.float32) * spread(scales, n, cols) + spread(offsets, n, cols)


def lut_layout(n):
    parts = [("codes", "u1", lambda c: runs(c, 2)), ("scales", "u1", lambda c: runs(c, n))]
    parts.append(("supers", "<f2", lambda c: runs(c, 16 * n)))

    def rebuild(p, cols):
        level = (p["scales"] & 63).astype(np.int8)
        level = np.where(level >= 32, level - 64, level)
        table = np.repeat(p["scales"] >> 6, n, axis=1)[:, :cols]
        scale = spread(p["supers"], 16 * n, cols) * spread(level, n, cols)
        return scale * TABLES[table, nibbles(p["codes"], cols)]

    return parts, rebuild


INT8 = [("codes", "i1", lambda c: c), ("scales", "<f4", lambda c: 1)]
LAYOUTS = {
    "int4_opt_v1": fp16_layout(16),
    "int4_opt_llama_v1": fp16_layout(8),
    "int4_g8_fp16_v1": fp16_layout(8),
    "int4_g16_fp16_v1": fp16_layout(16),
    "int4_g32_fp16_v1": fp16_layout(32),
    "int4_g8_v1": u8_layout(8),
    "int4_g16_v1": u8_layout(16),
    "int5_g32_v1": u8_layout(32, 5),
    "int6_g32_v1": u8_layout(32, 6),
    "int8_sym_v1": (INT8, lambda p, c: p["codes"].astype(np.float32) * p["scales"]),
    "int4_lut16_v1": lut_layout(16),
    "int4_lut32_v1": lut_layout(32),
}


class PlainReader:
    def __init__(self, path):
        with open(path, "rb") as file:
            self.bytes = file.read()
        header, footer = self.bytes[:64], self.bytes[-64:]
        assert header[:8] == b"\x89TPK\r\n\x1a\n", "magic"
        version, header_len, incompat, _compat, align = struct.unpack_from("<5I", header, 8)
        assert (version, header_len, incompat, align) == (1, 64, 0, ALIGN), "header"
        assert header[28:60] == bytes(32), "header"
        assert crc32c(header[:60]) == u32(header, 60), "header"
        off, length, file_len = struct.unpack_from("<3Q", footer)
        assert footer[60:] == b"TPKE", "footer"
        assert crc32c(footer[:56]) == u32(footer, 56), "footer"
        assert file_len == len(self.bytes) == off + length + 64, "length"
        text, self.root = self.bytes[off : off + length], footer[24:56]
        assert blake3 is None or blake3.blake3(text).digest() == self.root, "root"
        self.index = json.loads(text.decode("utf-8"))
        canonical = json.dumps(self.index, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert canonical.encode("utf-8") == text, "the index is not canonical"
        tensors, files = self.index["tensors"], self.index["files"]
        self.tensors = {t["name"]: t for t in tensors}
        self.files = {f["path"]: self.part(f) for f in files}
        assert (len(self.tensors), len(self.files)) == (len(tensors), len(files)), "names"
        ordered = [t["parts"][n] for t in tensors for n, *_ in self.layout(t)[0]]
        end = 64
        for part in [*ordered, *files, {"off": off, "len": 0}]:
            assert part["off"] == up(end), f"placement after {end}"
            assert not any(self.bytes[end : part["off"]]), f"padding after {end}"
            end = part["off"] + part["len"]

    def part(self, ref) -> bytes:
        data = self.bytes[ref["off"] : ref["off"] + ref["len"]]
        assert len(data) == ref["len"], "length of a part"
        assert xxhash is None or xxhash.xxh3_64_hexdigest(data) == ref["xxh3"], "xxh3"
        assert blake3 is None or blake3.blake3(data).hexdigest() == ref["b3"], "b3"
        return data

    @staticmethod
    def layout(tensor):
        return ([("data", None, None)], None) if tensor["codec"] == "keep" else LAYOUTS[tensor["codec"]]

    def read(self, name) -> np.ndarray:
        """FP32 for tensors under a codec and for kept BF16; other kept tensors as they are."""
        tensor = self.tensors[self.index["aliases"].get(name, name)]
        shape, axis, parts = tensor["shape"], tensor["axis"], tensor["parts"]
        layout, rebuild = self.layout(tensor)
        assert tensor["codec_version"] == 1, "version"
        assert sorted(parts) == sorted(n for n, *_ in layout), "parts"
        if rebuild is None:
            data = np.frombuffer(self.part(parts["data"]), PLAIN[tensor["dtype"]]).reshape(shape)
            return (data.astype(np.uint32) << 16).view(np.float32) if tensor["dtype"] == "BF16" else data
        outer, cols, inner = math.prod(shape[:axis]), (shape or [1])[axis], math.prod(shape[axis + 1 :])
        rows = outer * inner
        arrays = {}
        for part, dtype, per_row in layout:
            arrays[part] = np.frombuffer(self.part(parts[part]), dtype).reshape(rows, per_row(cols))
        unit = np.float32(2.0 ** tensor["params"].get("exponent", 0))
        largest = np.float32(65504) if tensor["dtype"] == "F16" else np.finfo(np.float32).max
        weights = np.clip(rebuild(arrays, cols).astype(np.float32) * unit, -largest, largest)
        return weights.reshape(outer, inner, cols).swapaxes(1, 2).reshape(shape)


if __name__ == "__main__":
    artifact = PlainReader(sys.argv[1])
    for name, tensor in artifact.tensors.items():
        weights = artifact.read(name)
        print(name, tensor["codec"], weights.dtype, weights.shape, artifact.root.hex()[:8], sep="\t")
