"""Makes the fine-tunes that bench_delta.py measures: of one base, in BF16, as people's training leaves them.

    python tests/bench/fine_tunes.py --base MODEL_FOLDER --text TRAINING_TEXT --output FOLDER

Needs torch and transformers. Four folders appear in FOLDER: `base` (the model's weights in BF16), `full` (every
weight, 200 steps of AdamW at 1e-5 on FP32 master weights, stored as BF16), `lora` (rank 16 on the attention's four
projections, 200 steps at 2e-4, merged into the base) and `five` (five of `full`'s matrices, the rest as in the base).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

STEPS, BATCH, WINDOW = 200, 2, 256
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class LowRank(torch.nn.Module):
    """A linear layer plus 2 · B A, of which only A [rank, in] and B [out, rank] learn."""

    def __init__(self, linear: torch.nn.Linear, rank: int = 16) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a = torch.nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.b = torch.nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + 2 * (x @ self.a.T @ self.b.T)

    def merged(self) -> torch.Tensor:
        return self.linear.weight + 2 * self.b @ self.a


def batches(tokens: torch.Tensor) -> Iterable[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        starts = torch.randint(0, len(tokens) - WINDOW, (BATCH,), generator=generator)
        yield torch.stack([tokens[s : s + WINDOW] for s in starts])


def train(model: torch.nn.Module, tokens: torch.Tensor, rate: float) -> None:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=0.0)
    for step, batch in enumerate(batches(tokens)):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)


def save(tensors: dict[str, torch.Tensor], like: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(like / name, folder / name)
    contiguous = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def full(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    train(model, tokens, 1e-5)
    return dict(model.state_dict())


def lora(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    plain = dict(model.state_dict())
    model.requires_grad_(False)
    adapted = {name: m for name, m in model.named_modules() if name.endswith(ATTENTION)}
    for name, linear in list(adapted.items()):
        parent, _, child = name.rpartition(".")
        adapted[name] = LowRank(linear)
        setattr(model.get_submodule(parent), child, adapted[name])
    train(model, tokens, 2e-4)
    return plain | {f"{name}.weight": m.merged() for name, m in adapted.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    torch.manual_seed(0)
    tokens = Tokenizer.from_file(str(options.base / "tokenizer.json")).encode(options.text.read_text()).ids
    base = options.output / "base"
    save(load_file(options.base / "model.safetensors"), options.base, base)
    made: dict[str, Callable[..., dict[str, torch.Tensor]]] = {"full": full, "lora": lora}
    for name, make in made.items():
        print(name, flush=True)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        save(make(model, torch.tensor(tokens)), base, options.output / name)
    kept = load_file(base / "model.safetensors")
    tuned = load_file(options.output / "full" / "model.safetensors")
    chosen = [name for name in sorted(kept) if kept[name].dim() == 2 and "embed" not in name and "head" not in name]
    save(kept | {name: tuned[name] for name in chosen[:: len(chosen) // 5][:5]}, base, options.output / "five")


if __name__ == "__main__":
    main()
