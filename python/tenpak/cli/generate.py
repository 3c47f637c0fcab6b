"""tenpak generate: write what follows a prompt.

examples:
  tenpak generate model.tenpak --prompt "Why is the sky blue?"
  tenpak generate model.tenpak --prompt "Once upon a time" --no-chat --temperature 0.8 --top-p 0.95 --seed 7
  tenpak generate model.tenpak --prompt - --kv int8 --max-tokens 500

The model is a .tenpak or .gguf file, a Hugging Face folder, or a .safetensors file with config.json beside it, of the
GPT-2, Llama, Mistral, Qwen2 or Qwen3 kind. Text goes to standard output as it is written, speed to standard error. A
model with a chat template is asked the prompt as a question; --no-chat continues it as a text. Without --temperature
the most likely token is taken, always.

exit codes: 0 done; 2 a wrong request, a prompt too long, a package that is missing; 3 a model or prompt that cannot be
read; 4 a damaged artifact; 5 a kind of model that cannot be run; 6 the file system refused; 130 interrupted
"""

from __future__ import annotations

import argparse
import sys

import tenpak
from tenpak.cli.table import count, duration, print_json
from tenpak.decoder.kv import KV_TYPES
from tenpak.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="what writes")
    parser.add_argument("--prompt", "-p", required=True, metavar="TEXT", help="what it is given; - reads it from stdin")
    parser.add_argument("--system", metavar="TEXT", help="what a chat is told first")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put the prompt into the model's chat template (if it has one)",
    )
    parser.add_argument("--max-tokens", "-n", type=int, default=256, metavar="N", help="at most as many (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most likely; 0 for all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that make up P")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed, the same text (%(default)s)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end where this would be written (may be repeated)"
    )
    parser.add_argument("--kv", choices=KV_TYPES, default="fp16", help="what keys and values are kept in (%(default)s)")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "wgpu"),
        default="auto",
        help="where to compute (an NVIDIA GPU if there is one; wgpu: quantised layers on any GPU)",
    )
    parser.add_argument("--echo", action="store_true", help="print the prompt before the text")
    parser.add_argument("--quiet", "-q", action="store_true", help="no speed on standard error")


def run(arguments: argparse.Namespace) -> None:
    prompt = _stdin() if arguments.prompt == "-" else arguments.prompt
    model = tenpak.Model.open(arguments.model, device=arguments.device, kv=arguments.kv)
    stream = model.stream(
        prompt,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=arguments.stop,
        chat=arguments.chat,
        system=arguments.system,
    )
    if model.device == "cpu" and not arguments.quiet:
        print("tenpak: on the CPU, in FP32: the slow path; --device cuda uses a GPU", file=sys.stderr)
    if arguments.json:
        report = {"model": arguments.model, "device": model.device, "kv": model.kv, "prompt": prompt}
        print_json({**report, **stream.result.to_dict()})
        return
    if arguments.echo:
        print(prompt, end="", flush=True)
    for piece in stream:
        print(piece, end="", flush=True)
    print(flush=True)
    if not arguments.quiet:
        print(_speed(stream.result), file=sys.stderr)


def _speed(result: tenpak.Generation) -> str:
    prompt = f"{count(result.prompt_tokens)} tokens in {duration(result.prompt_seconds)}"
    text = f"{count(len(result.tokens))} tokens in {duration(result.prompt_seconds + result.decode_seconds)}"
    return (
        f"prompt {prompt}, {result.prompt_tokens_per_second:.1f} tokens/s; "
        f"text {text}, {result.tokens_per_second:.1f} tokens/s"
    )


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: byte {error.start} is no UTF-8; give text") from None
