"""The task of the recipes: prompts, rewards and the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes import arithmetic


def test_additions_are_of_two_digits() -> None:
    assert arithmetic.addition(7, 15) == arithmetic.Problem("07+15=", "22")
    every = arithmetic.all_problems(arithmetic.MAX_OPERAND)
    assert len(set(every)) == 2500
    assert {(len(p.prompt), len(p.answer)) for p in every} == {(6, 2)}
    assert all(int(p.prompt[:2]) + int(p.prompt[3:5]) == int(p.answer) for p in every)


def test_reversals_are_of_four_digits() -> None:
    assert arithmetic.reversal(7, 15) == arithmetic.Problem("0715=", "5170")
    every = arithmetic.all_problems(arithmetic.MAX_OPERAND, arithmetic.reversal)
    assert len(set(every)) == 2500
    assert all(p.prompt == p.answer[::-1] + "=" and len(p.answer) == 4 for p in every)


def test_prompts_follow_from_seed_and_step_alone() -> None:
    def draw(seed: int, step: int) -> list[arithmetic.Problem]:
        return arithmetic.draw_problems(64, max_operand=19, seed=seed, step=step)

    assert draw(0, 3) == draw(0, 3)
    assert draw(0, 3) != draw(0, 4)
    assert draw(0, 3) != draw(1, 3)
    assert set(draw(0, 3)) <= set(arithmetic.all_problems(19))


def test_draws_are_the_same_on_every_machine() -> None:
    drawn = arithmetic.draw_problems(4, max_operand=19, seed=0, step=0)
    assert [p.prompt for p in drawn] == ["10+15=", "12+12=", "12+18=", "15+19="]


@pytest.mark.parametrize(
    ("completion", "reward"), [("22", 1.0), ("23", 0.0), ("2", 0.0), ("222", 0.0), ("", 0.0), (" 22", 0.0)]
)
def test_reward_is_one_for_the_answer_and_nothing_else(completion: str, reward: float) -> None:
    assert arithmetic.exact_match(completion, "22") == reward


def test_saved_tokenizer_agrees_with_encode_and_decodes_back(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    arithmetic.tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(loaded) == len(arithmetic.VOCABULARY)
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (
        arithmetic.PAD_ID,
        arithmetic.EOS_ID,
        arithmetic.UNKNOWN_ID,
    )
    for text in ("07+15=", "22", "0123456789+=", "1x"):
        assert loaded(text)["input_ids"] == arithmetic.encode(text)
    for text in ("07+15=", "22"):
        ids = [*arithmetic.encode(text), arithmetic.EOS_ID, arithmetic.PAD_ID]
        assert loaded.decode(ids, skip_special_tokens=True) == text
