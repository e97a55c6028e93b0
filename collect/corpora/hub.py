"""The six data sets of the first write-up, from the hub by name through the `datasets` library.

Owns where each lies and which fields are its text. Without a network it says which way works.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CorpusError, HubError
from .corpus import Corpus

# A folder with data sets in the hub's own layout (owner/name/...), used instead of the network.
LOCAL_HUB_VARIABLE = "OUTRIDER_HUB_FOLDER"


@dataclass(frozen=True, slots=True)
class HubDataset:
    """One data set: repository, configuration, split, and the fields joined into a document."""

    repository: str
    configuration: str | None
    split: str
    fields: tuple[str, ...]


HUB_DATASETS: dict[str, HubDataset] = {
    "imdb": HubDataset("stanfordnlp/imdb", "plain_text", "train", ("text",)),
    "yelp": HubDataset("Yelp/yelp_review_full", "yelp_review_full", "train", ("text",)),
    "agnews": HubDataset("fancyzhx/ag_news", "default", "train", ("text",)),
    "squad": HubDataset("rajpurkar/squad", "plain_text", "train", ("context",)),
    "amazon": HubDataset(
        "fancyzhx/amazon_polarity", "amazon_polarity", "train", ("title", "content")
    ),
    "dbpedia": HubDataset("fancyzhx/dbpedia_14", "dbpedia_14", "train", ("title", "content")),
}


def hub_corpus(name: str) -> Corpus:
    """The corpus behind one of the names in HUB_DATASETS; nothing is fetched before the
    first pass.
    """
    dataset = HUB_DATASETS[name]

    def documents() -> Iterator[str]:
        rows = _load(name, dataset)
        missing = [field for field in dataset.fields if field not in rows.column_names]
        if missing:
            raise CorpusError(
                f"data set {name!r} ({dataset.repository}) has no field {', '.join(missing)}; "
                f"it has {', '.join(rows.column_names)}"
            )
        for row in rows.select_columns(list(dataset.fields)):
            text = "\n".join(str(row[field]).strip() for field in dataset.fields)
            yield text.replace("<br />", "\n")

    return Corpus(name, f"hub:{dataset.repository}:{dataset.split}", documents)


def _load(name: str, dataset: HubDataset) -> Any:
    try:
        import datasets
    except ImportError:
        raise HubError(
            f"data set {name!r} comes through the `datasets` library, which is not installed; "
            f"install it (pip install datasets), or {_OFFLINE_WAY}"
        ) from None
    datasets.disable_progress_bars()
    folder = os.environ.get(LOCAL_HUB_VARIABLE)
    try:
        if folder:
            local = Path(folder) / dataset.repository
            if not local.is_dir():
                raise FileNotFoundError(f"{str(local)!r} ({LOCAL_HUB_VARIABLE}) is no folder")
            return datasets.load_dataset(str(local), split=dataset.split)
        return datasets.load_dataset(dataset.repository, dataset.configuration, split=dataset.split)
    # The library passes on the errors of five others; each means that the text is not to be had.
    except Exception as error:
        raise HubError(
            f"data set {name!r} ({dataset.repository}) cannot be had: {_reason(error)}; "
            f"{_OFFLINE_WAY}"
        ) from error


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub refused access ({status}); set HF_TOKEN to a token that may read it"
    if status == 429:
        return "the hub limits the rate (429); set HF_TOKEN or wait"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}"


_OFFLINE_WAY = (
    "without the hub, take --datasets offline or --datasets text:PATH, set HF_HUB_OFFLINE=1 with a "
    f"filled cache, or {LOCAL_HUB_VARIABLE} to a folder laid out like the hub"
)
