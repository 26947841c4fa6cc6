"""Training a tokenizer for a model that is trained from scratch, with the library `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from flaxcompress.config import closest
from flaxcompress.data.frame import whole_tokenizer
from flaxcompress.text import Assets

_ENCODER = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_DECODER = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_SEQ2SEQ = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
_SPECIAL = {"encoder": _ENCODER, "decoder": _DECODER, "seq2seq": _SEQ2SEQ}


def train_tokenizer(
    texts: Iterable[str],
    kind: str = "wordpiece",
    *,
    vocabulary: int,
    model: str = "encoder",
    lowercase: bool = False,
    min_frequency: int = 2,
    sentinels: int = 0,
    max_length: int = 512,
) -> Assets:
    """Learns a tokenizer from texts; the result is a model's `assets`, which transformers loads from a saved folder.

    Args:
      texts: for example `Corpus(…).documents()`.
      kind: "wordpiece" (BERT's), "bpe" (of bytes, GPT-2's) or "unigram" (SentencePiece's, Kudo 2018).
      vocabulary: V, special tokens included; fewer are learned where the texts do not hold as many.
      model: what it is for. "encoder": [CLS] and [SEP] around a text, or a pair, and [MASK]; "decoder": <s> before a
        text, </s> to end one; "seq2seq": </s> after a text. All have a token for padding, id 0, and an unknown one.
      lowercase: texts are lower-cased (and wordpiece drops accents).
      min_frequency: a piece must occur so often (wordpiece and bpe).
      sentinels: so many tokens <extra_id_0>, …, for span corruption.
      max_length: tokens per text that the model will take.

    Raises ValueError for an unknown kind or model, a vocabulary that is too small, and where there is no text.
    """
    if kind not in _KINDS:
        raise ValueError(f"train_tokenizer: unknown kind {kind!r}; {closest(str(kind), _KINDS)}")
    if model not in _SPECIAL:
        raise ValueError(f"train_tokenizer: unknown model {model!r}; {closest(str(model), _SPECIAL)}")
    names = _SPECIAL[model]
    special = [*names.values(), *(f"<extra_id_{i}>" for i in range(sentinels))]
    least = len(special) + (256 if kind == "bpe" else 1)
    if vocabulary < least:
        raise ValueError(f"train_tokenizer: a {kind} vocabulary needs at least {least} entries, got {vocabulary}")
    tokenizer, trainer = _KINDS[kind](special, names["unk"], vocabulary, lowercase, min_frequency)
    counted = _Counted(texts)
    try:
        tokenizer.train_from_iterator(counted, trainer)
    except Exception as error:  # the library raises plain Exception
        if counted.error is not None:
            raise counted.error from None
        raise ValueError(f"train_tokenizer: {kind} of {vocabulary} entries cannot be learned ({error})") from None
    if not counted.count:
        raise ValueError("train_tokenizer: there are no texts")
    _add_frame(tokenizer, model)
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", *(["token_type_ids"] if model == "encoder" else []), "attention_mask"],
        **{f"{role}_token": token for role, token in names.items()},
    }
    files = (
        ("tokenizer.json", tokenizer.to_str().encode()),
        ("tokenizer_config.json", (json.dumps(options, indent=2) + "\n").encode()),
    )
    end = tokenizer.token_to_id(names["eos"]) if "eos" in names else None
    return Assets(
        files=files,
        max_length=max_length,
        end_tokens=() if end is None else (end,),
        start_token=tokenizer.token_to_id(names["pad"]) if model == "seq2seq" else None,
    )


def vocabulary_size(assets: Assets) -> int:
    """V of a tokenizer: one more than its highest id."""
    return max(whole_tokenizer(assets).get_vocab(with_added_tokens=True).values()) + 1


class _Counted:
    """Texts, how many came, and what reading them raised, which the library would hide."""

    def __init__(self, texts: Iterable[str]):
        self._texts = iter(texts)
        self.count, self.error = 0, None

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> str:
        try:
            text = next(self._texts)
            if not isinstance(text, str):
                raise TypeError(f"text {self.count} is {type(text).__name__}, not a string: {text!r:.80}")
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise
        self.count += 1
        return text


def _word_piece(special: list[str], unknown: str, size: int, lowercase: bool, least: int) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, min_frequency=least, special_tokens=special, show_progress=False
    )
    return tokenizer, trainer


def _bpe(special: list[str], unknown: str, size: int, lowercase: bool, least: int) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())  # every byte has a token: nothing is unknown
    steps: list[Any] = [normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=least,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return tokenizer, trainer


def _unigram(special: list[str], unknown: str, size: int, lowercase: bool, least: int) -> tuple[Any, Any]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    steps: list[Any] = [normalizers.NFKC(), *([normalizers.Lowercase()] if lowercase else [])]
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token=unknown, show_progress=False)
    return tokenizer, trainer


_KINDS: dict[str, Callable[..., tuple[Any, Any]]] = {"wordpiece": _word_piece, "bpe": _bpe, "unigram": _unigram}


def _add_frame(tokenizer: Any, model: str) -> None:
    """Has the tokenizer put the model's special tokens around texts."""
    from tokenizers import processors

    templates = {
        "encoder": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
        "decoder": ("<s> $A", "<s> $A $B"),
        "seq2seq": ("$A </s>", "$A $B </s>"),
    }
    single, pair = templates[model]
    used = {part.split(":")[0] for part in f"{single} {pair}".split() if not part.startswith("$")}
    ids = sorted((token, tokenizer.token_to_id(token)) for token in used)
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
