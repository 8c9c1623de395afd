"""vadiff.sampling.seeds: lists of seeds as text."""

import pytest

from vadiff.sampling.seeds import parse_seeds, recorded_seeds, seeds_text


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("7", [7]), ("0-3", [0, 1, 2, 3]), ("5,0-2,9-10", [5, 0, 1, 2, 9, 10]), ("1, 3", [1, 3]), ("4-4", [4])],
)
def test_list_of_seeds_is_read_in_its_order(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds
    assert parse_seeds(seeds_text(seeds)) == seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' in '', expected seeds and ranges with commas, as 0-63,100,200-210"),
        ("1,,2", "'' in '1,,2', expected seeds"),
        ("-1", "'-1' in '-1', expected seeds"),
        ("1-", "'1-' in '1-', expected seeds"),
        ("1-2-3", "'1-2-3' in '1-2-3', expected seeds"),
        ("1.5", "'1.5' in '1.5', expected seeds"),
        ("9-7", "'9-7' in '9-7', expected a range that rises, as 7-9"),
        ("99999999999999999999", r"expected seeds of at most 2\*\*63 - 1"),
        ("0-9999999999", "'0-9999999999' in '0-9999999999', expected at most 10,000,000 seeds"),
        ("0-5,3", "seed 3 is twice in '0-5,3', expected every seed once"),
    ],
)
def test_list_that_makes_no_sense_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_seeds(text)


def test_consecutive_seeds_are_recorded_without_a_list() -> None:
    assert recorded_seeds(range(3, 7)) == recorded_seeds([3, 4, 5, 6]) == {"images": 4, "first_seed": 3}
    assert recorded_seeds([3, 4, 9]) == {"images": 3, "first_seed": 3, "seeds": "3-4,9"}
