"""The plans that a search chooses from: what they are, and that what is drawn is among them."""

from typing import Any

import numpy as np
import pytest

from lightning_tinykg.bits.space import SearchSpace

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 16)
PLACES = [
    (f"convs.{n}", part, f"degree-{b}") for n in range(2) for part in ("attention", "embedding") for b in range(3)
]
SPACE = SearchSpace(dict.fromkeys(PLACES, WIDTHS))


def test_a_space_makes_plans_whose_last_match_decides() -> None:
    space = SearchSpace({"convs": (4, 2), ("convs.1", "attention"): (8,), "head": (1, 32)}, default=16)
    assert space.widths == ((2, 4), (8,), (1, 32))
    plan = space.plan((2, 8, 32))
    places = [("convs.0",), ("convs.1", "attention"), ("convs.1", "embedding"), ("head",), ("other",)]
    assert [plan.bits_for(*place) for place in places] == [2, 8, 2, 32, 16]
    assert space.uniform() == [(4, 8, 32), (2, 8, 32), (2, 8, 1)]


def test_what_is_drawn_is_offered_and_small_plans_are_among_it() -> None:
    space = SearchSpace({place: WIDTHS[number % 3 :] for number, place in enumerate(PLACES)})
    rng = np.random.default_rng(0)
    drawn = [space.draw(rng) for _ in range(400)]
    drawn += [space.neighbour(drawn[n], rng) for n in range(400)]
    drawn += [space.cross(drawn[n], drawn[n + 1], rng) for n in range(400)]
    assert all(bits in widths for choice in drawn for bits, widths in zip(choice, space.widths, strict=True))
    means = [np.mean(SPACE.draw(rng)) for _ in range(400)]
    unrelated = SearchSpace({(f"layer-{n}", f"part-{n}", f"degree-{n}"): WIDTHS for n in range(12)})
    mixed = [choice for choice in (unrelated.draw(rng) for _ in range(400)) if len(set(choice)) > 1]
    assert any(max(choice) <= 3 for choice in mixed)
    each_by_itself = rng.choice(WIDTHS, (400, len(PLACES))).mean(axis=1)
    assert np.quantile(means, 0.1) < np.quantile(each_by_itself, 0.01)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({}, "choices must have at least one entry, got none"),
        ({"a": ()}, r"choices\['a'\] must be some widths, such as \(2, 4, 8\), got \(\)"),
        ({"a": 4}, r"choices\['a'\] must be some widths, .* got 4"),
        ({"a": (2, 3.5)}, "bits of a must be one of .* got 3.5"),
        ({"a": (2, 13)}, "bits of a must be one of .* got 13"),
    ],
)
def test_what_is_no_space(choices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchSpace(choices)
