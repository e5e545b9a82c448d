"""An exact index in pieces, each held by a Ray actor: for galleries beyond one process."""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np

from dafm_ray.errors import ConfigError, MachineError
from dafm_ray.search.index import (
    Block,
    FlatIndex,
    Floats,
    Ints,
    Unusable,
    checked,
    no_images,
    refuse_more,
)
from dafm_ray.session import ensure_ray


class Shard:
    """An actor that holds consecutive candidates."""

    def __init__(self, block: Block) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        self.index = FlatIndex([block])

    def add(self, block: Block) -> None:
        """Take further candidates in."""
        self.index.add(block)

    def search(self, queries_QD: Floats, k: int) -> tuple[Floats, Ints]:
        """See `FlatIndex.search`; fewer where the shard has fewer."""
        return self.index.search(queries_QD, min(k, len(self.index)))

    def scores(self, queries_QD: Floats, columns_QK: Ints) -> Floats:
        """See `FlatIndex.scores`."""
        return self.index.scores(queries_QD, columns_QK)

    def images(self, columns_N: Ints) -> Floats:
        """See `FlatIndex.images`."""
        return self.index.images(columns_N)


class ShardedIndex:
    """Answers as a `FlatIndex` of the same blocks, to the bit.

    Only one block is in this process at a time, and the ids. A context manager: its actors end with
    it.
    """

    def __init__(self, blocks: Iterable[Block], count: int, shards: int) -> None:
        """Fill the actors.

        Args:
            blocks: candidates in stored order.
            count: at most so many candidates, from which the size of a shard is known.
            shards: actors at most.

        Raises:
            ConfigError: no shard.
            DataError: see `FlatIndex.add`.
            MachineError: an actor died.
        """
        if shards < 1:
            raise ConfigError(f"shards must be at least 1, not {shards}")
        ensure_ray()
        self.ids: list[str] = []
        self.unusable: list[Unusable] = []
        self._starts: list[int] = []
        self._actors: list[Any] = []
        self._size = -(-count // shards)
        try:
            self._fill(blocks)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors."""
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _fill(self, blocks: Iterable[Block]) -> None:
        import ray

        # An actor that claimed CPUs would wait without a word for those that a trainer holds.
        shard = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(Shard)
        under_way: list[Any] = []
        shape: tuple[int, ...] = ()
        for block in blocks:
            self.unusable += block.unusable
            if not len(block.ids):
                continue
            features = checked(block, shape)
            shape = features.shape[1:]
            _got(under_way)
            under_way = []
            taken = 0
            while taken < len(block.ids):
                room = len(self._starts) * self._size - len(self)
                part = slice(taken, taken + (room or self._size))
                piece = Block(block.ids[part], features[part])
                if room:
                    under_way.append(self._actors[-1].add.remote(piece))
                else:
                    self._starts.append(len(self))
                    self._actors.append(shard.remote(piece))
                self.ids += piece.ids
                taken += len(piece.ids)
        _got(under_way)
        if not self.ids:
            raise no_images(self.unusable)

    def search(self, queries_QD: Floats, k: int) -> tuple[Floats, Ints]:
        """See `FlatIndex.search`."""
        import ray

        refuse_more(k, len(self))
        queries = ray.put(queries_QD)
        found = _got([actor.search.remote(queries, k) for actor in self._actors])
        scores_QM = np.concatenate([scores for scores, _ in found], axis=1)
        columns_QM = np.concatenate(
            [columns + start for (_, columns), start in zip(found, self._starts, strict=True)],
            axis=1,
        )
        # Shards stand in stored order, and so do the ties of each: a stable sort keeps it.
        order_QK = np.argsort(-scores_QM, axis=1, kind="stable")[:, :k]
        return (
            np.take_along_axis(scores_QM, order_QK, axis=1),
            np.take_along_axis(columns_QM, order_QK, axis=1),
        )

    def scores(self, queries_QD: Floats, columns_QK: Ints) -> Floats:
        """See `FlatIndex.scores`."""
        import ray

        queries = ray.put(queries_QD)
        shard_QK = self._shard_of(columns_QK)
        asked = []
        for number, (actor, start) in enumerate(zip(self._actors, self._starts, strict=True)):
            own_QK = np.where(shard_QK == number, columns_QK - start, -1)
            asked.append(actor.scores.remote(queries, own_QK))
        scores_QK = np.full(columns_QK.shape, np.nan, np.float32)
        for number, own_QK in enumerate(_got(asked)):
            scores_QK = np.where(shard_QK == number, own_QK, scores_QK)
        return scores_QK

    def images(self, columns_N: Ints) -> Floats:
        """See `FlatIndex.images`."""
        shard_N = self._shard_of(columns_N)
        own = [np.flatnonzero(shard_N == number) for number in range(len(self._actors))]
        found = _got(
            [
                actor.images.remote(columns_N[places] - start)
                for actor, start, places in zip(self._actors, self._starts, own, strict=True)
            ]
        )
        images_ND: Floats = np.concatenate(found)
        return images_ND[np.argsort(np.concatenate(own))]

    def _shard_of(self, columns: Ints) -> Ints:
        """Which shard holds each candidate; -1 for -1."""
        return np.searchsorted(self._starts, columns, side="right") - 1


def _got(asked: list[Any]) -> list[Any]:
    """What actors answer.

    Raises:
        MachineError: one of them died.
    """
    import ray

    try:
        return list(ray.get(asked))
    except ray.exceptions.RayActorError as error:
        raise MachineError(
            "a shard of the index died, most likely for lack of memory; use more shards on more "
            f"machines ({str(error).splitlines()[0]})"
        ) from None
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
