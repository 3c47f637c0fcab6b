"""What `tenpak inspect` shows of a delta: what changed, by how much, and how its bytes are spent."""

from __future__ import annotations

from typing import Any

from tenpak.artifact import ArtifactFile, DeltaInfo, TensorInfo
from tenpak.cli.table import count, number, pairs, size, table


def text(artifact: ArtifactFile, delta: DeltaInfo, summary_only: bool) -> str:
    """The whole view, or its head alone."""
    about = summary(artifact, delta)
    rows = [
        ("file", f"{artifact.path}, {size(artifact.nbytes)}, format version {artifact.version}, by {artifact.writer}"),
        ("root", artifact.root),
        ("delta", f"mode {delta.mode}"),
        ("base", delta.base),
        ("result", delta.result),
        ("weights", f"{count(about['weights'])} in {count(len(artifact.tensors))} tensors"),
        ("bits/weight", number(8 * artifact.nbytes / about["weights"] if about["weights"] else None)),
    ]
    if artifact.aliases:
        rows.append(("aliases", ", ".join(f"{alias} = {name}" for alias, name in artifact.aliases.items())))
    if delta.removed:
        rows.append(("left out of the base", ", ".join(delta.removed)))
    if delta.files:
        rows.append(("files of the base", ", ".join(delta.files)))
    if artifact.files:
        rows.append(("files", ", ".join(artifact.files)))
    totals = [
        [name, count(m["tensors"]), count(m["weights"]), _part(m["changed"], m["weights"]), size(m["bytes"])]
        for name, m in about["methods"].items()
    ]
    shown = pairs(rows) + "\n\n" + table(["method", "tensors", "weights", "changed", "bytes"], totals)
    if about["chunks"]:
        ways = [[way, count(n), size(stored)] for way, (n, stored) in about["chunks"].items()]
        shown += "\n\n" + table(["exact chunks", "chunks", "bytes"], ways)
    if summary_only:
        return shown
    tensors = [
        [
            info.name,
            " x ".join(map(str, info.shape)) or "scalar",
            info.dtype,
            info.codec if info.known else f"{info.codec} (unknown)",
            _part(changed(info), info.weights),
            info.params.get("relative_change", "-"),
            size(info.nbytes),
            number(info.bits_per_weight),
            _source(info),
        ]
        for info in artifact.infos
    ]
    header = ["tensor", "shape", "dtype", "method", "changed", "|change|/|w|", "bytes", "bits/weight", "from"]
    return shown + "\n\n" + table(header, tensors)


def summary(artifact: ArtifactFile, delta: DeltaInfo) -> dict[str, Any]:
    """What the view shows, for programs."""
    methods: dict[str, dict[str, int]] = {}
    chunks: dict[str, tuple[int, int]] = {}
    for info in artifact.infos:
        totals = methods.setdefault(info.codec, {"tensors": 0, "weights": 0, "changed": 0, "bytes": 0})
        for key, more in (
            ("tensors", 1),
            ("weights", info.weights),
            ("changed", changed(info)),
            ("bytes", info.nbytes),
        ):
            totals[key] += more
        for way, n, stored in artifact.chunk_kinds(info.name):
            before = chunks.get(way, (0, 0))
            chunks[way] = (before[0] + n, before[1] + stored)
    return {
        "mode": delta.mode,
        "base": delta.base,
        "result": delta.result,
        "removed": delta.removed,
        "files_of_base": delta.files,
        "weights": sum(info.weights for info in artifact.infos),
        "methods": dict(sorted(methods.items(), key=lambda item: -item[1]["bytes"])),
        "chunks": chunks,
    }


def describe(artifact: ArtifactFile, info: TensorInfo) -> list[tuple[str, str]]:
    """What a delta says of one tensor."""
    rows = [("changed", f"{count(changed(info))} of {count(info.weights)}")]
    rows += [
        (label, str(info.params[key]))
        for label, key in (("from", "base"), ("its BLAKE3", "base_b3"), ("becomes BLAKE3", "b3"))
        if key in info.params
    ]
    if "relative_change" in info.params:
        rows.append(("|change|/|w|", info.params["relative_change"]))
    if "fresh_groups" in info.params:
        rows.append(("groups afresh", f"{count(info.params['fresh_groups'])} of {count(info.params['groups'])}"))
    ways = artifact.chunk_kinds(info.name)
    if ways:
        rows.append(("chunks", ", ".join(f"{count(n)} {way} ({size(stored)})" for way, n, stored in ways)))
    return rows


def changed(info: TensorInfo) -> int:
    """Elements, or codes, that are not as in the base: all of what is stored as in any artifact."""
    return int(info.params.get("changed", 0 if info.codec == "same" else info.weights))


def _part(n: int, total: int) -> str:
    return f"{100 * n / total:.2f} %" if total else "-"


def _source(info: TensorInfo) -> str:
    base = info.params.get("base")
    if base is None:
        return "new"
    return "" if base == info.name else str(base)
