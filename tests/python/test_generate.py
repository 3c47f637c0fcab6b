"""Writing text: tokens are chosen as sampling says, text comes whole, and it is what the decoder's scores lead to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tenpak
from support import DATA, require, tenpak_command
from tenpak.chat import render
from tenpak.decoder import Decoder, open_source
from tenpak.detokenize import TextStream
from tenpak.errors import InputError, UsageError
from tenpak.sampling import Sampling, choose, uniform

TEXT = "It was a dark and stormy"


@pytest.fixture(params=["tiny-gpt2", "tiny-llama"])
def model(request: pytest.FixtureRequest) -> Path:
    require("text")
    return DATA / request.param


def probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """By the definition, token by token from the likeliest on."""
    p = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(len(p)), key=lambda token: (-logits[token], token))[: top_k or len(p)]
    total, held, kept = sum(p[token] for token in order), 0.0, []
    for token in order:
        kept.append(token)
        held += p[token]
        if held >= top_p * total:
            break
    out = np.zeros(len(p))
    out[kept] = p[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 0.9), (1.3, 5, 1.0), (1.0, 7, 0.6), (1.0, 1, 1.0)]
)
def test_tokens_are_as_frequent_as_they_are_likely(temperature, top_k, top_p):
    logits = np.random.default_rng(3).standard_normal(40) * 2
    wanted = probabilities(logits, temperature, top_k, top_p)
    count = 6000
    sampling = Sampling(temperature, top_k, top_p, seed=11)
    drawn = np.bincount([choose(logits, sampling, i) for i in range(count)], minlength=40)
    assert not drawn[wanted == 0].any()
    # Five standard deviations.
    assert (np.abs(drawn - count * wanted) <= 5 * np.sqrt(count * wanted * (1 - wanted)) + 1e-9).all()


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals():
    logits = np.array([0.5, 2.0, 2.0, -1.0], np.float32)
    assert {choose(logits, Sampling(temperature=0, seed=s), s) for s in range(20)} == {1}


def test_chance_depends_on_seed_and_position_alone():
    numbers = {(s, p): uniform(s, p) for s in range(20) for p in range(20)}
    assert len(set(numbers.values())) == len(numbers)
    assert all(0 <= u < 1 for u in numbers.values())
    assert uniform(7, 3) == numbers[7, 3]
    assert abs(np.mean(list(numbers.values())) - 0.5) < 0.06


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize(
    ("prompt", "more", "message"),
    [
        (5, {}, "a prompt is a text, messages or tokens, not int"),
        (b"text", {}, "not bytes"),
        ([1.5, 2.0], {}, "tokens must be whole numbers in one dimension"),
        ([[1], [2]], {}, "tokens must be whole numbers in one dimension"),
        ("text \ud800", {}, "half a surrogate pair"),
        ("text", {"stop": 5}, "stop 5 is no text and no list of texts"),
        ("text", {"stop": [5]}, r"stop \[5\] is no text"),
        ("text", {"max_tokens": "x"}, "max_tokens 'x' is no whole number from 1 on"),
        ("text", {"seed": 1.5}, "seed 1.5 is no whole number"),
        ("text", {"temperature": "hot"}, "temperature 'hot' is no number from 0 on"),
    ],
)
def test_requests_of_a_wrong_type_are_refused(model, prompt, more, message):
    with pytest.raises(UsageError, match=message):
        tenpak.Model.open(model, device="cpu").stream(prompt, **more)


def test_scores_that_are_no_numbers_are_refused():
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match="not finite"):
            choose(np.array([0.0, bad]), Sampling(), 5)
    assert choose(np.array([-np.inf, 0.0]), Sampling(), 5) == 1


@pytest.mark.parametrize("seed", range(6))
def test_pieces_are_the_whole_text_and_never_half_a_character(model, seed):
    tokenizer = Decoder.open(model).tokenizer
    text = "naïve café — “quoted” 雪が降る 🎉🎊 e\u0301 done"
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    if seed:
        # Any tokens, also bytes that are no characters.
        tokens = np.random.default_rng(seed).integers(1, tokenizer.get_vocab_size(), 200).tolist()
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    whole = tokenizer.decode(tokens)
    assert "".join(pieces) + stream.finish() == whole
    if not seed:
        assert not any("\ufffd" in piece for piece in pieces)
        assert len([piece for piece in pieces if piece]) > 5


def test_a_stop_text_ends_it_wherever_tokens_cut_it(model):
    tokenizer = Decoder.open(model).tokenizer
    tokens = tokenizer.encode("one two three four", add_special_tokens=False).ids
    for stop, wanted in [(["thr"], "one two "), (["wo t", "four"], "one t"), (["five"], "one two three four")]:
        stream = TextStream(tokenizer, stop=stop)
        pieces = []
        for token in tokens:
            pieces.append(stream.push(token))
            if stream.stopped:
                break
        assert "".join(pieces) + stream.finish() == wanted
        assert stream.stopped == (wanted != "one two three four")


def test_greedy_text_is_that_of_the_decoders_scores(model):
    decoder = Decoder.open(model)
    prompt = decoder.tokenizer.encode(TEXT).ids
    tokens = list(prompt)
    for _ in range(12):
        tokens.append(int(decoder.logits([tokens])[0, -1].argmax()))
    opened = tenpak.Model.open(model, device="cpu")
    done = opened.generate(TEXT, max_tokens=12, temperature=0)
    assert list(done.tokens) == tokens[len(prompt) :]
    assert done.finish == "length"
    assert done.prompt_tokens == len(prompt)
    whole, begun = decoder.tokenizer.decode(tokens), decoder.tokenizer.decode(prompt)
    assert begun + done.text == whole
    assert opened.generate(prompt, max_tokens=12, temperature=0).tokens == done.tokens


def test_the_seed_decides_and_pieces_are_the_text(model):
    opened = tenpak.Model.open(model, device="cpu")
    texts = [opened.generate(TEXT, max_tokens=20, temperature=1.0, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    stream = opened.stream(TEXT, max_tokens=20, temperature=1.0, seed=1)
    with pytest.raises(UsageError, match="not ended"):
        _ = stream.result
    assert "".join(stream) == texts[0] == stream.result.text


def test_a_long_prompt_goes_through_in_parts(model, monkeypatch):
    tokens = np.random.default_rng(0).integers(1, 2048, 50).tolist()
    opened = tenpak.Model.open(model, device="cpu")
    whole = opened.generate(tokens, max_tokens=5, temperature=0).tokens
    monkeypatch.setattr("tenpak.model.PROMPT_AT_ONCE", 7)
    assert opened.generate(tokens, max_tokens=5, temperature=0).tokens == whole


def test_it_ends_where_the_model_says_so_and_where_its_positions_end(model, tmp_path):
    opened = tenpak.Model.open(model, device="cpu")
    free = opened.generate(TEXT, max_tokens=8, temperature=0).tokens
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[3]]}))
    ended = tenpak.Model.open(folder, device="cpu").generate(TEXT, max_tokens=8, temperature=0)
    first = free.index(free[3])
    assert (ended.tokens, ended.finish) == (free[:first], "end")
    limit = opened.decoder.config.max_positions
    full = opened.generate([5] * (limit - 2), max_tokens=9, temperature=0)
    assert full.finish == "end" or len(full.tokens) == 2
    with pytest.raises(UsageError, match=f"none of the {limit} positions"):
        opened.generate([5] * limit)
    for empty in ("", [], ()):
        with pytest.raises(UsageError, match="empty"):
            opened.generate(empty)
    with pytest.raises(UsageError, match="max_tokens 0"):
        opened.generate(TEXT, max_tokens=0)


@pytest.mark.parametrize("kv", ["fp16", "int8"])
def test_a_quantised_cache_writes_much_the_same(model, kv):
    exact = tenpak.Model.open(model, device="cpu").generate(TEXT, max_tokens=6, temperature=0)
    assert tenpak.Model.open(model, device="cpu", kv=kv).generate(TEXT, max_tokens=6, temperature=0).text == exact.text


CHAT = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ bos_token }}{% endif %}"
)


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    require("text")
    pytest.importorskip("jinja2")
    folder = tmp_path / "chatty"
    shutil.copytree(DATA / "tiny-llama", folder)
    config = {"chat_template": CHAT, "bos_token": {"content": "[B]"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_chat_is_written_as_its_template_says(chatty, tmp_path):
    path = tmp_path / "chatty.tenpak"
    tenpak.compress(chatty, path, "int8_sym_v1")
    for where in (chatty, path):
        source = open_source(where)
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi "}]
        assert render(source, messages) == "<system>Be brief.\n<user>Hi\n<assistant>[B]"
    opened = tenpak.Model.open(path, device="cpu")
    assert opened.has_chat
    chat = opened.prompt_tokens("Hi", system="Be brief.")
    assert chat == opened.decoder.encode_text("<system>Be brief.\n<user>Hi\n<assistant>[B]")
    assert chat == opened.prompt_tokens(messages)
    assert opened.prompt_tokens("Hi", chat=False) == opened.decoder.tokenizer.encode("Hi").ids
    with pytest.raises(UsageError, match="no tools"):
        opened.generate([{"role": "tool", "content": "x"}])


def test_a_template_is_looked_for_in_every_place_and_stays_in_its_sandbox(chatty):
    (chatty / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(InputError, match="broken"):
        render(open_source(chatty), [{"role": "user", "content": "x"}])
    (chatty / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(InputError, match="broken"):
        render(open_source(chatty), [{"role": "user", "content": "x"}])
    (chatty / "chat_template.jinja").unlink()
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (chatty / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert render(open_source(chatty), []) == "D"
    (chatty / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        render(open_source(chatty), [])


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = b %}{% endfor %}{% endfor %}" * 9,
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ messages[0]['content'] ~ undefined_name.what }}",
        "{{ 1 / 0 }}",
    ],
)
def test_whatever_a_template_does_wrong_is_one_sentence(chatty, template):
    (chatty / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=r"its chat template is broken: ."):
        render(open_source(chatty), [{"role": "user", "content": "x"}])


def test_a_model_without_a_template_does_not_chat(model):
    with pytest.raises(UsageError, match="no chat template"):
        tenpak.Model.open(model, device="cpu").generate("Hi", chat=True)


def test_the_console_script_writes_the_same_text(model):
    options = ["--prompt", TEXT, "--max-tokens", 15, "--seed", 4, "--device", "cpu"]
    plain = tenpak_command("generate", model, *options)
    found = tenpak_command("generate", model, *options, "--json").json
    assert plain.out == found["text"] + "\n"
    assert "tokens in" in plain.err
    assert len(found["tokens"]) == 15
    echoed = tenpak_command("generate", model, *options[2:], "--prompt", "-", "--echo", "--quiet", input=TEXT)
    assert (echoed.out, echoed.err) == (TEXT + plain.out, "")
    stopped = tenpak_command("generate", model, *options, "--stop", found["text"][3:6])
    assert stopped.out == found["text"][: found["text"].index(found["text"][3:6])] + "\n"


def test_wrong_requests_end_with_one_sentence(model, tmp_path):
    for wrong in (["--temperature", -1], ["--top-p", 2], ["--max-tokens", 0], ["--chat"]):
        tenpak_command("generate", model, "--prompt", "x", "--device", "cpu", *wrong, code=2)
    tenpak_command("generate", tmp_path / "none", "--prompt", "x", code=6)
