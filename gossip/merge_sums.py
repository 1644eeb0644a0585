"""What the owners of one plan report: the sums of the pieces, and whose inputs they lack. IO-free.

Owns one plan's results until they become a record, and who is left out of the next plan. Never asks anybody and never
judges values: ``gossip.merge_proposer`` does the one, and has the other done. Every plan begins with nothing, for sums
of one list of contributors say nothing about another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from gossip.merge_record import Link, owners, require
from gossip.merge_shape import MergeShape
from gossip.messages import MergeResults, PieceResult, SignedContribution
from p2p.transport import PeerId


class Sums:
    """The sums of ``contributors``, sorted by peer, that their owners are asked for: those of ``moved`` pieces."""

    def __init__(
        self,
        contributors: Sequence[SignedContribution],
        *,
        link: Link,
        moved: Sequence[int],
        shape: MergeShape,
        replicas: int,
    ) -> None:
        self.contributors = list(contributors)
        self._shape = shape
        self._first = link.is_genesis
        names = [PeerId(contribution.peer) for contribution in contributors]
        self._owners = dict(zip(moved, owners(link.parent, names, len(moved), replicas), strict=True))
        self._sums: dict[int, dict[PeerId, PieceResult]] = {piece: {} for piece in moved}
        self._missing: set[tuple[PeerId, PeerId]] = set()
        """(owner, contributor): this owner could not get or use that contributor's inputs."""
        self._settled: dict[int, PieceResult] = {}

    def owners(self) -> set[PeerId]:
        """Everybody who is asked for a sum."""
        return {owner for per_piece in self._owners.values() for owner in per_piece}

    def take(self, owner: PeerId, results: MergeResults) -> None:
        """What ``owner`` reports. Raises RecordRefused for what it was not asked for."""
        contributors = {contribution.peer for contribution in self.contributors}
        require(contributors.issuperset(results.missing), "malformed", "a stranger reported missing")
        for result in results.results:
            owned = owner in self._owners.get(result.piece, [])
            require(owned, "malformed", "a result for another owner's piece")
            fits = result.shard.size == self._shape.result_size(result.piece, first=self._first)
            update_bytes = result.update.size if result.update is not None else None
            fits &= update_bytes == self._shape.update_size(result.piece, first=self._first)
            require(fits, "shape", f"a sum of piece {result.piece} of the wrong size")
        self._missing |= {(owner, PeerId(peer)) for peer in results.missing if peer != owner}
        for result in results.results:
            self._sums[result.piece][owner] = result

    def complete(self) -> bool:
        """Whether every piece has a sum that counts.

        One does not where another owner of the piece lacks the inputs of whoever gave it: nobody could compare it.
        """
        return all(self._counts(self._owners[piece], sums) for piece, sums in self._sums.items())

    def _counts(self, chosen: Sequence[PeerId], sums: Collection[PeerId]) -> bool:
        lacked = {peer for owner, peer in self._missing if owner in chosen}
        return any(giver not in lacked for giver in sums)

    def disputed(self) -> list[int]:
        """Pieces about which owners disagree, ascending."""
        return [piece for piece, sums in self._sums.items() if len(set(sums.values())) > 1]

    def settle(self, piece: int, result: PieceResult) -> bool:
        """The right sum of a disputed piece; returns whether all are settled."""
        self._settled[piece] = result
        return len(self._settled) == len(self.disputed())

    def wrong(self) -> list[tuple[PeerId, int]]:
        """Whose sum of which disputed piece was another one, by piece, then by owner."""
        return [
            (owner, piece)
            for piece, right in sorted(self._settled.items())
            for owner, result in sorted(self._sums[piece].items())
            if result != right
        ]

    def results(self) -> list[PieceResult]:
        """One sum of each piece, in order."""
        return [self._settled.get(piece) or next(iter(sums.values())) for piece, sums in self._sums.items()]

    def givers(self, piece: int) -> list[PeerId]:
        """Who reported the sum of ``piece`` that ``results`` has, sorted."""
        result = next(result for result in self.results() if result.piece == piece)
        return sorted(peer for peer, given in self._sums[piece].items() if given == result)

    def reliable(self) -> list[SignedContribution]:
        """The contributors of the next plan where this one is not complete: strictly fewer."""
        dropped = {
            owner
            for piece, per_piece in self._owners.items()
            for owner in per_piece
            # Nothing delivered and nobody to blame for it: the owner itself did not answer.
            if owner not in self._sums[piece] and not any(owner == reporter for reporter, _ in self._missing)
        }
        return self.without(dropped | cover(edge for edge in self._missing if not dropped.intersection(edge)))

    def without(self, dropped: set[PeerId]) -> list[SignedContribution]:
        """The contributors but for ``dropped``."""
        return [contribution for contribution in self.contributors if contribution.peer not in dropped]


def cover(edges: Iterable[tuple[PeerId, PeerId]]) -> set[PeerId]:
    """Peers that together touch every (reporter, missing) edge, found greedily: whoever is in most edges first.

    One report against many is the reporter's trouble, many reports against one that one's; a single report is
    held against the peer that was missing.
    """
    left = set(edges)
    chosen: set[PeerId] = set()
    while left:
        reports = Counter(peer for edge in left for peer in edge)
        accused = Counter(missing for _, missing in left)
        worst = max(sorted(reports), key=lambda peer: (reports[peer], accused[peer]))
        chosen.add(worst)
        left = {edge for edge in left if worst not in edge}
    return chosen
