from __future__ import annotations

import json
import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_models import SPACE, piece_data
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HfTokenizer

from bitgen.errors import BitgenError
from bitgen.tokenizer.bpe import PRE_TOKENIZERS, byte_alphabet, bytes_of
from bitgen.tokenizer.data import TokenizerData
from bitgen.tokenizer.sentencepiece import SentencePiece
from bitgen.tokenizer.tokenizer import Tokenizer

TEXTS = (
    "",
    " ",
    "   three spaces, and\ttabs\n\n\nlines\r\n",
    "Hello world! It's 1234567 o'clock; we'LL see...",
    "Ünïcödé 漢字かな 한국어 🙂👩‍👩‍👧‍👧 \u0301 e\u0301",
    "def f(x):\n    return x ** 2  # 3.14\n",
    "<|eot_id|> <s> </s> <0x41>",
    "a" * 300,
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog " * 3,
    "it's what they'll do in 1984 and 2001 ",
    *TEXTS,
]
UNKNOWN = "<unk>"
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")

# ---- tokenizer.json and BPE -----------------------------------------------------------------------------


def trained(pre: str = "llama-bpe", prefix: bool = True) -> HfTokenizer:
    """A byte-level BPE as Hugging Face makes it, trained on a few lines."""
    hf = HfTokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(p), "isolated") for p in PRE_TOKENIZERS[pre].patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    hf.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator(CORPUS, trainer)
    if prefix:
        hf.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
        )
    return hf


def gguf_of(hf: HfTokenizer, pre: str) -> TokenizerData:
    """What a converter writes for a byte-level BPE."""
    content = json.loads(hf.to_str())
    vocabulary = content["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    types = [3 if token in SPECIAL else 1 for token in tokens]
    return TokenizerData(
        model="gpt2",
        pre=pre,
        tokens=tuple(tokens),
        types=np.array(types, np.int32),
        merges=tuple(" ".join(pair) for pair in content["model"]["merges"]),
        bos=0,
        eos=1,
    )


def test_a_tokenizer_json_gives_the_ids_and_texts_of_the_library_that_made_it() -> None:
    hf = trained()
    ours = Tokenizer(TokenizerData(json=hf.to_str(), bos=0, eos=1))
    for text in TEXTS:
        assert ours.encode(text) == hf.encode(text).ids
        ids = ours.encode(text, special=False)
        assert ids == hf.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids, special=True) == hf.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_a_bpe_from_gguf_gives_the_ids_of_the_tokenizer_json_it_came_from(pre: str) -> None:
    hf = trained(pre)
    ours = Tokenizer(gguf_of(hf, pre))
    for text in TEXTS:
        expected = hf.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special=False) == expected
        assert ours.decode(expected, special=True) == text


# The words that Hugging Face's own tokenizers cut; what is listed in bpe.py came from there.
@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("llama-bpe", "It'S 12345  x\n\n y", ["It", "'S", " ", "123", "45", " ", " x", "\n\n", " y"]),
        ("qwen2", "It's 123 x", ["It", "'s", " ", "1", "2", "3", " x"]),
        ("gpt-2", "It's 12345  x!", ["It", "'s", " 12345", " ", " x", "!"]),
        ("smollm", "ab 123", ["ab", " ", "1", "2", "3"]),
        ("falcon", "a+b=12345", ["a", "+", "b", "=", "123", "45"]),
        ("tekken", "helloWorld 12", ["hello", "World", " ", "1", "2"]),
        ("gpt-4o", "helloWorld's 1234", ["hello", "World's", " ", "123", "4"]),
        ("default", "a-b 1234", ["a", "-", "b", " ", "123", "4"]),
    ],
)
def test_words_are_cut_as_each_pre_tokenizer_says(pre: str, text: str, words: Sequence[str]) -> None:
    cuts = [pre_tokenizers.Split(Regex(p), "isolated") for p in PRE_TOKENIZERS[pre].patterns]
    found = pre_tokenizers.Sequence(cuts).pre_tokenize_str(text)
    assert [word for word, _ in found] == list(words)


def test_a_word_that_is_a_token_stays_whole_where_the_pre_tokenizer_says_so() -> None:
    letters = {token: i for i, token in enumerate(["a", "b", "c", "ab", "abc"])}
    data = TokenizerData(model="gpt2", tokens=tuple(letters), merges=("a b",), bos=None)
    assert Tokenizer(replace(data, pre="gpt-2")).encode("abc", special=False) == [3, 2]
    assert Tokenizer(replace(data, pre="llama-bpe")).encode("abc", special=False) == [4]


def test_merges_of_what_is_no_token_are_left_out() -> None:
    data = TokenizerData(
        model="gpt2", pre="gpt-2", tokens=("a", "b", "ab"), merges=("a b", "a x", "b", "x y z")
    )
    assert Tokenizer(data).encode("abab", special=False) == [2, 2]


def test_an_unknown_pre_tokenizer_is_refused_by_name() -> None:
    data = replace(gguf_of(trained(), "llama-bpe"), pre="no-such")
    with pytest.raises(
        BitgenError, match=r"unknown pre-tokenizer 'no-such'; supported are default, .*llama-bpe"
    ):
        Tokenizer(data)


@pytest.mark.parametrize("pre", ["", "default"])
def test_a_vocabulary_of_llama_3_is_known_by_its_special_tokens(pre: str) -> None:
    data = gguf_of(trained(), pre)
    named = Tokenizer(gguf_of(trained(), "llama-bpe"))
    guessed = Tokenizer(replace(data, tokens=(*data.tokens, "<|start_header_id|>"), types=None))
    assert "llama-bpe" in guessed.notes[0]
    assert guessed.encode("12345 It'S", special=False) == named.encode("12345 It'S", special=False)
    assert guessed.add_bos


def test_a_file_without_a_pre_tokenizer_gets_the_default_and_a_note() -> None:
    data = TokenizerData(model="gpt2", tokens=tuple(byte_alphabet()), merges=())
    assert "default" in Tokenizer(data).notes[0]


def test_every_byte_has_a_character_and_back() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert bytes_of("Ġé") == b" \xe9"
    assert bytes_of("日本") == "日本".encode()


# ---- SentencePiece --------------------------------------------------------------------------------------


def merge_naively(text: str, ids: dict[str, int], scores: Sequence[float]) -> list[str]:
    """The definition: join the best pair, the leftmost of equals, until no pair makes a piece."""
    parts = list(text)
    while True:
        pairs = [
            (-scores[ids[parts[i] + parts[i + 1]]], i)
            for i in range(len(parts) - 1)
            if parts[i] + parts[i + 1] in ids
        ]
        if not pairs:
            return parts
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_pieces_are_merged_as_defined(data: st.DataObject) -> None:
    symbol = st.sampled_from([*"abc", SPACE])
    pieces = data.draw(st.lists(st.text(symbol, min_size=1, max_size=4), unique=True, max_size=14))
    if data.draw(st.booleans()):  # vocabularies whose pieces start with spaces only take another way
        pieces = [piece for piece in pieces if SPACE not in piece.lstrip(SPACE)]
    pieces = [*dict.fromkeys(["a", "b", "c", SPACE, *pieces])]
    scores = data.draw(
        st.lists(st.sampled_from([-1.0, -2.0, -3.0]), min_size=len(pieces), max_size=len(pieces))
    )
    ids = {piece: i for i, piece in enumerate(pieces)}
    text = data.draw(st.text(st.sampled_from("abc "), max_size=20))
    expected = [ids[part] for part in merge_naively(text.replace(" ", SPACE), ids, scores)]
    model = SentencePiece(ids, scores, None)
    assert model.encode(text) == expected
    assert model.encode(text) == expected  # from the words it has seen


def test_what_is_no_piece_is_spelled_in_bytes() -> None:
    tokenizer = Tokenizer(piece_data())
    ids = tokenizer.encode("é漢", special=False)
    assert ids == [3 + byte for byte in "é漢".encode()] or ids == [
        tokenizer.ids[SPACE],
        *(3 + byte for byte in "é漢".encode()),
    ]
    assert tokenizer.decode(ids) == "é漢"


def test_a_space_is_put_in_front_and_taken_away_again() -> None:
    tokenizer = Tokenizer(piece_data())
    assert tokenizer.encode("the", special=False) == [tokenizer.ids[f"{SPACE}the"]]
    assert tokenizer.decode(tokenizer.encode("the end")) == "the end"
    assert tokenizer.decode(tokenizer.encode("  the end")) == "  the end"
    bare = Tokenizer(piece_data(add_space_prefix=False))
    assert bare.encode("the", special=False)[0] == bare.ids["t"]
    assert bare.decode(bare.encode(" the")) == " the"


def test_without_bytes_in_the_vocabulary_what_is_no_piece_is_unknown() -> None:
    tokens = ("<unk>", SPACE, "a")
    data = TokenizerData(model="llama", tokens=tokens, types=np.array([2, 1, 1], np.int32), add_bos=False)
    assert Tokenizer(data).encode("aé") == [1, 2, 0, 0]


def test_a_tokenizer_json_with_bytes_decodes_like_the_library() -> None:
    pieces = {token: i for i, token in enumerate(piece_data().tokens)}
    hf = HfTokenizer(models.BPE(pieces, [(SPACE, "t")], unk_token=UNKNOWN, byte_fallback=True))
    hf.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    hf.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    hf.add_special_tokens(["<s>", "</s>"])
    ours = Tokenizer(TokenizerData(json=hf.to_str(), bos=1, eos=2, add_bos=True))
    for text in ("the end", " the end", "é 漢字", "a\n\nb"):
        ids = hf.encode(text).ids
        assert ours.encode(text) == [1, *ids]
        assert ours.decode(ids) == hf.decode(ids) == text
    assert ours.end_ids == {2}


# ---- Special tokens -------------------------------------------------------------------------------------


def test_special_tokens_in_a_text_are_read_only_when_asked() -> None:
    for tokenizer in (
        Tokenizer(gguf_of(trained(), "llama-bpe")),
        Tokenizer(TokenizerData(json=trained().to_str(), bos=0, eos=1)),
    ):
        read = tokenizer.encode("a<|eot_id|>b", special=False)
        assert tokenizer.ids["<|eot_id|>"] in read
        plain = tokenizer.encode("a<|eot_id|>b", special=False, parse=False)
        assert not set(plain) & {0, 1, 2}
        assert tokenizer.decode(plain) == "a<|eot_id|>b"
        assert tokenizer.decode(read) == "ab"
        assert tokenizer.decode(read, special=True) == "a<|eot_id|>b"


@pytest.mark.parametrize("kind", ["json", "bpe"])
def test_a_long_text_does_not_hold_up_other_threads(kind: str) -> None:
    hf = trained()
    data = TokenizerData(json=hf.to_str(), bos=0, eos=1) if kind == "json" else gguf_of(hf, "llama-bpe")
    tokenizer = Tokenizer(data)
    text = "the quick <|eot_id|> brown fox " * 20_000
    read = tokenizer.encode(text, special=False)
    spelled = tokenizer.encode(text, special=False, parse=False)
    assert read[:20] == tokenizer.encode(text[:400], special=False)[:20]
    assert hf.token_to_id("<|eot_id|>") in read
    assert hf.token_to_id("<|eot_id|>") not in spelled
    turns, done = 0, threading.Event()

    def encode() -> None:
        tokenizer.encode(text.replace("<|eot_id|>", ""))
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    while not done.wait(1e-3):
        turns += 1
    thread.join()
    assert turns > 10


def test_tokens_that_users_defined_are_always_read_and_always_shown() -> None:
    data = gguf_of(trained(), "gpt-2")
    assert data.types is not None
    types = np.append(data.types, np.int32(4))
    tokenizer = Tokenizer(replace(data, tokens=(*data.tokens, "<tool>"), types=types))
    ids = tokenizer.encode("x<tool>y", special=False, parse=False)
    assert len(data.tokens) in ids
    assert tokenizer.decode(ids) == "x<tool>y"


def test_of_two_special_tokens_at_one_place_the_longer_is_meant() -> None:
    data = gguf_of(trained(), "gpt-2")
    assert data.types is not None
    types = np.concatenate([data.types, np.array([3, 3], np.int32)])
    tokenizer = Tokenizer(replace(data, tokens=(*data.tokens, "<|a|>", "<|a|>b"), types=types))
    assert tokenizer.encode("<|a|>b<|a|>", special=False) == [len(data.tokens) + 1, len(data.tokens)]


def test_bos_and_eos_come_where_the_file_says() -> None:
    assert Tokenizer(piece_data()).encode("a")[0] == 1  # the default of SentencePiece
    assert Tokenizer(piece_data(add_bos=False)).encode("a")[0] != 1
    assert Tokenizer(piece_data(add_eos=True)).encode("a")[-1] == 2
    assert Tokenizer(piece_data()).encode("a", special=False)[0] != 1
    assert Tokenizer(gguf_of(trained(), "gpt-2")).encode("a")[0] != 0
    assert Tokenizer(gguf_of(trained(), "llama-bpe")).encode("a")[0] == 0


def test_answers_end_at_every_token_that_is_known_to_end_them() -> None:
    tokenizer = Tokenizer(replace(gguf_of(trained(), "llama-bpe"), eot=5))
    assert tokenizer.end_ids == {1, tokenizer.ids["<|eot_id|>"], 5}
    assert Tokenizer(piece_data()).end_ids == {2}
    json_tokenizer = Tokenizer(TokenizerData(json=trained().to_str(), end_ids=(7,)))
    assert json_tokenizer.end_ids == {7, 1, 2}


# ---- Streams --------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_a_character_is_never_cut(text: str) -> None:
    tokenizer = Tokenizer(piece_data(add_bos=False, add_space_prefix=False))
    stream = tokenizer.stream()
    pieces = [stream.feed(i) for i in tokenizer.encode(text, parse=False)]
    assert "".join(pieces) == text
    assert stream.close() == ""


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 330), max_size=20))
def test_pieces_add_up_to_the_text_whatever_the_tokens(ids: list[int]) -> None:
    tokenizer = Tokenizer(piece_data(add_space_prefix=False))
    stream = tokenizer.stream()
    assert "".join([stream.feed(i) for i in ids] + [stream.close()]) == tokenizer.decode(ids)


def test_a_text_that_ends_inside_a_character_says_so() -> None:
    tokenizer = Tokenizer(piece_data())
    stream = tokenizer.stream()
    assert stream.feed(3 + 0xC3) == ""
    assert stream.close() == "\ufffd"


# ---- Damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TokenizerData(), "holds no tokenizer"),
        (
            TokenizerData(model="bert", tokens=("a",)),
            "the tokenizer 'bert'; supported are tokenizer.json, llama",
        ),
        (TokenizerData(model="llama"), "holds no tokens"),
        (TokenizerData(json="{"), "not valid JSON"),
        (TokenizerData(json="[]"), "no tokenizer model"),
        (TokenizerData(json='{"model": {"type": "BPE"}}'), "cannot be used"),
        (piece_data(scores=np.zeros(3, np.float32)), "tokens and 3 scores"),
        (piece_data(types=np.zeros(3, np.int32)), "tokens and 3 types"),
    ],
)
def test_what_makes_no_tokenizer_is_one_clear_error(data: TokenizerData, message: str) -> None:
    with pytest.raises(BitgenError, match=message):
        Tokenizer(data)


def test_a_decoder_that_does_not_work_by_tokens_is_refused_by_name() -> None:
    hf = trained()
    hf.decoder = decoders.WordPiece()
    with pytest.raises(BitgenError, match="decodes with WordPiece; supported are ByteLevel"):
        Tokenizer(TokenizerData(json=hf.to_str()))


def test_a_damaged_tokenizer_json_is_an_error_or_a_tokenizer() -> None:
    hf = trained()
    hf.add_tokens([AddedToken("<tool>", special=False)])
    good = hf.to_str().encode()
    rng = random.Random(0)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(400):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] = rng.randrange(256)
        text = bytes(bad).decode("utf-8", "replace")
        try:
            tokenizer = Tokenizer(TokenizerData(json=text, bos=0, eos=1))
            tokenizer.decode(tokenizer.encode("The fox's <tool> 漢字"))
            outcomes["loaded"] += 1
        except BitgenError:
            outcomes["refused"] += 1
    assert outcomes["loaded"] > 10
    assert outcomes["refused"] > 10


def test_damaged_metadata_is_an_error_or_a_tokenizer() -> None:
    rng = np.random.default_rng(0)
    for good in (gguf_of(trained(), "llama-bpe"), piece_data()):
        for _ in range(100):
            changes: dict[str, Any] = {}
            tokens = list(good.tokens)
            for _ in range(3):
                tokens[rng.integers(len(tokens))] = rng.choice(["", "a", "\udcff", "x" * 1000, "<0xFF>", " "])
            changes["tokens"] = tuple(tokens)
            changes["types"] = rng.integers(-3, 9, len(tokens)).astype(np.int32)
            changes["bos"] = int(rng.integers(0, 2 * len(tokens)))
            if good.scores is not None:
                changes["scores"] = rng.choice([np.nan, np.inf, -1.0], len(tokens)).astype(np.float32)
            kept = good.merges[: rng.integers(len(good.merges) + 1)]
            changes["merges"] = (*kept, "\udcff a", " ", "")
            try:
                tokenizer = Tokenizer(replace(good, **changes))
                tokenizer.decode(tokenizer.encode("The fox's <s> 漢字 <|eot_id|>"))
            except BitgenError:
                pass
