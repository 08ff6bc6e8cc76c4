"""What the data sheets of TPUs say: the figures of roofline estimates.

Peaks, and bandwidths of memory and links: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x.
Assumed, since those pages were not seen to say: the links of v4, bandwidths of TPU7x, and the
network of all but v5e and v5p. What a program may use of the memory is what the compiler of libtpu
0.0.42 says when it runs out.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One JAX device of a TPU: a chip, but of TPU7x half of one.

  Attributes:
    kind: the name of its generation, as in the name of a topology.
    flops: dense bfloat16 peak, FLOP/s.
    hbm_bytes: main memory that a program may use, bytes.
    hbm_bandwidth: to and from main memory, bytes/s.
    ici_bandwidth: that it sends at over all its links to neighbours together, bytes/s: half of the
      data sheet's, which counts both directions.
    ici_links: how many of these there are.
    dcn_bandwidth: that it sends at to other slices, its share of the host's network, bytes/s.
    axes: of the torus.
  """

  kind: str
  flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  ici_bandwidth: float
  ici_links: int
  dcn_bandwidth: float
  axes: int


CHIPS = {
  chip.kind: chip
  for chip in (
    Chip("v4", 275e12, 30.75 * GIB, 1200e9, 300e9, 6, 6.25e9, axes=3),
    Chip("v5e", 197e12, 15.75 * GIB, 819e9, 200e9, 4, 3.125e9, axes=2),
    Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 600e9, 6, 6.25e9, axes=3),
    Chip("v6e", 918e12, 31.25 * GIB, 1638e9, 400e9, 4, 12.5e9, axes=2),
    Chip("tpu7x", 1153.5e12, 94.75 * GIB, 3690e9, 300e9, 6, 6.25e9, axes=3),
  )
}
