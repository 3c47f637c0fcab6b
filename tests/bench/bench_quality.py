"""What quantising loses: every codec and encoder of Tenpak beside other tools' formats, on real models.

    python tests/bench/bench_quality.py [--models FOLDER …] [--device cuda] [--windows N] [--only REGEX] [--update]
    python tests/bench/bench_quality.py --merge ROWS …

Every model is compressed to an artifact on disk, opened again and evaluated beside the original, over all windows of
1,024 tokens of text/dev.txt under TENPAK_REFERENCE (../shared). Statistics come from 160 windows of
text/calibration.txt, or from as much text as `tenpak calibrate --self` lets the model sample; `tuned` rows learn from
the same text. Other tools' formats go
through the same evaluation, their weights quantised and rebuilt layer by layer. Linear layers only, embeddings and
heads as they are, but for the rows `whole model`. Results go to results/quality.json, from which quality_page.py makes
docs/quality.md. Several runs, each with rows (--only) and results (--results) of its own, may share statistics
(--folder) and a GPU; --merge puts the `.rows` files that they leave into the results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import quality_peers
import tenpak
from harness import RESULTS, machine, report
from safetensors.numpy import safe_open
from tenpak.decoder import Decoder
from tenpak.evaluate import array_module

REFERENCE = Path(os.environ.get("TENPAK_REFERENCE", Path(__file__).resolve().parents[3] / "shared"))
DEV, CALIBRATION = REFERENCE / "text" / "dev.txt", REFERENCE / "text" / "calibration.txt"

#: Encoders beside the codec's own: the option's value, and which statistics it heeds.
CALIBRATED = {"diag": ("diag", "inputs"), "gptq": ("gptq", "text"), "gptq, own text": ("gptq", "self")}
#: Codecs that are also given statistics of inputs only, and those gathered layer after quantised layer.
INPUTS_ONLY = ("int4_opt_v1", "int4_lut16_v1")
#: Codecs that are also tuned as whole models, on the text of their statistics.
TUNED = ("int4_opt_v1", "int4_lut16_v1", "int4_lut32_v1")


class Original(Decoder):
    """A decoder that remembers what it has computed: each row is compared with the same."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._seen: dict[bytes, Any] = {}

    def hidden(self, tokens: Any, cache: Any = None) -> Any:
        if cache is not None:
            return super().hidden(tokens, cache)
        key = (tokens if self.xp is np else self.xp.asnumpy(tokens)).tobytes()
        if key not in self._seen:
            self._seen[key] = super().hidden(tokens)
        return self._seen[key]


class Bench:
    """One model, its statistics and its rows."""

    def __init__(self, model: Path, folder: Path, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
        self.model, self.folder, self.args, self.rows = model, folder, args, rows
        self.original = Original.open(model, xp=array_module(args.device))
        self.wanted = re.compile(args.only)

    def statistics(self, kind: str) -> Path:
        """`text`, `self`, `inputs` of the text only, or a codec's name for those with the layers before quantised."""
        path = self.folder / f"{self.model.name}.{kind}.safetensors"
        if not path.exists():
            started = time.perf_counter()
            tenpak.calibrate(
                # Not the one that remembers, since every window is computed once here.
                Decoder(self.original.source, xp=self.original.xp),
                path,
                None if kind == "self" else CALIBRATION,
                windows=None if kind == "self" else self.args.calibration_windows,
                gradients=kind in ("text", "self"),
                sequential=None if kind in ("text", "self", "inputs") else kind,
            )
            print(f"# {self.model.name}: statistics {kind} in {time.perf_counter() - started:.1f} s", flush=True)
        return path

    def importance(self) -> dict[str, np.ndarray]:
        """E[x_j²] by the weight's name."""
        with safe_open(self.statistics("inputs"), "np") as file:
            inputs = json.loads(file.metadata()["tenpak.calibration"])["inputs"]
            return {
                weight: file.get_tensor(f"{name}.diagonal")
                for name, about in inputs.items()
                for weight in about["weights"]
            }

    def artifact(
        self, name: str, codec: str, label: str, whole: bool = False, tune: str | None = None, **options: Any
    ) -> None:
        """A row for a file that Tenpak writes; `tune` says on which kind of text it is tuned."""
        if not self.wanted.search(name):
            return
        path = self.folder / f"{self.model.name}.{os.getpid()}.tenpak"
        kept = {} if whole else {"embeddings": "keep"}
        started = time.perf_counter()
        done = tenpak.compress(self.model, path, codec, device=self.args.device, force=True, **kept, **options)
        if tune is not None:
            text, windows = (None, None) if tune == "self" else (CALIBRATION, self.args.calibration_windows)
            # Not the one that remembers.
            teacher = Decoder(self.original.source, xp=self.original.xp)
            tenpak.tune(path, path, teacher, text, windows=windows, device=self.args.device, force=True)
        seconds = time.perf_counter() - started
        bits = done.file_bits_per_weight if whole else done.quantised_bits_per_weight
        decoder = Decoder.open(path, xp=self.original.xp)
        self.row(name, "tenpak", codec, label, bits, done.relative_error, seconds, decoder, whole)

    def peer(self, peer: quality_peers.Peer, importance: dict[str, np.ndarray]) -> None:
        """A row for another tool's format."""
        if not self.wanted.search(peer.name):
            return
        xp, decoder = self.original.xp, Decoder(self.original.source, xp=self.original.xp)
        bits = weights = error = norm = 0.0
        seconds = 0.0
        for block in decoder.blocks:
            for linear in block.linears.values():
                weight = np.ascontiguousarray(linear.weight if xp is np else xp.asnumpy(linear.weight))
                started = time.perf_counter()
                rebuilt = peer.rebuild(weight, importance[linear.name] if peer.uses_importance else None)
                seconds += time.perf_counter() - started
                bits += peer.bits_per_weight(*weight.shape) * weight.size
                weights += weight.size
                error += float(np.square(weight - rebuilt, dtype=np.float64).sum())
                norm += float(np.square(weight, dtype=np.float64).sum())
                linear.weight = xp.asarray(rebuilt)
        self.row(peer.name, "other", peer.name, "", bits / weights, error / norm, seconds, decoder, False)

    def row(
        self,
        name: str,
        tool: str,
        codec: str,
        encoder: str,
        bits: float | None,
        error: float | None,
        seconds: float,
        decoder: Decoder,
        whole: bool,
    ) -> None:
        """Evaluates and keeps; a long run must not lose what it has."""
        found = tenpak.evaluate(decoder, DEV, against=self.original, context=1024, windows=self.args.windows)
        comparison = found.comparison
        assert comparison is not None
        self.rows.append(
            {
                "model": self.model.name,
                "name": name,
                "tool": tool,
                "codec": codec,
                "encoder": encoder,
                "whole": whole,
                "bits": bits,
                "error": error,
                "change": comparison.change.value,
                "change ±": comparison.change.error,
                "KL": comparison.divergence.value,
                "KL ±": comparison.divergence.error,
                "top1": comparison.top1.value,
                "perplexity": found.perplexity.value,
                "original": comparison.perplexity.value,
                "windows": found.windows,
                "seconds": seconds,
            }
        )
        self.args.results.with_suffix(".rows").write_text(json.dumps(self.rows))
        print(
            f"{self.model.name:12s} {name:36s} {bits:6.3f} bits  {comparison.change.value:+6.2f} %  "
            f"KL {1e3 * comparison.divergence.value:7.3f}e-3 ± {1e3 * (comparison.divergence.error or 0):.3f}  "
            f"top-1 {100 * comparison.top1.value:.2f} %  {seconds:.1f} s",
            flush=True,
        )

    def run(self) -> None:
        layouts = set()
        for codec in tenpak.codecs():
            self.artifact(codec.name, codec.name, codec.encoder)
            # Calibrated encoders depend on the layout alone.
            if codec.code_bits == 8 or codec.layout in layouts:
                continue
            layouts.add(codec.layout)
            if codec.encoder == "search":
                self.artifact(f"{codec.name}, plain search", codec.name, "plain search", calibration="none")
            for label, (encoder, kind) in CALIBRATED.items():
                name = f"{codec.name}, {label}"
                if self.wanted.search(name):
                    self.artifact(name, codec.name, label, calibration=self.statistics(kind), encoder=encoder)
        for codec_name in INPUTS_ONLY:
            for label, kind in (("gptq, inputs only", "inputs"), ("gptq, sequential", codec_name)):
                name = f"{codec_name}, {label}"
                if self.wanted.search(name):
                    self.artifact(name, codec_name, label, calibration=self.statistics(kind), encoder="gptq")
        for codec_name in TUNED:
            for label, kind in (("gptq, tuned", "text"), ("gptq, own text, tuned", "self")):
                name = f"{codec_name}, {label}"
                if self.wanted.search(name):
                    self.artifact(name, codec_name, label, tune=kind, calibration=self.statistics(kind))
        for codec_name in ("int8_sym_v1", "int4_opt_v1", "int4_lut16_v1", "int4_lut32_v1"):
            self.artifact(f"whole model: {codec_name}", codec_name, "", whole=True)
            name = f"whole model: {codec_name}, gptq"
            if codec_name != "int8_sym_v1" and self.wanted.search(name):
                self.artifact(name, codec_name, "gptq", whole=True, calibration=self.statistics("text"))
        if self.args.peers:
            importance = self.importance()
            for peer in quality_peers.peers():
                self.peer(peer, importance)


def updated(before: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as before, those that were measured again as they are now, new ones after their model's."""
    rows = {(row["model"], row["name"]): row for row in [*before, *measured]}
    models = list(dict.fromkeys(model for model, _ in rows))
    return sorted(rows.values(), key=lambda row: models.index(row["model"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [REFERENCE / "models" / name for name in ("gpt2-books", "llama-books")]
    parser.add_argument("--models", type=Path, nargs="+", default=models)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--windows", type=int, help="of text/dev.txt (all)")
    parser.add_argument("--calibration-windows", type=int, default=160)
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose names match")
    parser.add_argument("--update", action="store_true", help="keep the rows of the results that are not measured now")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--folder", type=Path, help="where statistics lie, and stay")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="ROWS", help="`.rows` files to put into the results")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if args.merge:
        results = json.loads(args.results.read_text())
        rows = [row for path in args.merge for row in json.loads(path.read_text())]
        report(args.results.stem, results["machine"], updated(results["rows"], rows), results["notes"])
        return
    with tempfile.TemporaryDirectory(prefix="tenpak-quality-") as temporary:
        for model in args.models:
            Bench(model, args.folder or Path(temporary), args, rows).run()
    if args.update:
        rows = updated(json.loads(args.results.read_text())["rows"], rows)
    about = machine("tenpak", "numpy", *quality_peers.packages())
    if args.device == "cuda":
        import cupy

        about["gpu"] = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    report(args.results.stem, about, rows, [f"not measured: {reason}" for reason in quality_peers.missing()])


if __name__ == "__main__":
    main()
