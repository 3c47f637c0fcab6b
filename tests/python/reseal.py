"""Changes an artifact's index and seals it again, so that what is behind the checksums can be tested."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

from plain_reader import crc32c

_IV = [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19]
_ORDER = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8]
_MIXED = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
_DIAGONAL = [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]


def change(path: Path, edit: Callable[[dict], object]) -> None:
    """Applies `edit` to the index and writes the file with checksums that fit."""
    data = path.read_bytes()
    start, length = struct.unpack("<QQ", data[-64:-48])
    index = json.loads(data[start : start + length])
    edit(index)
    text = json.dumps(index, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    footer = struct.pack("<QQQ", start, len(text), start + len(text) + 64) + blake3(text)
    path.write_bytes(data[:start] + text + footer + struct.pack("<I", crc32c(footer)) + b"TPKE")


def blake3(data: bytes) -> bytes:
    """BLAKE3 of at most one chunk: 1,024 bytes."""
    assert len(data) <= 1024, "only indexes of a tensor or two"
    chain = _IV
    blocks = [data[i : i + 64] for i in range(0, len(data), 64)] or [b""]
    for n, block in enumerate(blocks):
        last = n == len(blocks) - 1
        flags = (1 if n == 0 else 0) | (2 | 8 if last else 0)
        chain = _compress(chain, block, flags)
    return struct.pack("<8I", *chain)


def _compress(chain: list[int], block: bytes, flags: int) -> list[int]:
    message = list(struct.unpack("<16I", block.ljust(64, b"\0")))
    v = [*chain, *_IV[:4], 0, 0, len(block), flags]
    for _ in range(7):
        for i, (a, b, c, d) in enumerate([*_MIXED, *_DIAGONAL]):
            for m, first, second in ((message[2 * i], 16, 12), (message[2 * i + 1], 8, 7)):
                v[a] = (v[a] + v[b] + m) & 0xFFFFFFFF
                v[d] = _rotate(v[d] ^ v[a], first)
                v[c] = (v[c] + v[d]) & 0xFFFFFFFF
                v[b] = _rotate(v[b] ^ v[c], second)
        message = [message[i] for i in _ORDER]
    return [low ^ high for low, high in zip(v[:8], v[8:], strict=True)]


def _rotate(word: int, n: int) -> int:
    return (word >> n | word << (32 - n)) & 0xFFFFFFFF
