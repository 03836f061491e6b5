"""The tasks: additions such as "07+15=" -> "22" and reversals such as "0715=" -> "5170", generated from a seed.

One token a character. Nothing here needs torch; `tokenizer()` alone imports transformers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
_SPECIAL = {"<pad>": PAD_ID, "<eos>": EOS_ID, "<unk>": UNKNOWN_ID}
VOCABULARY = _SPECIAL | {character: len(_SPECIAL) + i for i, character in enumerate("0123456789+=")}
MAX_OPERAND = 49  # the largest with two-digit sums


@dataclass(frozen=True)
class Problem:
    """One prompt and the only completion that is right."""

    prompt: str
    answer: str


def addition(first: int, second: int) -> Problem:
    """The sum of two operands from 0 to 49, every number written with two digits."""
    return Problem(f"{first:02d}+{second:02d}=", f"{first + second:02d}")


def reversal(first: int, second: int) -> Problem:
    """The four digits of two operands, to be written backwards."""
    digits = f"{first:02d}{second:02d}"
    return Problem(f"{digits}=", digits[::-1])


Task = Callable[[int, int], Problem]
TASKS: dict[str, Task] = {"addition": addition, "reversal": reversal}


def all_problems(max_operand: int, task: Task = addition) -> list[Problem]:
    """Every problem of a task with two operands from 0 to `max_operand`."""
    operands = range(max_operand + 1)
    return [task(first, second) for first in operands for second in operands]


def draw_problems(count: int, *, task: Task = addition, max_operand: int, seed: int, step: int) -> list[Problem]:
    """The prompts of one step: a pure function of its arguments, so that ranks agree without talking."""
    generator = random.Random(f"{seed}/{step}")
    return [task(generator.randint(0, max_operand), generator.randint(0, max_operand)) for _ in range(count)]


def exact_match(completion: str, answer: str) -> float:
    """Reward of a completion's text: 1.0 if it is the answer and nothing else, otherwise 0.0."""
    return float(completion == answer)


REWARDS = {"exact_match": exact_match}


def encode(text: str) -> list[int]:
    """Token ids of a prompt or an answer, the same that `tokenizer()` gives."""
    return [VOCABULARY.get(character, UNKNOWN_ID) for character in text]


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer as transformers and vLLM load it from the policy's folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )
