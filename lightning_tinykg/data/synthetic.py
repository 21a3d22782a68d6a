"""A generated knowledge graph with planted taste: what users like can be read in the graph."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_tinykg.arguments import check_number, check_whole
from lightning_tinykg.data.files import KGRecFiles, unique_pairs

__all__ = ["SyntheticKG"]

IntArray = npt.NDArray[np.int64]

DIM = 32
CANDIDATES = 256
CHUNK = 2048
NOISE = 12


@dataclass(frozen=True)
class _Relation:
    """Relation from an item to entities of one kind: links of an item, items to an entity, and how much it tells."""

    name: str
    links: int
    items_each: int  # 0: a fixed number of entities
    weight: int


# "country" tells nothing about taste: a model that weighs relations has something to learn.
_RELATIONS = (
    _Relation("genre", 2, 0, 3),
    _Relation("director", 1, 30, 3),
    _Relation("actor", 3, 30, 2),
    _Relation("studio", 1, 40, 1),
    _Relation("country", 1, 0, 0),
)
_FIXED = 24
_TRIPLES_PER_ITEM = sum(r.links for r in _RELATIONS)


@dataclass(frozen=True)
class SyntheticKG:
    r"""A recommender's knowledge graph with planted taste, deterministic by seed on every platform.

    Entities (genres, directors, actors, ...) own latent vectors. An item links to some of them, and its own vector is
    their mean, weighted by relation, plus noise. A user favours some entities; the user's vector is their mean plus
    noise. A user's interactions are drawn without repeats with
    :math:`P(i \mid u) \propto \mathrm{popularity}_i \exp(\beta\, z_u \cdot z_i)`, popularity by Zipf's law, among
    items of the favoured entities and popular items. So the graph tells what a user likes even where an item has few
    interactions. Everything is computed in integers, so that no last bit of a float can change a graph.

    Args:
        num_edges: Interactions and triples together, about; at least 500. Four sevenths are triples.
        num_users: Number of users; None: from ``num_edges`` (10 interactions each).
        num_items: Number of items; None: from ``num_edges`` (8 triples each).
        num_interactions: Number of interactions; None: three sevenths of ``num_edges``.
        taste: How strongly taste, rather than popularity, decides: :math:`\beta` in standard deviations of
            :math:`z_u \cdot z_i`. 0: popularity alone.
        seed: Seed.

    Raises:
        ValueError: If a size is too small, or more interactions are asked for than fit.

    Example:
        >>> files = SyntheticKG(num_edges=1000, seed=0).generate()
        >>> files.num_users, files.num_items, files.train.shape[1]
        (42, 71, 428)
    """

    num_edges: int = 30_000
    num_users: int | None = None
    num_items: int | None = None
    num_interactions: int | None = None
    taste: float = 8.0
    seed: int = 0

    def sizes(self) -> tuple[int, int, int]:
        """Number of users, items and interactions."""
        check_whole("num_edges", self.num_edges, 500)
        check_number("taste", self.taste, least=0)
        items = self.num_items if self.num_items is not None else self.num_edges * 4 // (7 * _TRIPLES_PER_ITEM)
        pairs = self.num_interactions if self.num_interactions is not None else self.num_edges * 3 // 7
        users = self.num_users if self.num_users is not None else pairs // 10
        if users < 1 or items < 20:
            raise ValueError(f"num_users must be at least 1 and num_items at least 20, got {users} and {items}")
        most = self._most(items)
        if not 3 * users <= pairs <= users * most // 2:
            raise ValueError(
                f"num_interactions must be 3 to {most // 2} for each of {users} users on {items} items, got {pairs}"
            )
        return users, items, pairs

    @staticmethod
    def _most(num_items: int) -> int:
        return min(num_items * 2 // 3, CANDIDATES // 3)

    def generate(self) -> KGRecFiles:
        """Make the graph.

        Returns:
            All interactions in ``train``; ``test`` is None: the data module splits.
        """
        num_users, num_items, num_pairs = self.sizes()
        rng = np.random.default_rng(self.seed)
        triples, num_entities, attributes, latent, weights = self._knowledge(rng, num_items)
        item_latent = np.zeros((num_items, DIM), dtype=np.int64)
        for column, weight in zip(attributes.T, weights, strict=True):
            item_latent += latent[column] * weight
        item_latent = item_latent // weights.sum() + rng.integers(-NOISE, NOISE + 1, (num_items, DIM))
        degrees = self._degrees(rng, num_users, num_items, num_pairs)
        popularity = np.cumsum(_zipf(num_items)[rng.permutation(num_items)])
        pairs = np.concatenate(
            list(self._interactions(rng, degrees, attributes[:, weights > 0], latent, item_latent, popularity)), axis=1
        )
        return KGRecFiles(
            train=unique_pairs(pairs),
            triples=triples,
            num_users=num_users,
            num_items=num_items,
            num_entities=num_entities,
            num_relations=len(_RELATIONS) + 1,
            relation_ids=np.array([r.name for r in _RELATIONS] + ["known_for"]),
        ).validated()

    def _knowledge(
        self, rng: np.random.Generator, num_items: int
    ) -> tuple[IntArray, int, IntArray, IntArray, IntArray]:
        """Triples, number of entities, attributes of each item (counted from 0), their vectors and their weights."""
        heads, relations, tails, columns, weights = [], [], [], [], []
        latents: list[IntArray] = []
        start = 0
        items = np.arange(num_items)
        for index, relation in enumerate(_RELATIONS):
            count = max(num_items // relation.items_each, 4) if relation.items_each else min(_FIXED, num_items // 2)
            table = rng.integers(-100, 101, (count, DIM))
            if relation.name == "director":
                genre = rng.integers(len(latents[0]), size=count)
                table = (table + 2 * latents[0][genre]) // 2
                directors = (start + np.arange(count), genre)
            # Without repeats: one random start, then steps that never come back to it.
            first, stride = rng.integers(count, size=num_items), 1 + rng.integers(max(count // 4, 1), size=num_items)
            for link in range(relation.links):
                column = start + (first + link * stride) % count
                columns.append(column)
                weights.append(relation.weight)
                heads.append(items)
                relations.append(np.full(num_items, index))
                tails.append(column + num_items)
            latents.append(table)
            start += count
        heads.append(directors[0] + num_items)
        relations.append(np.full(directors[0].size, len(_RELATIONS)))
        tails.append(directors[1] + num_items)
        triples = np.stack([np.concatenate(x).astype(np.int64) for x in (heads, relations, tails)])
        return triples, num_items + start, np.stack(columns, axis=1), np.concatenate(latents), np.array(weights)

    def _degrees(self, rng: np.random.Generator, num_users: int, num_items: int, num_pairs: int) -> IntArray:
        """Interactions of each user: at least 3, skewed, capped, of the wanted sum."""
        degrees = np.full(num_users, 3)
        most = self._most(num_items)
        while (left := num_pairs - int(degrees.sum())) > 0:
            room = np.flatnonzero(degrees < most)
            # The square of a uniform number prefers the first users: activity is skewed.
            chosen = room[(rng.integers(room.size, size=left) * rng.integers(room.size, size=left)) // room.size]
            degrees = np.minimum(degrees + np.bincount(chosen, minlength=num_users), most)
        return rng.permuted(degrees)

    def _interactions(
        self,
        rng: np.random.Generator,
        degrees: IntArray,
        attributes: IntArray,
        latent: IntArray,
        item_latent: IntArray,
        popularity: IntArray,
    ) -> Iterator[IntArray]:
        """Pairs (user, item), a chunk of users at a time: memory does not grow with the graph."""
        vectors = item_latent.astype(np.float32)
        num_items, num_attributes = item_latent.shape[0], attributes.shape[1]
        by_attribute = np.argsort(attributes, axis=None, kind="stable") // num_attributes
        counts = np.bincount(attributes.ravel(), minlength=len(latent))
        starts = np.cumsum(counts) - counts
        gumbel = np.round(-1024 * np.log(-np.log((np.arange(1 << 16) + 0.5) / (1 << 16)))).astype(np.int64)
        scale = 0
        for begin in range(0, degrees.size, CHUNK):
            wanted = degrees[begin : begin + CHUNK]
            users = wanted.size
            # Favour what belongs to some items: three attributes of random items.
            seeds = rng.integers(num_items, size=(users, 3))
            favoured = attributes[seeds, rng.integers(num_attributes, size=(users, 3))]
            taste = latent[favoured].sum(axis=1) // 3 + rng.integers(-20, 21, (users, DIM))
            if num_items <= 2 * CANDIDATES:
                candidates = np.broadcast_to(np.arange(num_items), (users, num_items))
                prior = np.diff(popularity, prepend=0)
                bonus = np.round(1024 * np.log(prior)).astype(np.int64)[candidates]
            else:
                # Without taste nothing is favoured: popularity alone.
                near_by = CANDIDATES // 2 if self.taste > 0 else 0
                known = favoured[np.arange(users)[:, None], rng.integers(3, size=(users, near_by))]
                near = by_attribute[starts[known] + rng.integers(counts[known])]
                draws = rng.integers(popularity[-1], size=(users, CANDIDATES - near_by))
                popular = np.searchsorted(popularity, draws, side="right")
                candidates = np.sort(np.concatenate([near, popular], axis=1), axis=1)
                bonus = np.zeros_like(candidates)
                bonus[:, 1:][candidates[:, 1:] == candidates[:, :-1]] = -(1 << 40)
            # Whole numbers below 2 ** 24: float32 is exact, in whatever order it adds.
            dots = (vectors[candidates] @ taste.astype(np.float32)[:, :, None])[:, :, 0].astype(np.int64)
            if not scale:
                scale = max(int(np.sqrt(float((dots * dots).mean()))), 1)
            scores = dots * int(1024 * self.taste) // scale + bonus
            scores += gumbel[rng.integers(1 << 16, size=scores.shape, dtype=np.uint16)]
            # The column in the low bits makes scores distinct: ties would be broken differently by different CPUs.
            ranked = np.sort(-(scores * 1024) + np.arange(scores.shape[1]), axis=1)[:, : int(wanted.max())] % 1024
            chosen = np.arange(ranked.shape[1]) < wanted[:, None]
            row = np.repeat(np.arange(users), wanted)
            yield np.stack([row + begin, candidates[row, ranked[chosen]]])


def _zipf(size: int) -> IntArray:
    """Weights falling as rank ** -0.8, flattened at the head, as integers."""
    return np.floor((1 << 30) / (np.arange(size) + 10.0) ** 0.8).astype(np.int64)
