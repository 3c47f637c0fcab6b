"""Writes tokens on one GPU: weights and cache stay quantised, and each step is one captured CUDA graph.

A layer is five launches: queries + keys + values (of the residual stream's norm), attention (which also turns, appends
and quantises), output (added to the residual stream), gate + up (of its norm, activated and multiplied), down (added).
The residual stream is FP32, all else FP16. The token is chosen on the device and stays there: while the host reads one,
the next is being computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from tenpak.cuda import glue
from tenpak.cuda.attention import append_and_attend, attend, prefill
from tenpak.cuda.cache import KVCache, RotaryTable
from tenpak.cuda.launch import overlapping
from tenpak.cuda.plans import HEAD_DIMS
from tenpak.cuda.projections import Projection, weight_of
from tenpak.decoder import Block, Config, Decoder
from tenpak.decoder.kv import KVType
from tenpak.decoder.layers import frequencies
from tenpak.decoder.source import ArtifactSource
from tenpak.errors import InputError, UsageError
from tenpak.sampling import Sampling

#: Tokens of a prompt that are computed at once.
PROMPT_AT_ONCE = 4096
#: A cache grows by this many tokens.
_ROOM = 1024


def why_not(decoder: Decoder) -> str | None:
    """Why a model cannot be run here, or None."""
    if not isinstance(decoder.source, ArtifactSource):
        return "only weights of a .tenpak are kept quantised"
    if decoder.config.head_dim not in HEAD_DIMS:
        return f"its heads of {decoder.config.head_dim} have no attention kernels"
    return None


@dataclass(frozen=True)
class _Layer:
    """A block's weights on the device."""

    block: Block
    qkv: Projection
    out: Projection
    up: Projection
    down: Projection
    q_norm: Any
    k_norm: Any

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.out, self.up, self.down


@dataclass(frozen=True)
class _Buffers:
    """What `tokens` tokens take on their way through all layers."""

    h: Any
    x: Any
    qkv: Any
    mixed: Any
    up: Any
    inner: Any

    @classmethod
    def of(cls, config: Config, tokens: int) -> _Buffers:
        heads = config.heads * config.head_dim
        gates = 1 if config.family == "gpt2" else 2
        half = cupy.float16
        return cls(
            cupy.empty((tokens, config.width), cupy.float32),
            cupy.empty((tokens, config.width), half),
            cupy.empty((tokens, heads + 2 * config.kv_heads * config.head_dim), half),
            cupy.empty((tokens, heads), half),
            cupy.empty((tokens, gates * config.intermediate), half),
            cupy.empty((tokens, config.intermediate), half),
        )


class Runner:
    """A decoder of a `.tenpak` on the current device, for one text at a time.

    Args:
        decoder: On CuPy; none of its weights need be loaded, and none is.
        kv: What keys and values are kept as; None for FP16.

    Raises:
        ArtifactError: The file is damaged.
        InputError: Its tensors do not fit its config.
        UsageError: The GPU's memory is too small.
    """

    def __init__(self, decoder: Decoder, kv: KVType | None = None) -> None:
        source = decoder.source
        assert isinstance(source, ArtifactSource)
        self.config = config = decoder.config
        self.path = source.path
        self.kv: KVType = kv or "fp16"
        self.device = int(cupy.cuda.runtime.getDevice())
        #: Where everything is queued.
        self.stream = cupy.cuda.Stream(non_blocking=True)
        artifact, axis = source.artifact, config.input_axis
        with self._here():
            self._layers = []
            for index in range(config.layers):
                block = decoder.block(index, linears=False)

                def joined(names: tuple[str, ...], *, block: Block = block, turns: bool = False) -> Projection:
                    biases = [block.linears[name].bias for name in names]
                    return Projection(artifact, names, biases, axis=axis, turns=turns)

                norms = (
                    None if norm is None else norm.weight.astype(cupy.float16) for norm in (block.q_norm, block.k_norm)
                )
                projections = (
                    joined(block.qkv),
                    joined(block.out),
                    joined(block.up, turns=len(block.up) == 2),
                    joined(block.down),
                )
                self._layers.append(_Layer(block, *projections, *norms))
            head = decoder.unread_head
            self._norm = head.norm
            self._head = Projection(artifact, [head.linear.name], [None])
            # A tied head is the embedding: the rows of one packed weight serve both.
            self._embedding = (
                self._head.weight
                if head.linear.name == decoder.embedding_name
                else weight_of(artifact, decoder.embedding_name)
            )
            self._positions = decoder.positions if config.rope is None else None
            self._step = _Buffers.of(config, 1)
            self._scores = cupy.empty((1, config.vocab), cupy.float32)
            self._how = cupy.zeros(len(glue.sampling_bytes(Sampling())), cupy.uint8)
            self._token = cupy.zeros(1, cupy.int32)
        self.stream.synchronize()
        # What uploading took beside the weights.
        cupy.get_default_memory_pool().free_all_blocks()
        self._host = _pinned(2)
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self._cache: KVCache | None = None
        self._rotary: RotaryTable | None = None
        #: The captured step: embeds the last token, and chooses the next.
        self.graph: Any = None
        self._texts = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on the device; what each step reads of them is all but most of the embedding."""
        projections = [projection for layer in self._layers for projection in layer.projections]
        tied = self._embedding is self._head.weight
        return sum(one.nbytes for one in (*projections, self._head)) + (0 if tied else int(self._embedding.nbytes))

    @property
    def bytes_per_step(self) -> int:
        """Bytes of weights that a step must read: all but the rows of the embedding that are not its token's."""
        tied = self._embedding is self._head.weight
        return self.weight_bytes - (0 if tied else int(self._embedding.nbytes))

    @property
    def cache(self) -> KVCache | None:
        """Keys and values of the last text, or None before the first."""
        return self._cache

    def tokens(self, prompt: Sequence[int], sampling: Sampling, most: int) -> Iterator[int]:
        """Writes up to `most` tokens after a prompt; nobody says here which of them end a text.

        Raises:
            InputError: The model's scores are no numbers.
            UsageError: Another text was begun before this one ended, or the GPU's memory is too small.
        """
        self._texts += 1
        text = self._texts
        with self._here():
            self._reserve(len(prompt) + most)
            self._how.set(glue.sampling_bytes(sampling))
            self._prompt(np.asarray(prompt, np.int32))
        for i in range(most):
            with self._here():
                if self._texts != text:
                    raise UsageError("another text was begun; a model writes one at a time")
                self._fetch(i % 2)
                if i + 1 < most:
                    self.graph.launch(self.stream)
            self._events[i % 2].synchronize()
            token = int(self._host[i % 2])
            if token < 0:
                position = len(prompt) + i
                raise InputError(
                    f"the model's scores at position {position} are not finite; its weights may be damaged"
                )
            yield token

    @contextmanager
    def _here(self) -> Iterator[None]:
        try:
            with cupy.cuda.Device(self.device), self.stream:
                yield
        except cupy.cuda.memory.OutOfMemoryError as error:
            remedy = "choose a smaller codec, a smaller --kv, or fewer tokens"
            raise UsageError(f"{self.path}: the GPU's memory is too small ({error}); {remedy}") from None

    def _fetch(self, slot: int) -> None:
        """Copies the chosen token to the host, without waiting."""
        runtime = cupy.cuda.runtime
        to = self._host.ctypes.data + slot * self._host.itemsize
        runtime.memcpyAsync(to, self._token.data.ptr, self._token.nbytes, runtime.memcpyDeviceToHost, self.stream.ptr)
        self._events[slot].record(self.stream)

    def _reserve(self, tokens: int) -> None:
        """A cache for so many tokens, and the step captured over it."""
        if self._cache is not None and self._cache.max_tokens >= tokens:
            return
        config = self.config
        room = min(-(-tokens // _ROOM) * _ROOM, max(config.max_positions, tokens))
        # The old one goes first, so that both need not fit.
        self.stream.synchronize()
        self.graph = self._cache = self._rotary = None
        self._cache = KVCache(config.layers, config.kv_heads, config.head_dim, room, self.kv, device=self.device)
        if config.rope is not None:
            self._rotary = RotaryTable(frequencies(config.rope, config.head_dim), self._cache.max_tokens)
        # Once as it is, which compiles kernels and makes the stream's workspace, as a capture could not.
        self._run(self._token, self._step, fresh=False)
        self.stream.synchronize()
        self.stream.begin_capture()
        try:
            self._run(self._token, self._step, fresh=False)
        except BaseException:
            with suppress(Exception):
                self.stream.end_capture()
            raise
        self.graph = self.stream.end_capture()

    def _prompt(self, prompt: Any) -> None:
        """Computes a prompt from an empty cache on, and chooses the token after it."""
        assert self._cache is not None
        self._cache.reset()
        for first in range(0, len(prompt), PROMPT_AT_ONCE):
            tokens = cupy.asarray(prompt[first : first + PROMPT_AT_ONCE])
            last = first + len(tokens) == len(prompt)
            self._run(tokens, _Buffers.of(self.config, len(tokens)), fresh=first == 0, choose=last)

    def _run(self, tokens: Any, buffers: _Buffers, *, fresh: bool, choose: bool = True) -> None:
        """Queues tokens on their way through all layers, and the choice of the one that follows; `fresh`: the first."""
        cache, config, count = self._cache, self.config, len(tokens)
        assert cache is not None
        h = buffers.h
        glue.embed(tokens, self._embedding, self._positions, cache.lengths, h)

        def normed(projection: Projection, norm: Any, added: Any, part: slice = slice(None)) -> tuple[Any, Any]:
            """What a projection takes for the norm of h + added: x, and the norm that it makes itself."""
            rows, x = h[part], buffers.x[part]
            if added is None and projection.norms(len(rows)):
                return rows, norm
            glue.norm(norm, rows, None if added is None else added[part], x)
            return x, None

        with overlapping():
            added = None
            for index, layer in enumerate(self._layers):
                layer.qkv.into(buffers.qkv, *normed(layer.qkv, layer.block.attention_norm, added))
                self._attend(index, layer, buffers, fresh and count > 1)
                added = layer.out.add_to(h, buffers.mixed)
                x, norm = normed(layer.up, layer.block.mlp_norm, added)
                layer.up.activated(buffers.inner, x, config.activation, buffers.up, norm)
                added = layer.down.add_to(h, buffers.inner)
            if choose:
                self._head.into(self._scores, *normed(self._head, self._norm, added, slice(count - 1, count)))
            cache.advance(count)
            if choose:
                glue.sample(self._scores, self._how, cache.lengths, self._token)

    def _attend(self, index: int, layer: _Layer, buffers: _Buffers, fresh: bool) -> None:
        """Stores keys and values and mixes the values of all tokens that each one sees."""
        cache, config = self._cache, self.config
        assert cache is not None
        dim, count = config.head_dim, len(buffers.qkv)
        split = buffers.qkv.reshape(1, count, -1, dim)
        heads, kv = config.heads, config.kv_heads
        q, k, v = split[:, :, :heads], split[:, :, heads : heads + kv], split[:, :, heads + kv :]
        norm = layer.block.q_norm
        eps = 0.0 if norm is None else norm.eps
        norms = {"q_norm": layer.q_norm, "k_norm": layer.k_norm}
        mixed = buffers.mixed.reshape(1, count, heads, dim)
        options = {"scale": config.score_scales[index], "window": config.windows[index], "out": mixed}
        if count == 1:
            append_and_attend(q, k, v, cache, index, rotary=self._rotary, eps=eps, **norms, **options)
            return
        cache.append(index, k, v, q=q, rotary=self._rotary, eps=eps, **norms)
        if fresh:
            prefill(q, k, v, **options)
        else:
            attend(q, cache, index, **options)


def _pinned(count: int) -> Any:
    """int32 [count] in memory that the device can write to by itself."""
    memory = cupy.cuda.alloc_pinned_memory(4 * count)
    return np.frombuffer(memory, np.int32, count)
