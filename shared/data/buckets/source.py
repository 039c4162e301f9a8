"""Training data in buckets, as a source like any other."""

import numpy as np

from shared.data.buckets.shapes import Bucket, named
from shared.data.sources.base import RandomAccessSource, SubsetSource
from shared.data.sources.order import AllBut


class BucketedSource(SubsetSource):
    """All samples of another source, and the buckets that they are in, of which its manifest tells."""

    def __init__(self, source: RandomAccessSource, buckets: list[Bucket]) -> None:
        all_samples = AllBut(len(source), np.empty(0, np.int64))
        told = [f"{named(bucket.size)}: {len(bucket.members_K)}" for bucket in buckets]
        super().__init__(source, all_samples, {"aspect_buckets": told})
        self.buckets = buckets

    @property
    def counts(self) -> dict[str, int]:
        """The samples of each bucket, by its size."""
        return {named(bucket.size): len(bucket.members_K) for bucket in self.buckets}
