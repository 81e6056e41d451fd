"""The kernels that are assembled for compute capability 8.6."""

from tests.pallas_kernels import variants_ampere

CAPABILITY = (8, 6)
ALL = variants_ampere.SM86
# int32 sums become float32 once all are there.
FORBIDDEN = ("LDL", "STL")
