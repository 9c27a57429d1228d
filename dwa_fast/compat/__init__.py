"""The interfaces of SRe2L, CDA and DWA code bases, so that one of their scripts becomes fast by changing an import.

from dwa_fast.compat import BNFeatureHook, Perterb  # in a loop that stays as it is
from dwa_fast.compat import get_images              # the whole recover loop
"""

from __future__ import annotations

from dwa_fast.compat.hooks import BNFeatureHook, ViT_BNFeatureHook
from dwa_fast.compat.perterb import Perterb
from dwa_fast.compat.recover import get_images

__all__ = ["BNFeatureHook", "Perterb", "ViT_BNFeatureHook", "get_images"]
