"""Local features as one of the comparisons of duplicate search: they find pairs, and turn down those of embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dinov2cli.curation.fingerprints import Images
from dinov2cli.curation.tiers import Tier
from dinov2cli.curation.verify import Settings, geometric_edges, geometric_matches, verify_pairs
from dinov2cli.search.edges import Edges
from dinov2cli.search.vectors import Float32, Int64


@dataclass(frozen=True)
class LocalMatcher:
    """The images of a pool, compared by local features; `settings.key` stands for them."""

    images: Images
    settings: Settings = field(default_factory=Settings)

    def tier(self, known: Sequence[Edges]) -> Tier:
        """Pairs found by local features alone; what `known` edges join already is not compared again."""
        return geometric_edges(self.images, known=known, settings=self.settings)

    def confirms(self, edges: Edges) -> npt.NDArray[np.bool_]:
        """Which of these pairs have local features in common that lie alike, [E]."""
        found = verify_pairs(self.images, edges.src, edges.dst, settings=self.settings).edges
        rows = len(self.images)
        return np.isin(edges.src * rows + edges.dst, found.src * rows + found.dst)

    def against(self, reference: Images, key: str) -> tuple[Float32, Int64]:
        """For every image its best match in a reference set: similarity [N], row [N] (-1 for none).

        `key` stands for the reference.
        """
        settings = replace(self.settings, reference_key=key)
        return geometric_matches(self.images, reference, settings=settings)
