"""Tokenizers of model folders, and text in whole characters from single tokens."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jq.errors import ModelError
from jq.models.generation import stream_text
from jq.models.tokenizer import TextStream, Tokenizer

TEXT = "Grüße, 世界! 👩‍🚀 flies  twice;\nNaïve café — 漢字 and 🎉🎉."


@pytest.fixture
def folder(tmp_path):
    """A byte-level tokenizer that adds bos, with one token per byte but for a few merges."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<s>", "</s>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the flies fly the cafe"], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder, name, **values):
    (folder / name).write_text(json.dumps(values))


def test_text_survives_whatever_truncation_the_file_asks_for(folder):
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode(TEXT)
    assert ids[0] == 0
    assert tokenizer.encode(TEXT, add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>" + TEXT
    assert tokenizer.encode_batch([TEXT, "the"]) == [ids, tokenizer.encode("the")]


def test_special_tokens_come_from_all_files(folder):
    assert Tokenizer(folder).eos_token_ids == ()
    assert Tokenizer(folder).bos_token_id is None
    write(folder, "tokenizer_config.json", bos_token="<s>", eos_token={"content": "<end>"})
    assert Tokenizer(folder).bos_token_id == 0
    assert Tokenizer(folder).eos_token_ids == (2,)
    write(folder, "generation_config.json", eos_token_id=[1, 2])
    write(folder, "config.json", eos_token_id=5, bos_token_id=7, pad_token_id=None)
    tokenizer = Tokenizer(folder)
    assert tokenizer.eos_token_ids == (5, 1, 2)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (7, None)
    assert tokenizer.token_id("</s>") == 1
    assert tokenizer.token_id("nothing") is None


def test_a_vocabulary_larger_than_the_models_is_refused(folder):
    size = Tokenizer(folder).vocab_size
    assert size == Backend.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    assert Tokenizer(folder, vocab_size=size).vocab_size == size
    with pytest.raises(ModelError, match=f"ids up to {size - 1}, the model has {size - 1}"):
        Tokenizer(folder, vocab_size=size - 1)
    write(folder, "config.json", vocab_size=size - 5)
    with pytest.raises(ModelError, match=f"the model has {size - 5}"):
        Tokenizer(folder)


def test_missing_and_malformed_files_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing .* has no tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ModelError, match=r"has only tokenizer\.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a valid tokenizer"):
        Tokenizer(tmp_path)


def test_pieces_are_whole_characters_and_add_up(folder):
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode(TEXT)
    text = TextStream(tokenizer)
    pieces = [text.push(token) for token in ids]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) == TEXT
    assert text.flush() == ""
    assert any(not piece for piece in pieces[1:])
    assert sum(1 for piece in pieces if piece) > 20


def test_an_unfinished_character_comes_out_at_the_end(folder):
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("a世")[:-1]
    text = TextStream(tokenizer)
    assert "".join(text.push(token) for token in ids) == "a"
    assert "a" + text.flush() == tokenizer.decode(ids)


def test_text_from_a_model(folder, load):
    model, params, _, _ = load("llama1")
    tokenizer = Tokenizer(folder)
    table = params["embed"]["embedding"]
    vocabulary = 320
    config = model.config.with_changes(vocab_size=vocabulary)
    repeats = -(-vocabulary // table.shape[0])
    params = params | {
        "embed": {"embedding": table.repeat(repeats, axis=0)[:vocabulary]},
        "lm_head": {"kernel": params["lm_head"]["kernel"].repeat(repeats, axis=1)[:, :vocabulary]},
    }
    model = model.clone(config=config)
    pieces = list(stream_text(model, params, tokenizer, "the café", 8))
    assert all(pieces)
    from jq.models.generation import generate

    (ids,) = generate(model, params, [tokenizer.encode("the café")], 8)
    assert "".join(pieces) == tokenizer.decode(ids)
    write(folder, "generation_config.json", eos_token_id=ids[3])
    first = ids.index(ids[3])
    stopped = "".join(stream_text(model, params, Tokenizer(folder), "the café", 8))
    assert stopped == tokenizer.decode(ids[:first])
