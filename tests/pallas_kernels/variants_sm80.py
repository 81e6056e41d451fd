"""The kernels that are assembled for compute capability 8.0."""

from tests.pallas_kernels import variants_ampere

CAPABILITY = (8, 0)
ALL = variants_ampere.SM80
# int32 sums become float32 once all are there.
FORBIDDEN = ("LDL", "STL")
