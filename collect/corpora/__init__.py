"""The text that traces are taken from: hub data sets by name, local files, offline corpora."""

from .registry import Corpus, known_names, open_corpora

__all__ = ["Corpus", "known_names", "open_corpora"]
