"""tenpak generate: let a model write text.

examples:
  tenpak generate model.tenpak --prompt "It was a dark and stormy"
  tenpak generate chat-model.tenpak --prompt "Why is the sky blue?" --system "Answer in one sentence."
  cat question.txt | tenpak generate model.tenpak --prompt - --temperature 0 --max-tokens 100
  tenpak generate model.tenpak --prompt "Once upon a time" --seed 7 --json

The model is a .tenpak file, a Hugging Face folder, a GGUF file, or a .safetensors file with config.json beside it, of
the GPT-2, Llama, Mistral, Qwen2 or Qwen3 kind. Where it comes with a chat template, the prompt is a user's message to
be answered; --no-chat continues it instead. The text goes to standard output as it is written, how fast it was to
standard error. The same --seed writes the same text. Texts need the package tokenizers, chats also jinja2: pip install
'tenpak[text]'.

exit codes: 0 done; 2 a wrong request, a prompt that is too long, a package that is missing; 3 a model that cannot be
read; 4 a damaged artifact; 5 a kind of model that cannot be run; 6 the file system refused; 130 interrupted
"""

from __future__ import annotations

import argparse
import sys

import tenpak
from tenpak.cli.table import count, duration, print_json, size
from tenpak.decoder.kv import KV_TYPES
from tenpak.errors import InputError, UsageError
from tenpak.model import MAX_TOKENS, Generation
from tenpak.sampling import Sampling, checked_count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="what writes")
    parser.add_argument("--prompt", "-p", required=True, metavar="TEXT", help="what to answer or continue; - reads it")
    parser.add_argument("--max-tokens", "-n", type=int, default=MAX_TOKENS, metavar="N", help="at most (%(default)s)")
    parser.add_argument(
        "--temperature", "-t", type=float, default=0.8, metavar="X", help="0 takes the likeliest (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="consider only the K likeliest tokens (all)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="consider only the likeliest tokens that hold this part of the probability (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="another one writes another text (%(default)s)"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    chat = parser.add_mutually_exclusive_group()
    chat.add_argument("--chat", action="store_true", default=None, help="the prompt is a message to answer")
    chat.add_argument("--no-chat", dest="chat", action="store_false", help="the prompt is a text to continue")
    parser.add_argument("--system", metavar="TEXT", help="what a chat begins with")
    parser.add_argument("--echo", action="store_true", help="print the prompt before the text")
    parser.add_argument("--kv", choices=KV_TYPES, help="keep keys and values in so many bits (exact)")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "wgpu"),
        default="auto",
        help="where to compute (an NVIDIA GPU if there is one; wgpu: quantised layers on any GPU)",
    )
    parser.add_argument("--quiet", "-q", action="store_true", help="no notes on standard error")


def run(arguments: argparse.Namespace) -> None:
    # Before the model is loaded, which may take a while.
    Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    checked_count("--max-tokens", arguments.max_tokens)
    prompt = _read() if arguments.prompt == "-" else arguments.prompt
    for text in (prompt, arguments.system or "", *arguments.stop):
        _refuse_broken(text)
    model = tenpak.Model.open(arguments.model, device=arguments.device, kv=arguments.kv)
    if model.device == "cpu" and not arguments.quiet:
        print("computing on the CPU with weights in FP32, the slow path; an NVIDIA GPU is faster", file=sys.stderr)
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
    if arguments.json:
        for _ in stream:
            pass
        about = {"model": arguments.model, "device": model.device, "gpu_bytes": model.gpu_bytes, "prompt": prompt}
        print_json({**about, **stream.result.to_dict()})
        return
    begun = False
    try:
        for piece in stream:
            if arguments.echo and not begun:
                piece = prompt + piece
            begun = True
            sys.stdout.write(piece)
            sys.stdout.flush()
        if not begun:
            sys.stdout.write(prompt if arguments.echo else "")
        begun = True
    finally:
        # Also when interrupted: what follows begins on a line of its own.
        if begun:
            sys.stdout.write("\n")
            sys.stdout.flush()
    if not arguments.quiet:
        print(_summary(stream.result), file=sys.stderr)
        if model.gpu_bytes:
            parts = ", ".join(f"{what} {size(taken)}" for what, taken in model.gpu_bytes.items())
            print(f"GPU memory: {parts}", file=sys.stderr)


def _read() -> str:
    if sys.stdin is None:
        raise InputError("the prompt cannot be read: standard input is closed")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on standard input is no UTF-8: {error}") from None


def _refuse_broken(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        # Python keeps bytes of arguments that are no UTF-8 as lone surrogates.
        raise UsageError(f"{text!r} is no Unicode text; write it as UTF-8") from None


def _summary(done: Generation) -> str:
    ended = {"end": "the model ended it", "stop": "a stop text came", "length": "as long as was asked for"}
    return (
        f"prompt: {count(done.prompt_tokens)} tokens in {duration(done.prompt_seconds)} "
        f"({done.prompt_tokens_per_second:.1f}/s); text: {count(len(done.tokens))} tokens in {duration(done.seconds)} "
        f"({done.tokens_per_second:.1f}/s); {ended[done.finish]}"
    )
