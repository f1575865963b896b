"""Weights of adjacent layers that share one storage: W2 becomes c Q W1, with Q orthogonal and small. Lossy; off unless
called.

    report = share_lossy(model, form=Householder(16), tolerance=0.1)   # before the optimizer is made
    print(report)                                                      # error and bytes of each pair

What comes of it, and that it does not do what was claimed for it: docs/sharing.md.
"""

from memplan.sharing.forms import Blocks as Blocks
from memplan.sharing.forms import Householder as Householder
from memplan.sharing.report import Pair as Pair
from memplan.sharing.report import Report as Report
from memplan.sharing.share import share_as as share_as
from memplan.sharing.share import share_lossy as share_lossy
from memplan.sharing.share import survey as survey
from memplan.sharing.share import unshare as unshare

__all__ = ["Blocks", "Householder", "Pair", "Report", "share_as", "share_lossy", "survey", "unshare"]
