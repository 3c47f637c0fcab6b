"""tenpak doctor: show what is installed, and what each optional part would need.

examples:
  tenpak doctor
  tenpak doctor --json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from dataclasses import asdict
from typing import Any

from tenpak import __version__, _core, wgpu
from tenpak.cli.table import pairs, print_json, table
from tenpak.errors import UnsupportedError

#: Packages, what they are for, and the extra that brings them.
_OPTIONAL = (
    (("cupy-cuda13x", "cupy-cuda12x", "cupy"), "NVIDIA GPUs: tenpak.cuda, --device cuda", "tenpak[cuda13]"),
    (("tokenizers",), "text, as in `tenpak eval` and `generate`", "tenpak[text]"),
    (("jinja2",), "chat templates in `tenpak generate`", "tenpak[text]"),
    (("torch",), "tenpak.torch, load_state_dict(framework='torch')", "tenpak[torch]"),
    (("transformers",), "running restored folders", "tenpak[hf]"),
    (("safetensors",), "reading restored files elsewhere", "tenpak[hf]"),
    (("ml-dtypes",), "bfloat16 arrays in NumPy", "ml-dtypes"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(arguments: argparse.Namespace) -> None:
    used, available = _core.simd()
    about: dict[str, Any] = {
        "tenpak": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "numpy": importlib.metadata.version("numpy"),
        "cores": os.cpu_count(),
        "simd": used,
        "simd_available": available,
    }
    optional: list[dict[str, str | None]] = []
    for packages, purpose, needs in _OPTIONAL:
        found = next((f"{p} {v}" for p in packages if (v := _version(p))), None)
        optional.append({"for": purpose, "installed": found, "install": f"pip install '{needs}'"})
    gpus, without = _adapters()
    if arguments.json:
        print_json(about | {"optional": optional, "wgpu": [asdict(gpu) for gpu in gpus], "wgpu_missing": without})
        return
    rows = [(name, str(value)) for name, value in about.items() if name not in ("simd", "simd_available")]
    rows.append(("simd", f"{used} (this machine has {', '.join(available)}; TENPAK_SIMD chooses)"))
    print(pairs(rows))
    print()
    print(
        table(
            ["optional", "installed", "to install"],
            [[o["for"] or "", o["installed"] or "no", o["install"] or ""] for o in optional],
        )
    )

    print()
    if without is not None:
        print(f"GPUs for tenpak.wgpu and --device wgpu: {without}")
        return
    features = ("half", "subgroups", "timestamps")
    rows_of_gpus = [
        [gpu.name, gpu.backend, gpu.kind, gpu.driver, ", ".join(f for f in features if getattr(gpu, f))] for gpu in gpus
    ]
    print(table(["GPU for tenpak.wgpu", "through", "kind", "driver", "has"], rows_of_gpus))


def _adapters() -> tuple[list[wgpu.Adapter], str | None]:
    """The GPUs that wgpu finds, or why there are none."""
    try:
        gpus = wgpu.adapters()
    except UnsupportedError as error:
        return [], str(error)
    return gpus, None if gpus else "none found; install its Vulkan driver"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
