"""What traces tell about how a model routes: one pass of counting, then figures, pages,
comparisons.
"""

from .analyze import analyze
from .comparison import Comparison, compare
from .document import Analysis, read_analysis, write_analysis

__all__ = ["Analysis", "Comparison", "analyze", "compare", "read_analysis", "write_analysis"]
