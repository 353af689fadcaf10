"""Groups whose prompt gave long responses before are begun first; order is all that changes."""

from __future__ import annotations

import json

from miles.data.length_book import LengthBook
from miles.data.sample import Sample


def group(prompt: int, *lengths: int) -> list[Sample]:
    """Responses of these lengths to one prompt; none yet where no length is given."""
    return [
        Sample(prompt=str(prompt), tokens=[prompt, *[9] * length], response_length=length)
        for length in lengths or (0, 0)
    ]


def order(book: LengthBook, *prompts: int) -> list[int]:
    return [groups[0].tokens[0] for groups in book.longest_first([group(prompt) for prompt in prompts])]


def test_nothing_known_leaves_the_order_of_the_data() -> None:
    assert order(LengthBook(), 3, 1, 2) == [3, 1, 2]


def test_the_mean_of_the_last_responses_decides() -> None:
    book = LengthBook()
    book.observe([group(1, 4, 4), group(2, 1, 9), group(3, 2, 2)])
    assert order(book, 1, 2, 3) == [2, 1, 3]
    book.observe([group(3, 30)])
    assert order(book, 1, 2, 3) == [3, 2, 1]


def test_a_prompt_never_seen_counts_as_the_mean_of_all() -> None:
    book = LengthBook()
    book.observe([group(1, 10), group(2, 2)])
    assert order(book, 2, 7, 8, 1) == [1, 7, 8, 2]


def test_unfinished_responses_belong_to_their_prompt() -> None:
    book = LengthBook()
    book.observe([group(1, 3), group(2, 8)])
    held = [Sample(prompt="2", tokens=[2, 5, 5], response_length=2)]
    assert book.longest_first([group(1), held])[0] is held


def test_what_it_knows_survives_a_checkpoint() -> None:
    book, resumed = LengthBook(), LengthBook()
    book.observe([group(1, 3), group(2, 8, 7)])
    resumed.load_state(json.loads(json.dumps(book.state())))
    assert resumed.state() == book.state()
    assert order(resumed, 1, 2) == [2, 1]
