"""Writing text: sampling, pieces of text, chat templates, the model's loop, the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tenpak
from support import DATA, require, tenpak_command
from tenpak.chat import ChatTemplate
from tenpak.detokenize import Detokenizer
from tenpak.sampling import Sampling, choose, gumbel, philox

LLAMA, GPT2 = DATA / "tiny-llama", DATA / "tiny-gpt2"
both = pytest.mark.parametrize("path", [LLAMA, GPT2], ids=["llama", "gpt2"])
MASK = 0xFFFFFFFF


def plain_philox(counter, key):
    """Philox 4x32-10 in plain integers, as the paper writes it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(second >> 32) ^ c[1] ^ k[0], second & MASK, (first >> 32) ^ c[3] ^ k[1], first & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def test_philox_is_philox():
    # Known answers of the authors' Random123.
    assert plain_philox([0] * 4, [0] * 2)[0] == 0x6627E8D5
    assert plain_philox([MASK] * 4, [MASK] * 2)[0] == 0x408F276D
    for token, position, seed in ((0, 0, 0), (7, 3, 2**40 + 5), (151935, 2**33 + 1, 2**64 - 1)):
        expected = plain_philox([token, position & MASK, position >> 32, 0], [seed & MASK, seed >> 32])[0]
        assert philox(np.array([token]), position, seed)[0] == expected


def test_greedy_takes_the_largest():
    logits = np.random.default_rng(0).standard_normal(1000)
    assert choose(logits, Sampling(), 0) == logits.argmax()
    assert choose(logits, Sampling(temperature=1e-38), 0) == logits.argmax()
    assert choose(logits, Sampling(temperature=5, top_k=1), 0) == logits.argmax()
    assert choose(logits, Sampling(temperature=5, top_p=1e-9), 0) == logits.argmax()


def drawn(logits, sampling, count=20000):
    picked = [choose(logits, sampling, position) for position in range(count)]
    return np.bincount(picked, minlength=len(logits)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature):
    logits = np.log([0.5, 0.25, 0.15, 0.1])
    expected = np.exp(logits / temperature)
    assert np.abs(drawn(logits, Sampling(temperature)) - expected / expected.sum()).max() < 0.015


def test_top_k_and_top_p_leave_the_most_likely():
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    assert np.abs(drawn(logits, Sampling(1, top_k=2), 4000) - [0, 4 / 7, 0, 3 / 7]).max() < 0.03
    assert set(np.flatnonzero(drawn(logits, Sampling(1, top_p=0.65), 500))) == {1, 3}
    assert set(np.flatnonzero(drawn(logits, Sampling(1, top_p=0.75), 500))) == {1, 2, 3}
    # top-p counts what top-k has left.
    assert set(np.flatnonzero(drawn(logits, Sampling(1, top_k=2, top_p=0.5), 500))) == {1}


def test_the_same_seed_draws_the_same():
    logits = np.random.default_rng(1).standard_normal(500)
    first = [choose(logits, Sampling(1, seed=3), position) for position in range(50)]
    assert first == [choose(logits, Sampling(1, seed=3), position) for position in range(50)]
    assert first != [choose(logits, Sampling(1, seed=4), position) for position in range(50)]
    assert len(set(first)) > 10


def test_gumbel_is_finite_and_gumbels():
    noise = gumbel(np.arange(200_000), 5, 9)
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.var() - np.pi**2 / 6) < 0.02


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"seed": -1}]
)
def test_senseless_sampling_is_refused(wrong):
    with pytest.raises(tenpak.UsageError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_logits_that_are_no_numbers_are_refused():
    with pytest.raises(tenpak.InputError, match="position 3"):
        choose(np.array([0, np.nan]), Sampling(), 3)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    @staticmethod
    def decode(ids):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["plain", "naïve – 'twas", "鯨と🐋 and 👩‍👩‍👧", ""])
def test_pieces_never_split_a_character(text):
    detokenizer = Detokenizer(Bytes())
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join([*pieces, detokenizer.finish()]) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_bytes_that_are_no_text_do_not_wait_for_ever():
    detokenizer = Detokenizer(Bytes())
    pieces = [detokenizer.push(byte) for byte in b"\xff" * 40 + b"end"]
    assert "".join(pieces[:40])
    assert ("".join(pieces) + detokenizer.finish()).endswith("end")


def test_a_stop_text_is_never_shown_even_in_parts():
    for text, stops, expected in (
        ("one two three", ["two"], "one "),
        ("aab", ["ab"], "a"),
        ("abcabd", ["abd"], "abc"),
        ("xyz", ["zz", "y"], "x"),
        ("half sto", ["stop"], "half sto"),
    ):
        detokenizer = Detokenizer(Bytes(), stops)
        pieces = [detokenizer.push(byte) for byte in text.encode()]
        assert "".join(pieces).startswith(expected[:1])
        assert "".join([*pieces, detokenizer.finish()]) == expected, (text, stops)


class Files:
    """A source that has small files alone."""

    path = "here"

    def __init__(self, **files):
        self.files = {name.replace("__", "."): text for name, text in files.items()}

    def file(self, name):
        text = self.files.get(name)
        return None if text is None else text.encode()


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("form", ["string", "list", "file"])
def test_chat_templates_of_every_form(form):
    pytest.importorskip("jinja2")
    config = {"bos_token": {"content": "<s>"}, "chat_template": TEMPLATE}
    if form == "list":
        config["chat_template"] = [{"name": "tool", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    files = {"tokenizer_config__json": json.dumps(config)}
    if form == "file":
        files = {
            "tokenizer_config__json": json.dumps({"bos_token": "<s>", "chat_template": "old"}),
            "chat_template__jinja": TEMPLATE,
        }
    template = ChatTemplate.of(Files(**files))
    assert template.render([{"role": "user", "content": "hi"}]) == "<s><user>hi</user><assistant>"


def test_a_chat_template_cannot_leave_its_sandbox():
    pytest.importorskip("jinja2")
    escape = "{{ messages.__class__.__base__.__subclasses__() }}"
    template = ChatTemplate.of(Files(tokenizer_config__json=json.dumps({"chat_template": escape})))
    with pytest.raises(tenpak.InputError, match="unsafe"):
        template.render([])


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("{% if %}", tenpak.InputError, "line 1"),
        ("{{ raise_exception('roles must alternate') }}", tenpak.UsageError, "roles must alternate"),
        ("{{ 1 / 0 }}", tenpak.InputError, "fails"),
    ],
)
def test_chat_templates_that_fail_say_how(text, error, words):
    pytest.importorskip("jinja2")
    with pytest.raises(error, match=words):
        ChatTemplate("here", text, {}).render([])


@both
def test_greedy_text_is_what_the_decoder_thinks_most_likely(path):
    require("text")
    model = tenpak.Model.open(path, device="cpu")
    written = model.generate([5, 9, 3], max_tokens=12)
    tokens = [5, 9, 3]
    cache = model.decoder.cache("fp16")
    logits = model.decoder.logits([tokens], cache)[0, -1]
    for token in written.tokens:
        assert token == logits.argmax()
        logits = model.decoder.logits([[token]], cache)[0, -1]
    assert written.prompt_tokens == 3
    assert written.text == model.decoder.tokenizer.decode(list(written.tokens))


@both
def test_a_stream_is_its_text_in_pieces(path):
    require("text")
    model = tenpak.Model.open(path, device="cpu", kv="int8")
    options = {"max_tokens": 40, "temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 11}
    stream = model.stream("It was a dark", **options)
    pieces = list(stream)
    assert len(pieces) > 5
    assert "".join(pieces) == stream.result.text == model.generate("It was a dark", **options).text
    assert stream.result.text != model.generate("It was a dark", **{**options, "seed": 12}).text
    assert stream.result.stop_reason in ("length", "end")
    assert stream.result.tokens_per_second > 0


def test_a_stop_text_ends_the_loop():
    require("text")
    model = tenpak.Model.open(LLAMA, device="cpu")
    whole = model.generate("The old", max_tokens=40)
    stop = whole.text[8:12]
    ended = model.generate("The old", max_tokens=40, stop=[stop])
    assert ended.stop_reason == "stop"
    assert ended.text == whole.text[: whole.text.index(stop)]
    assert len(ended.tokens) < len(whole.tokens)


def test_an_end_token_ends_the_loop():
    require("text")
    model = tenpak.Model.open(LLAMA, device="cpu")
    whole = model.generate("The old", max_tokens=10)
    model.__dict__["end_tokens"] = frozenset({whole.tokens[4]})
    ended = model.generate("The old", max_tokens=10)
    assert ended.stop_reason == "end"
    assert ended.tokens == whole.tokens[: whole.tokens.index(whole.tokens[4]) + 1]


def test_positions_are_not_passed():
    require("text")
    model = tenpak.Model.open(GPT2, device="cpu")
    most = model.decoder.config.max_positions
    result = model.generate([1] * (most - 3), max_tokens=100)
    assert len(result.tokens) <= 3
    with pytest.raises(tenpak.UsageError, match=f"{most} tokens"):
        model.generate([1] * most)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": ""}, "no tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens 0"),
        ({"prompt": "a", "stop": [""]}, "empty stop"),
        ({"prompt": "a", "chat": True}, "no chat template"),
        ({"prompt": "a", "system": "b"}, "chat"),
        ({"prompt": [1, {"role": "user"}]}, "a prompt is"),
        ({"prompt": [1 << 40]}, "outside the vocabulary"),
    ],
)
def test_wrong_requests_are_refused(options, words):
    require("text")
    model = tenpak.Model.open(GPT2, device="cpu")
    with pytest.raises(tenpak.UsageError, match=words):
        model.generate(**options)


def test_an_artifact_is_enough(tmp_path):
    require("text")
    tenpak.compress(LLAMA, tmp_path / "m.tenpak", codec="int8_sym_v1")
    ran = tenpak_command(
        "generate", tmp_path / "m.tenpak", "--prompt", "-", "--device", "cpu", "-n", 8, "--echo", input="The old"
    )
    assert ran.out.startswith("The old")
    assert ran.err.count("slow path") == 1
    assert "tokens/s" in ran.err
    found = tenpak_command(
        "generate", tmp_path / "m.tenpak", "--prompt", "The old", "--device", "cpu", "-n", 8, "--json"
    ).json
    assert ran.out == "The old" + found["text"] + "\n"
    assert found["device"] == "cpu"
    assert len(found["tokens"]) == 8


def test_the_command_refuses_what_makes_no_sense():
    require("text")
    ran = tenpak_command("generate", LLAMA, "--prompt", "a", "--top-p", "2", "--device", "cpu", code=2)
    assert "top_p 2" in ran.err
    tenpak_command("generate", "nowhere", "--prompt", "a", code=6)
