"""Operators: public function, checks, documentation and registration of each; the arithmetic is in csrc/ and kernels/.

Importing this package loads neither Triton nor the compiled extension: the first call of an operator does.
"""

from dwa_fast.ops._library import built_with, cause, load
from dwa_fast.ops.ascend import ascend_

__all__ = ["ascend_", "built_with", "cause", "load"]
