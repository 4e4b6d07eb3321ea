"""Text to token ids and back, with the vocabulary that a checkpoint brings.

The work is done by the `tokenizers` library. A GGUF file stores vocabulary and merges but only the
name of its pre-tokenizer, so the splitting rules behind the names are written down here; a Hugging
Face folder brings a `tokenizer.json` that holds everything.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from specjax.checkpoints import chat as chats
from specjax.checkpoints import optional

__all__ = ["TextStream", "Tokenizer"]

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe")

# Values of tokenizer.ggml.token_type.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


class Tokenizer:
    """A checkpoint's tokenizer.

    Control tokens such as `<|im_end|>` are recognised wherever they stand in a text. Text from
    strangers can therefore end a turn or open another one: who shows the model such text must
    remove them first.

    Attributes:
      vocab_size: number of tokens the tokenizer knows; a model's embedding may have more rows.
      eos_ids: tokens that end an answer, most important first.
      bos_id: token that begins a text, or None; never added by `encode`.
      chat_template: in Jinja, or None.
    """

    def __init__(
        self,
        inner: Any,
        *,
        eos_ids: Iterable[int] = (),
        bos_id: int | None = None,
        chat_template: str | None = None,
    ):
        """Wraps a `tokenizers.Tokenizer`, which it takes over.

        Raises:
          ValueError: an id lies outside the vocabulary.
        """
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.chat_template = chat_template
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        self.eos_ids = tuple(dict.fromkeys(int(token) for token in eos_ids))
        self.bos_id = bos_id
        self._check([*self.eos_ids, *([] if bos_id is None else [bos_id])])
        self._absent = _absent_bytes(inner)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        eos_ids: Iterable[int] = (),
        bos_id: int | None = None,
        chat_template: str | None = None,
    ) -> "Tokenizer":
        """Reads a `tokenizer.json`.

        Raises:
          ValueError: the file is absent or not a tokenizer.
          ImportError: the `tokenizers` library is not installed.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise ValueError(
                f"{path}: no such file; specjax reads tokenizer.json, which transformers writes "
                "with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            inner = optional.require("tokenizers").Tokenizer.from_file(str(path))
        except ImportError:
            raise
        # The library raises bare Exception for whatever it cannot parse.
        except Exception as error:
            raise ValueError(f"{path}: not a tokenizer.json ({error})") from error
        return cls(inner, eos_ids=eos_ids, bos_id=bos_id, chat_template=chat_template)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Builds the tokenizer that the metadata of a GGUF file describes.

        Args:
          metadata: as `gguf.read` returns it.

        Raises:
          ValueError: a field is missing, or names a kind of tokenizer that specjax does not build.
          ImportError: the `tokenizers` library is not installed.
        """
        library = optional.require("tokenizers")
        kind = metadata.get("tokenizer.ggml.model")
        if kind != "gpt2":
            raise ValueError(
                f"tokenizer.ggml.model={kind!r} is not supported; known: 'gpt2' (byte-level "
                "pairs); read the model from its Hugging Face folder, which has a tokenizer.json"
            )
        tokens: list[str] = _field(metadata, "tokenizer.ggml.tokens")
        types: list[int] = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
        merges = [tuple(merge.split(" ")) for merge in _field(metadata, "tokenizer.ggml.merges")]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        if len(vocabulary) != len(tokens) or len(types) != len(tokens):
            raise ValueError(
                f"tokenizer.ggml.tokens holds {len(tokens)} tokens, {len(vocabulary)} of them "
                f"different, and tokenizer.ggml.token_type {len(types)} types; the numbers must "
                "agree"
            )
        # The library panics at a merge whose product is no token, which nothing can catch.
        for merge in merges:
            if len(merge) != 2 or any(x not in vocabulary for x in (*merge, "".join(merge))):
                raise ValueError(
                    f"tokenizer.ggml.merges holds {' '.join(merge)!r}, which does not join two "
                    "tokens of the vocabulary into a third; the file is corrupt"
                )
        pre = _field(metadata, "tokenizer.ggml.pre")
        try:
            model = library.models.BPE(
                vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"
            )
        # The library raises bare Exception for merges that do not fit the vocabulary.
        except Exception as error:
            raise ValueError(
                f"tokenizer.ggml.merges does not fit the vocabulary ({error})"
            ) from error
        inner = library.Tokenizer(model)
        inner.pre_tokenizer = _pre_tokenizer(pre)
        inner.decoder = library.decoders.ByteLevel()
        for special, wanted in ((True, _CONTROL), (False, _USER_DEFINED)):
            inner.add_tokens(
                [
                    library.AddedToken(token, special=special, normalized=False)
                    for token, given in zip(tokens, types, strict=True)
                    if given == wanted
                ]
            )
        names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        return cls(
            inner,
            eos_ids=[metadata[name] for name in names if name in metadata],
            bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, control tokens recognised, nothing added in front or behind.

        Under a byte-level vocabulary, `decode(encode(text), keep_special=True) == text`.

        Raises:
          ValueError: `text` holds half a surrogate pair, which is no character, or a character for
            which the vocabulary has no token (SmolLM2 lacks six control characters, U+0014 for
            one).
        """
        try:
            content = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text holds {text[error.start]!r} at {error.start}, half a surrogate pair and no "
                f"character"
            ) from error
        ids = self._inner.encode(text, add_special_tokens=False).ids
        # The library drops a byte without a token, and says nothing. Control tokens may hold one.
        absent = self._absent.intersection(content)
        if absent and self.decode(ids, keep_special=True) != text:
            place = next(i for i, c in enumerate(text) if absent.intersection(c.encode("utf-8")))
            raise ValueError(
                f"text holds {text[place]!r} at {place}, for which the vocabulary has no token; "
                "remove it"
            )
        return ids

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Args:
          ids: token ids, Python or NumPy integers.
          keep_special: also write control tokens.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        ids = self._check(ids)
        return self._inner.decode(ids, skip_special_tokens=not keep_special)

    def stream(self, keep_special: bool = False) -> "TextStream":
        """Returns a decoder for ids that come a few at a time."""
        return TextStream(self, keep_special)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation in the checkpoint's chat template.

        Args:
          messages: mappings with `role` ('system', 'user' or 'assistant') and `content`. Control
            tokens inside a content act as control tokens.
          add_generation_prompt: end with the opening of the assistant's answer.

        Raises:
          ValueError: the checkpoint has no chat template, or it refuses the messages.
          ImportError: jinja2 is not installed.
        """
        return self.encode(self._render(messages, add_generation_prompt))

    def follow_up(self, text: str, answer: Sequence[int]) -> list[int]:
        """Token ids of a user's next message, to be appended to the answer before it.

        Args:
          text: what the user says.
          answer: the assistant's, as it was written; the end of its turn is written here where a
            limit cut it off, and not again where it ended with one of `eos_ids`.

        Raises:
          ValueError, ImportError: as `chat`; or a template that writes an answer in another place
            than between its neighbours.
        """
        place = "\N{OBJECT REPLACEMENT CHARACTER}"
        said = [("user", "?"), ("assistant", place), ("user", text)]
        messages = [{"role": role, "content": content} for role, content in said]
        before, found, behind = self._render(messages, True).partition(place)
        if not found or not before:
            raise ValueError("the chat template does not write an answer as it is given")
        ended = self._text_of(answer[-1]) if answer and answer[-1] in self.eos_ids else ""
        return self.encode(behind.removeprefix(ended))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the table of tokens: two tokenizers with one speak of the same tokens."""
        table = sorted(self._inner.get_vocab(with_added_tokens=True).items())
        return hashlib.sha256(json.dumps(table).encode()).hexdigest()

    def save(self, folder: pathlib.Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json as Hugging Face folders have them."""
        self._inner.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._text_of(self.eos_ids[0] if self.eos_ids else None) or None,
            "bos_token": self._text_of(self.bos_id) or None,
            "chat_template": self.chat_template,
        }
        (folder / "tokenizer_config.json").write_text(
            json.dumps(settings, indent=2), encoding="utf-8"
        )

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        if self.chat_template is None:
            raise ValueError("this checkpoint has no chat template; give text to encode() instead")
        special = {"bos_token": self._text_of(self.bos_id)}
        special["eos_token"] = self._text_of(self.eos_ids[0] if self.eos_ids else None)
        return chats.render(self.chat_template, messages, add_generation_prompt, special)

    def _text_of(self, token: int | None) -> str:
        return "" if token is None else self._inner.id_to_token(token)

    def _check(self, ids: Iterable[int]) -> list[int]:
        # The library drops an id that it does not know, without a word.
        checked = [int(token) for token in ids]
        for token in checked:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token id {token} lies outside the vocabulary of {self.vocab_size}"
                )
        return checked


class TextStream:
    """Decodes ids as they come, and never emits part of a character.

    What `push` returns, piece by piece, and `flush` at the end, is together what `decode` gives at
    once.
    """

    def __init__(self, tokenizer: Tokenizer, keep_special: bool = False):
        self._tokenizer = tokenizer
        self._keep_special = keep_special
        # Ids whose text is out; kept since a token's text can depend on its neighbour to the left.
        self._before: list[int] = []
        self._held: list[int] = []
        self._emitted = 0

    def push(self, ids: Iterable[int]) -> str:
        """Adds `ids` and returns the text that is now certain, possibly empty.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        self._held += self._tokenizer._check(ids)
        text = self._text(self._before + self._held)
        # A trailing U+FFFD may be the beginning of a character whose other bytes are yet to come.
        certain = text.rstrip("\ufffd")
        piece = certain[self._emitted :]
        if certain == text and self._held:
            self._before, self._held = self._held, []
            self._emitted = len(self._text(self._before))
        else:
            self._emitted = max(self._emitted, len(certain))
        return piece

    def flush(self) -> str:
        """Returns what was held back and starts afresh; an unfinished character becomes U+FFFD."""
        piece = self._text(self._before + self._held)[self._emitted :]
        self._before, self._held, self._emitted = [], [], 0
        return piece

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._keep_special)


def _field(metadata: Mapping[str, Any], key: str) -> Any:
    if metadata.get(key) is None:
        raise ValueError(f"the metadata has no {key!r}; the file brings no usable tokenizer")
    return metadata[key]


def _absent_bytes(inner: Any) -> frozenset[int]:
    """Bytes that a byte-level vocabulary has no token for; none under other vocabularies."""
    library = optional.require("tokenizers")
    model = inner.model
    if not isinstance(inner.decoder, library.decoders.ByteLevel):
        return frozenset()
    if not isinstance(model, library.models.BPE) or model.unk_token is not None:
        return frozenset()
    # GPT-2's alphabet: a printable byte stands for itself, the others follow from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(0x100 + index) for index, byte in enumerate(others)}
    return frozenset(byte for byte, letter in letters.items() if inner.token_to_id(letter) is None)


def _pre_tokenizer(name: str) -> Any:
    pre = optional.require("tokenizers").pre_tokenizers
    if name == "smollm":
        return pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
        )
    if name == "gpt-2":
        return pre.ByteLevel(add_prefix_space=False)
    if name == "llama-bpe":
        pattern = optional.require("tokenizers").Regex(_LLAMA3_SPLIT)
        return pre.Sequence(
            [pre.Split(pattern, "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    raise ValueError(
        f"tokenizer.ggml.pre={name!r} is not supported; known: {_PRE_TOKENIZERS}; "
        "read the model from its Hugging Face folder, which has a tokenizer.json"
    )
