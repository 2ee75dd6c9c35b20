"""Log-linear histograms of whole numbers (nanoseconds): merged by addition, with a bounded relative error.

Values below 256 have a bucket each. Above, every power of two is cut into 128 buckets of equal width, so a bucket is at
most 1/128 of its values wide, and its middle at most 1/256 (0.4 %) away from any of them. Two histograms added up are
the histogram of all samples: percentiles of merged histograms keep that bound, averages of percentiles have none.
Source: HdrHistogram (idea), with a power of two instead of decimal digits.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence

SUB_BITS = 7
MAX_VALUE = (1 << 62) - 1
RELATIVE_ERROR = 1 / (1 << (SUB_BITS + 1))
_EXACT = 1 << (SUB_BITS + 1)
MIN_TALLIED = 16  # fewer values are quicker one by one
_LOWER = 0 if sys.byteorder == "little" else 1
_FIRST_TOP = (127 + SUB_BITS - 1) << SUB_BITS  # upper half of the float that would be in bucket 0


def bucket_of(value: int) -> int:
    """The bucket of a value; what is negative goes to 0 and what is over MAX_VALUE to the last."""
    if value < _EXACT:
        return max(value, 0)
    exponent = min(value, MAX_VALUE).bit_length() - SUB_BITS - 1
    return (exponent << SUB_BITS) + (min(value, MAX_VALUE) >> exponent)


def bounds_of(bucket: int) -> tuple[int, int]:
    """The least and the greatest value of a bucket."""
    if bucket < _EXACT:
        return bucket, bucket
    exponent = (bucket >> SUB_BITS) - 1
    low = ((bucket & (1 << SUB_BITS) - 1) + (1 << SUB_BITS)) << exponent
    return low, low + (1 << exponent) - 1


class Histogram:
    """Counts by bucket, beside the exact count, sum, least and greatest."""

    __slots__ = ("count", "counts", "max", "min", "sum")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.count = 0
        self.sum = 0
        self.min: int | None = None
        self.max: int | None = None

    def add(self, value: int, times: int = 1) -> None:
        """Counts a value."""
        bucket = bucket_of(value)
        self.counts[bucket] = self.counts.get(bucket, 0) + times
        self.count += times
        self.sum += value * times
        if self.min is None or value < self.min:
            self.min = value
        if self.max is None or value > self.max:
            self.max = value

    def add_all(self, values: Sequence[int]) -> None:
        """Counts many values, with less work for each than `add`."""
        if not values:
            return
        least, greatest = min(values), max(values)
        counts = self.counts
        for bucket, times in _tally(values, least, greatest).items():
            counts[bucket] = counts.get(bucket, 0) + times
        self.count += len(values)
        self.sum += sum(values)
        if self.min is None or least < self.min:
            self.min = least
        if self.max is None or greatest > self.max:
            self.max = greatest

    def merge(self, other: Histogram) -> None:
        """Adds another histogram to this one."""
        for bucket, times in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + times
        self.count += other.count
        self.sum += other.sum
        if other.min is not None and (self.min is None or other.min < self.min):
            self.min = other.min
        if other.max is not None and (self.max is None or other.max > self.max):
            self.max = other.max

    def percentile(self, share: float) -> float | None:
        """The value that `share` (0 to 1) of the samples do not exceed (nearest rank), within RELATIVE_ERROR.

        None without samples; the least and the greatest are exact.
        """
        if self.count == 0 or self.min is None or self.max is None:
            return None
        rank = nearest_rank(self.count, share)
        if rank == 1:
            return float(self.min)
        if rank == self.count:
            return float(self.max)
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                low, high = bounds_of(bucket)
                return min(max((low + high) / 2, float(self.min)), float(self.max))
        raise AssertionError("a histogram's counts do not add up to its count")

    def mean(self) -> float | None:
        """The exact mean; None without samples."""
        return self.sum / self.count if self.count else None

    def to_wire(self) -> dict[str, object]:
        """As plain data: what `from_wire` reads."""
        return {
            "sub_bits": SUB_BITS,
            "count": self.count,
            "sum": self.sum,
            "min": self.min,
            "max": self.max,
            "buckets": [[bucket, self.counts[bucket]] for bucket in sorted(self.counts)],
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, object]) -> Histogram:
        """The histogram that `to_wire` wrote. Raises: ValueError for other bucket widths or counts that disagree."""
        made = cls()
        buckets, count, total = data["buckets"], data["count"], data["sum"]
        if data["sub_bits"] != SUB_BITS:
            raise ValueError(f"a histogram with {data['sub_bits']} sub-bucket bits; this program has {SUB_BITS}")
        assert isinstance(buckets, list)
        assert isinstance(count, int)
        assert isinstance(total, int)
        made.counts = {int(bucket): int(times) for bucket, times in buckets}
        if sum(made.counts.values()) != count:
            raise ValueError("a histogram whose buckets do not add up to its count")
        made.count, made.sum = count, total
        least, greatest = data["min"], data["max"]
        made.min = least if isinstance(least, int) else None
        made.max = greatest if isinstance(greatest, int) else None
        return made


def _tally(values: Sequence[int], least: int, greatest: int) -> Mapping[int, int]:
    """How many values each bucket gets.

    The upper half of a 32-bit float is its exponent and the first 7 bits of its fraction: a bucket, but for where they
    begin. Whole numbers below 2^24 are such floats exactly; others might be rounded up into the next bucket, where the
    lower half would be 0.
    """
    if least >= _EXACT and len(values) >= MIN_TALLIED:
        halves = memoryview(array("f", values)).cast("B").cast("H")
        if greatest < 1 << 24 or (greatest < 1 << 62 and 0 not in halves[_LOWER::2]):
            return {top - _FIRST_TOP: times for top, times in Counter(halves[1 - _LOWER :: 2]).items()}
    return Counter(map(bucket_of, values))


def nearest_rank(count: int, share: float) -> int:
    """The 1-based rank of a percentile among `count` sorted samples."""
    # The product is rounded first: 0.07 * 100 is 7.000000000000001, and its rank is 7.
    exact = round(share * count, 9)
    return min(max(int(exact) + (exact > int(exact)), 1), count)
