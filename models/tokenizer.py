"""Tokenizers of Hugging Face model folders (`tokenizer.json`), and text from a stream of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jq.errors import ModelError
from jq.models.hf_values import read_json, token_ids

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A `tokenizers.Tokenizer` with the special tokens that the folder's files name.

    Args:
        path: a folder with `tokenizer.json`.
        vocab_size: the model's, to be checked against; taken from `config.json` when None and
            there is one.

    Attributes:
        vocab_size: the largest token id + 1.
        eos_token_ids: all that `config.json`, `generation_config.json` or `tokenizer_config.json`
            call end of sequence, in this order, each once.
        bos_token_id, pad_token_id: the first of the three files that says so, or None.
        own_bos_token_id, own_eos_token_id: what `tokenizer_config.json` alone says, or None.

    Raises:
        ModelError: no or a malformed `tokenizer.json`, or more tokens than the model has.
    """

    def __init__(self, path: str | Path, vocab_size: int | None = None) -> None:
        folder = Path(path)
        self._tokenizer = _load(folder)
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        files = {
            name: read_json(folder / name) if (folder / name).exists() else {}
            for name in ("config.json", "generation_config.json", "tokenizer_config.json")
        }
        if vocab_size is None:
            vocab_size = files["config.json"].get("vocab_size")
        if vocab_size is not None and self.vocab_size > vocab_size:
            raise ModelError(
                f"{folder / 'tokenizer.json'} has token ids up to {self.vocab_size - 1}, the model "
                f"has {vocab_size} (vocab_size); they do not belong together"
            )
        self.eos_token_ids = self._special("eos", files)
        self.bos_token_id = next(iter(self._special("bos", files)), None)
        self.pad_token_id = next(iter(self._special("pad", files)), None)
        own = {name: files[name] if name.startswith("tokenizer") else {} for name in files}
        self.own_bos_token_id = next(iter(self._special("bos", own)), None)
        self.own_eos_token_id = next(iter(self._special("eos", own)), None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with the special tokens (bos) that the tokenizer itself adds, or without."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no complete character become U+FFFD."""
        ids = [int(token) for token in ids]
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token's exact text, None where there is none."""
        return self._tokenizer.token_to_id(token)

    def _special(self, name: str, files: Mapping[str, Mapping[str, Any]]) -> tuple[int, ...]:
        ids: list[int] = []
        for file in ("config.json", "generation_config.json"):
            ids += token_ids(files[file].get(f"{name}_token_id"))
        token = files["tokenizer_config.json"].get(f"{name}_token")
        # Either the token's text or {"content": text, ...}.
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found = self.token_id(text)
            ids += [] if found is None else [found]
        return tuple(dict.fromkeys(ids))


class TextStream:
    """Text of tokens that arrive one by one, in whole characters.

    All pieces together, with `flush`'s, are the decoding of all tokens together.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Tokens before `_context` are done with; those up to `_emitted` are out already, but stay
        # because a token's text can depend on the ones before it (leading spaces).
        self._context = 0
        self._emitted = 0

    def push(self, token: int) -> str:
        """Take a token; returns the text that is complete with it, perhaps none."""
        self._ids.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """The rest, in which bytes of an unfinished character are U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        text = self._tokenizer.decode(self._ids[self._context :])
        if text.endswith(_INCOMPLETE) and not final:
            return ""
        before = self._tokenizer.decode(self._ids[self._context : self._emitted])
        self._context, self._emitted = self._emitted, len(self._ids)
        return text[len(before) :]


def _load(folder: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    file = folder / "tokenizer.json"
    if not file.is_file():
        kind = "only tokenizer.model" if (folder / "tokenizer.model").exists() else "no tokenizer"
        raise ModelError(
            f"{file} is missing ({folder} has {kind}); save the tokenizer as tokenizer.json first"
        )
    try:
        tokenizer = Backend.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{file} is not a valid tokenizer: {error}") from error
    # A file may ask for the truncation and padding of its training run.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
