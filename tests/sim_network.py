"""Links that can be cut, one direction each, in the shapes in which real networks break.

Rule: a shape only adds cuts; ``heal`` takes all away. Shapes may overlap, as failures do.

Used by ``sim_faults.py`` and ``sim_cluster.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from raft_types import MemberId
from tests.sim_world import CALM, World


class Network:
    """Which links work."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._cuts: set[tuple[MemberId, MemberId]] = set()

    def is_cut(self, sender: MemberId, to: MemberId) -> bool:
        """Whether nothing gets from the one to the other."""
        return (sender, to) in self._cuts

    def heal(self) -> None:
        """All links work."""
        self._world.say("all links work")
        self._cuts.clear()

    def cut(self, one: MemberId, others: Iterable[MemberId]) -> None:
        """Nothing between it and these, in either direction."""
        for other in others:
            self._cuts |= {(one, other), (other, one)}

    def isolate(self, name: MemberId, names: Iterable[MemberId]) -> None:
        """One is alone."""
        self._world.say(f"{name} is cut off")
        self._world.counts["cut: one alone"] += 1
        self.cut(name, names)

    def break_somehow(self, names: list[MemberId]) -> None:
        """One of the shapes that leave nobody in particular alone."""
        shapes: list[Callable[[list[MemberId]], None]] = [
            *(self._one_way, self._deaf, self._split, self._split, self._chain, self._ring),
            *(self._bridge, self._swizzle),
        ]
        if len(names) > 1:
            self._world.rng.choice(shapes)(self._world.rng.sample(names, len(names)))

    def _note(self, shape: str, names: Iterable[MemberId]) -> None:
        self._world.say(f"cut: {shape} {' '.join(names)}")
        self._world.counts[f"cut: {shape}"] += 1

    def _one_way(self, names: list[MemberId]) -> None:
        self._note("one way", names[:2])
        self._cuts.add((names[0], names[1]))

    def _deaf(self, names: list[MemberId]) -> None:
        """The first hears nobody and is heard, or the other way round."""
        first, *others = names
        if self._world.chance(0.5):
            self._note("deaf", [first])
            self._cuts |= {(other, first) for other in others}
        else:
            self._note("mute", [first])
            self._cuts |= {(first, other) for other in others}

    def _split(self, names: list[MemberId]) -> None:
        """A minority from a majority."""
        left, right = names[: len(names) // 2], names[len(names) // 2 :]
        self._note("split", left)
        for name in left:
            self.cut(name, right)

    def _chain(self, names: list[MemberId]) -> None:
        """Each speaks with the next one only."""
        self._note("chain", names)
        for place, name in enumerate(names):
            self.cut(name, names[place + 2 :])

    def _ring(self, names: list[MemberId]) -> None:
        """Each sees its neighbours: of five servers each sees another majority."""
        self._note("ring", names)
        for place, name in enumerate(names):
            far = names[place + 2 : len(names) - (place == 0)]
            self.cut(name, far)

    def _bridge(self, names: list[MemberId]) -> None:
        """Two halves that only the first server sees both of."""
        self._note("bridge", names[:1])
        middle = len(names) // 2 + 1
        for name in names[1:middle]:
            self.cut(name, names[middle:])

    def _swizzle(self, names: list[MemberId]) -> None:
        """One after the other is cut off, then they come back in another order."""
        self._note("swizzle", names)
        world = self._world
        for name in names[: world.rng.randint(1, len(names))]:
            world.at(world.rng.uniform(0, 20), self._cut_later, name, names)
            world.at(world.rng.uniform(20, 60), self._uncut, name)

    def _cut_later(self, name: MemberId, names: list[MemberId]) -> None:
        if self._world.weather is not CALM:
            self.cut(name, names)

    def _uncut(self, name: MemberId) -> None:
        self._cuts = {pair for pair in self._cuts if name not in pair}
