"""Conversations: what a cache kept across turns gives is what running everything anew gives."""

from __future__ import annotations

import importlib
import json

import jax
import jax.numpy as jnp
import pytest
from quick import quick

import flaxcompress as fc
from flaxcompress.config import ModelConfig, Rotary
from flaxcompress.decoding.chat import render_chat
from flaxcompress.decoding.conversation import pieces
from flaxcompress.text import Assets
from flaxcompress.tokenizer import sentence_piece_bpe

conversation = importlib.import_module("flaxcompress.decoding.conversation")

CHARACTERS = sorted(set("[userasitnthello, hi?]▁"))
PIECES = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -float(i)) for i, c in enumerate(CHARACTERS))]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def talker(**changes):
    """A random decoder whose tokenizer knows single characters."""
    files = (
        ("tokenizer.json", sentence_piece_bpe(PIECES).encode()),
        ("tokenizer_config.json", json.dumps({"bos_token": "<s>", "eos_token": "</s>"}).encode()),
        ("chat_template.jinja", TEMPLATE.encode()),
    )
    config = ModelConfig(
        **{
            "family": "llama",
            "vocabulary": len(PIECES),
            "width": 16,
            "layers": 2,
            "heads": 4,
            "key_value_heads": 2,
            "feed_forward_width": 24,
            "positions": 512,
            "segments": 0,
            "pooler": False,
            "position_embedding": "none",
            "embedding_norm": False,
            "rotary": Rotary(),
            "causal": True,
            "gated": True,
            "norm": "rms",
            "norm_place": "pre",
            "final_norm": True,
            "initializer_range": 0.4,
            "head": "causal_lm",
            **changes,
        }
    )
    assets = Assets(files=files, max_length=512, end_tokens=(2,))
    return fc.Model.init(config, key=jax.random.key(0), assets=assets)


@pytest.fixture
def ran(monkeypatch):
    """How many tokens each call has run."""
    counts: list[int] = []
    run = conversation._run
    monkeypatch.setattr(conversation, "_run", lambda p, ids, *rest: counts.append(ids.size) or run(p, ids, *rest))
    return counts


@pytest.mark.parametrize("window", quick([0, 5, 400], [0, 5]))
def test_turns_equal_prompts_run_anew(window, ran):
    model = talker(window=window)
    chat = model.chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}])
    for turn, text in enumerate(("hello, hi?", "is it?", "the sun")):
        messages = [*chat.messages, {"role": "user", "content": text}]
        prompt = render_chat(model.assets, messages)
        ran.clear()
        answer = chat.say(text, max_new_tokens=9)
        [want] = model.generate([prompt], max_new_tokens=9)
        assert answer == want
        assert chat.messages == [*messages, {"role": "assistant", "content": answer}]
        if turn and window != 5:  # a ring that has overwritten its first tokens begins anew
            assert sum(ran) < len(prompt) / 2
        else:
            assert sum(ran) == len(prompt)


def test_a_changed_message_is_run_again():
    model = talker()
    chat = model.chat()
    chat.say("hello", max_new_tokens=5)
    chat.say("is it?", max_new_tokens=5)
    chat.messages[0]["content"] = "hi"
    prompt = render_chat(model.assets, [*chat.messages, {"role": "user", "content": "so"}])
    assert chat.say("so", max_new_tokens=5) == model.generate([prompt], max_new_tokens=5)[0]


def test_draws_follow_the_key_and_repetition_is_counted_from_the_start():
    model = talker()
    settings = {"max_new_tokens": 8, "key": jax.random.key(3), "repetition_penalty": 1.7, "top_k": 5}
    chat = model.chat()
    chat.say("hello", max_new_tokens=5)
    prompt = render_chat(model.assets, [*chat.messages, {"role": "user", "content": "hi"}])
    assert chat.say("hi", **settings) == model.generate([prompt], **settings)[0]


def test_a_refused_turn_changes_nothing():
    model = talker(positions=64)
    chat = model.chat()
    first = chat.say("hello", max_new_tokens=4)
    before = [dict(m) for m in chat.messages]
    with pytest.raises(ValueError, match="more than the model's 64 positions"):
        chat.say("hello" * 20, max_new_tokens=4)
    with pytest.raises(ValueError, match="max_new_tokens"):
        chat.say("hello", max_new_tokens=-1)
    assert chat.messages == before
    prompt = render_chat(model.assets, [*before, {"role": "user", "content": "hi"}])
    assert chat.say("hi", max_new_tokens=4) == model.generate([prompt], max_new_tokens=4)[0]
    assert first == before[1]["content"]
    with pytest.raises(ValueError, match="does not predict the next token"):
        talker(head="none").chat()


def test_pieces_are_powers_of_two_that_add_up():
    for count in range(1, 70):
        assert sum(pieces(count)) == count
        assert all(n & (n - 1) == 0 for n in pieces(count))


def test_a_cache_cut_and_grown_gives_what_a_fresh_one_gives():
    from flaxcompress.nn import cut, grow

    model = talker()
    ids = jnp.asarray(jax.random.randint(jax.random.key(1), (1, 12), 0, len(PIECES)))
    full = model(ids).logits
    out = model(ids[:, :8], cache=model.new_cache(1, 8))
    cache = grow(cut(out.cache, 5), 20)
    got = model(ids[:, 5:], cache=cache).logits
    assert jnp.abs(got - full[:, 5:]).max() <= 1e-5 * jnp.abs(full).max()


def test_the_command_line_converses(tmp_path, monkeypatch, capsys):
    import io

    from flaxcompress.cli import main

    model = talker()
    fc.save(model, tmp_path / "m")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nhi\n"))
    assert main(["generate", str(tmp_path / "m"), "--chat", "--max-new-tokens", "6"]) in (0, None)
    chat = model.chat()
    want = [chat.say(text, max_new_tokens=6) for text in ("hello", "hi")]
    out = capsys.readouterr().out
    assert out.startswith("\n".join(want)) and "tokens in the cache" in out
    for flags, message in (([], "give --prompt, or --chat"), (["--chat", "--beams", "2"], "goes with neither")):
        assert main(["generate", str(tmp_path / "m"), *flags]) == 2
        assert message in capsys.readouterr().err


def test_the_command_line_continues_a_text(tmp_path, capsys):
    from flaxcompress.cli import main

    model = talker()
    fc.save(model, tmp_path / "m")
    command = ["generate", str(tmp_path / "m"), "--prompt", "hello", "--max-new-tokens", "6"]
    assert main([*command, "--json", str(tmp_path / "found.json")]) in (0, None)
    [want] = model.generate(["hello"], max_new_tokens=6, return_ids=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["text"], found["ids"], found["finished"]) == (want.text, want.ids, want.finished)
    assert capsys.readouterr().out.startswith(want.text)
