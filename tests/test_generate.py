"""Decoding against transformers' generate, and its own rules against plain loops."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick

import flaxcompress as fc

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import family_cases as families  # noqa: E402

TRANSLATORS = [family for family, head in families.HEADED if head == "seq2seq_lm"]
DECODERS = [family for family, head in families.HEADED if head == "causal_lm"]


def prompts(config, seed, positions=18):
    """Three prompts of different lengths, and as transformers wants them: padded on the left."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, config.vocab_size, n).tolist() for n in (2, 5, 3)]
    ids = np.zeros((3, 5), int)
    mask = np.zeros((3, 5), int)
    for i, row in enumerate(rows):
        ids[i, 5 - len(row) :], mask[i, 5 - len(row) :] = row, 1
    return rows, torch.tensor(ids), torch.tensor(mask)


def searched(among, decoders):
    """Families, draws and numbers of beams."""
    cases = [(family, number, beams) for family in decoders for number in range(3) for beams in (1, 3)]
    return pytest.mark.parametrize(("family", "number", "beams"), quick(cases, among))


# Llama, Qwen2 and DeepSeek V3 are made of what Mistral, Qwen3 and DeepSeek V2 have too.
@searched([("gpt2", 0, 1), ("mistral", 0, 1), ("qwen3", 0, 3), ("deepseek_v2", 0, 3)], DECODERS)
def test_tokens_equal_those_of_transformers(family, number, beams, tmp_path):
    network, seed = families.drawn(family, "causal_lm", number, tmp_path)
    network.generation_config.eos_token_id = 2
    network.generation_config.pad_token_id = 0
    network.generation_config.save_pretrained(tmp_path)
    model = fc.load(tmp_path)
    assert model.assets.end_tokens == (2,)
    rows, ids, mask = prompts(network.config, seed)
    with torch.no_grad():
        want = network.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, num_beams=beams)
    got = model.generate(rows, max_new_tokens=12, beams=beams, return_ids=True)
    for ours, theirs in zip(got, want[:, 5:].tolist(), strict=True):
        end = theirs.index(2) + 1 if 2 in theirs else len(theirs)
        assert ours.ids == theirs[:end]


def sources(network, seed):
    """Three sources of different lengths, and as transformers wants them: padded on the right."""
    rng = np.random.default_rng(seed)
    pad = network.config.pad_token_id
    rows = [rng.integers(3, network.config.vocab_size - 1, n).tolist() for n in (2, 7, 4)]
    ids = np.array([row + [pad] * (7 - len(row)) for row in rows])
    return rows, torch.tensor(ids), torch.tensor(np.arange(7) < np.array([[2], [7], [4]])).int()


def with_rules(network, folder):
    """Generation that ends with token 2 and never makes token 5."""
    network.generation_config.eos_token_id = 2
    network.generation_config.bad_words_ids = [[5]]
    network.generation_config.save_pretrained(folder)


@searched([("t5", 0, 3), ("marian", 0, 1)], TRANSLATORS)
def test_translations_equal_those_of_transformers(family, number, beams, tmp_path):
    network, seed = families.drawn(family, "seq2seq_lm", number, tmp_path)
    with_rules(network, tmp_path)
    model = fc.load(tmp_path)
    assert (model.assets.end_tokens, model.assets.never_tokens) == ((2,), (5,))
    assert model.assets.start_token == network.config.decoder_start_token_id
    rows, ids, mask = sources(network, seed)
    with torch.no_grad():
        want = network.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, num_beams=beams)
    got = model.generate(rows, max_new_tokens=12, beams=beams, return_ids=True)
    for ours, theirs in zip(got, want[:, 1:].tolist(), strict=True):
        end = theirs.index(2) + 1 if 2 in theirs else len(theirs)
        assert ours.ids == theirs[:end]
        assert ours.finished == (2 in theirs)


@pytest.mark.parametrize("family", quick(TRANSLATORS, ["marian"]))
def test_a_saved_translator_generates_the_same_in_pytorch(family, tmp_path):
    network, seed = families.drawn(family, "seq2seq_lm", 1, tmp_path / "theirs")
    with_rules(network, tmp_path / "theirs")
    model = fc.load(tmp_path / "theirs")
    fc.save(model, tmp_path / "ours")
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    _, ids, mask = sources(network, seed)
    with torch.no_grad():
        labels = torch.tensor(np.random.default_rng(0).integers(3, network.config.vocab_size - 1, (3, 6)))
        got, want = (net(input_ids=ids, attention_mask=mask, labels=labels) for net in (again, network))
        families.close(got.logits, want.logits)
        families.close(got.loss, want.loss)
        for beams in (1, 2):
            got, want = (
                net.generate(ids, attention_mask=mask, num_beams=beams, max_new_tokens=12, do_sample=False)
                for net in (again, network)
            )
            assert got.tolist() == want.tolist()


@pytest.mark.parametrize("family", quick(TRANSLATORS, ["t5"]))
def test_a_decoder_with_a_cache_gives_what_it_gives_at_once(family, tmp_path):
    network, seed = families.drawn(family, "seq2seq_lm", 2, tmp_path)
    model = fc.load(tmp_path)
    ids, mask = (np.asarray(x) for x in sources(network, seed)[1:])
    target = np.random.default_rng(0).integers(3, network.config.vocab_size - 1, (3, 6))
    want = model(ids, mask, decoder_input_ids=target, output_attentions=True)
    assert len(want.cross_attentions) == model.config.decoder.layers
    assert want.cross_attentions[0].shape == (3, model.config.decoder.heads, 6, 7)
    np.testing.assert_array_equal(np.asarray(want.cross_attentions[0])[0, ..., 2:], 0.0)  # padding of the source
    out = model(ids, mask, decoder_input_ids=target[:, :2], cache=model.new_cache(3, 6, source=7))
    logits = [out.logits]
    for i in range(2, 6):
        out = model(decoder_input_ids=target[:, i : i + 1], cache=out.cache)
        logits.append(out.logits)
    families.close(jnp.concatenate(logits, 1), want.logits)


def test_a_translator_names_what_is_wrong(tmp_path):
    families.drawn("marian", "seq2seq_lm", 0, tmp_path)
    model = fc.load(tmp_path)
    limit = model.config.positions
    for arguments, message in (
        ({"decoder_input_ids": [[1]]}, "1 sequences, but input_ids has 2"),
        ({"decoder_input_ids": [[1, 10**6]] * 2}, "decoder_input_ids: values"),
        ({"decoder_input_ids": [[1] * (limit + 1)] * 2}, f"{limit + 1} tokens, but the model has {limit}"),
        ({"decoder_attention_mask": [[1]] * 2}, "there are no decoder_input_ids"),
        ({"decoder_input_ids": [[1]] * 2, "cache": model.new_cache(2, 4, source=5)}, "made for a source of 5 tokens"),
        ({"cache": model.new_cache(2, 4, source=2)}, "it is the decoder's"),
    ):
        with pytest.raises(ValueError, match=message):
            model([[3, 4], [5, 6]], **arguments)
    with pytest.raises(ValueError, match="give its length just where the model has a decoder"):
        model.new_cache(2, 4)
    with pytest.raises(ValueError, match="one of them for the token it begins with"):
        model.generate([[3, 4]], max_new_tokens=limit)


@pytest.mark.parametrize("family", quick(DECODERS, ["mistral", "deepseek_v2"]))
def test_a_saved_folder_generates_the_same_in_pytorch(family, tmp_path):
    network, seed = families.drawn(family, "causal_lm", 1, tmp_path / "theirs")
    fc.save(fc.load(tmp_path / "theirs"), tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    _, ids, mask = prompts(network.config, seed)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    with torch.no_grad():
        families.close(
            again(input_ids=ids, attention_mask=mask).logits,
            fc.load(tmp_path / "ours")(ids.numpy(), mask.numpy()).logits,
            mask.numpy() != 0,
        )
        for beams in (1, 2):
            got, want = (
                net.generate(ids, attention_mask=mask, num_beams=beams, **settings) for net in (again, network)
            )
            assert got.tolist() == want.tolist()


def test_penalties_equal_those_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

    from flaxcompress.decoding.sampling import NEVER, filter_top_p, penalize

    rng = np.random.default_rng(0)
    logits, ids = rng.normal(size=(4, 30)).astype(np.float32) * 3, rng.integers(0, 30, (4, 6))
    seen = np.zeros((4, 30), bool)
    seen[np.arange(4)[:, None], ids] = True
    want = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(ids), torch.tensor(logits)).numpy()
    np.testing.assert_allclose(penalize(jnp.asarray(logits), jnp.asarray(seen), 1.3), want, rtol=1e-6)
    want = TopPLogitsWarper(0.8)(torch.tensor(ids), torch.tensor(logits)).numpy()
    assert ((np.asarray(filter_top_p(jnp.asarray(logits), 0.8)) > NEVER) == np.isfinite(want)).all()


def test_chats_are_written_as_transformers_writes_them(tmp_path):
    from flaxcompress.decoding.chat import render_chat
    from flaxcompress.text import Assets, read_assets

    template = (
        "{{ bos_token }}{% for m in messages %}\n"
        "{% if m['role'] not in ('user', 'assistant') %}{{ raise_exception('no such role') }}{% endif %}\n"
        "[{{ m['role'] }}] {{ m['content'] | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    from flaxcompress.tokenizer import sentence_piece_bpe

    characters = sorted(set("[userantasisthello, hi]▁</\n"))
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -float(i)) for i, c in enumerate(characters))]
    (tmp_path / "tokenizer.json").write_text(sentence_piece_bpe(pieces))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}'
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "config.json").write_text("{}")
    assets = read_assets(tmp_path, positions=64, source="x")
    messages = [{"role": "user", "content": " hello "}, {"role": "assistant", "content": "hi"}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for answer in (True, False):
        want = theirs.apply_chat_template(messages, add_generation_prompt=answer, return_dict=False)
        assert render_chat(assets, messages, answer=answer) == list(want)
    with pytest.raises(ValueError, match="no such role"):
        render_chat(assets, [{"role": "wizard", "content": "hi"}])
    with pytest.raises(ValueError, match="no chat template"):
        render_chat(Assets(), messages)
