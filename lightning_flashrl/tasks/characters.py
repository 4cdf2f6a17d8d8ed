"""A tokenizer whose tokens are characters: all that a procedural task needs, and nothing to download."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_flashrl.errors import ConfigurationError, SchemaMismatchError


class CharacterTokenizer:
    """Characters to numbers and back.

    Args:
        alphabet: the characters; each gets a number after those of the two marks.

    Attributes:
        pad_token_id: fills up.
        eos_token_id: ends a completion.

    Raises:
        ConfigurationError: no characters, or one twice.

    >>> tokenizer = CharacterTokenizer("0123456789>")
    >>> tokenizer.encode("31>"), tokenizer.decode([5, 3, 1, 4]), len(tokenizer)
    ([5, 3, 12], '31', 13)
    """

    pad_token_id = 0
    eos_token_id = 1

    def __init__(self, alphabet: str) -> None:
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise ConfigurationError(f"alphabet={alphabet!r}; give each character once, and at least one")
        self.alphabet = alphabet
        self._numbers = {character: number for number, character in enumerate(alphabet, start=2)}

    def __len__(self) -> int:
        return len(self.alphabet) + 2

    def encode(self, text: str) -> list[int]:
        """Return the number of each character.

        Raises:
            SchemaMismatchError: a character is not in the alphabet.
        """
        try:
            return [self._numbers[character] for character in text]
        except KeyError as error:
            raise SchemaMismatchError(
                "text", f"{text!r} has the character {error.args[0]!r}", f"the alphabet is {self.alphabet!r}"
            ) from error

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text up to the first end mark; padding has no character."""
        characters = []
        for token in tokens:
            if token == self.eos_token_id:
                break
            if token >= 2:
                characters.append(self.alphabet[token - 2])
        return "".join(characters)
