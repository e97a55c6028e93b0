"""Names to text: local files of each kind, the hub's layout, and what is refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from outrider.collect.corpora import known_names, open_corpora
from outrider.collect.corpora.hub import HUB_DATASETS
from outrider.collect.errors import CollectError, CorpusError, HubError, UnknownDatasetError

TEXTS = ["First, a line.", 'Second "quoted"\nover two lines, naïve café.', "Third."]


@pytest.fixture
def files(tmp_path):
    """One folder with the same three documents in each accepted kind."""
    (tmp_path / "txt").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "txt" / f"{number}.txt").write_text(text, encoding="utf-8")
    lines = [json.dumps({"id": number, "text": text}) for number, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    body = "label,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(quoted))
    (tmp_path / "a.csv").write_text(body, encoding="utf-8")
    pq.write_table(pa.table({"label": [0, 1, 2], "text": TEXTS}), tmp_path / "a.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["txt", "a.jsonl", "a.csv", "a.parquet"])
def test_every_kind_of_file_gives_its_documents_each_time(files, name):
    (corpus,) = open_corpora([f"text:{files / name}"])
    assert list(corpus.documents()) == TEXTS == list(corpus.documents())
    assert corpus.name == f"text:{name.split('.')[0]}"


def test_a_column_can_be_named(files):
    (corpus,) = open_corpora([f"text:{files / 'a.csv'}#label"])
    assert list(corpus.documents()) == ["0", "1", "2"]
    (files / "b.csv").write_text("x,y\n1,2\n")
    with pytest.raises(CorpusError, match=r"it has 'x', 'y'.*text:PATH#COLUMN"):
        list(open_corpora([f"text:{files / 'b.csv'}"])[0].documents())


BAD = {
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n\t\n", "is empty"),
    "binary.txt": (b"MZ\0\0\1", "is binary"),
    "latin1.txt": ("naïve".encode("latin-1"), "not UTF-8: byte 2 is 0xef"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
    "number.jsonl": (b"17\n", "line 1 is a int"),
    "text.parquet": (b"PAR1 not really", "not a Parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_unusable_files_are_refused_by_name(tmp_path, name):
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=reason) as caught:
        list(open_corpora([f"text:{tmp_path / name}"])[0].documents())
    assert name in str(caught.value) and caught.value.exit_code == 3


def test_paths_that_lead_nowhere_are_refused(tmp_path):
    with pytest.raises(CorpusError, match="does not exist"):
        open_corpora([f"text:{tmp_path / 'no'}"])
    with pytest.raises(CorpusError, match="holds no file of a known kind"):
        open_corpora([f"text:{tmp_path}"])
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(CorpusError, match=r"unknown kind; known are .txt"):
        open_corpora([f"text:{tmp_path / 'a.pdf'}"])


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownDatasetError) as caught:
        open_corpora(["imbd"])
    assert all(name in str(caught.value) for name in known_names())
    assert caught.value.exit_code == 2
    with pytest.raises(UnknownDatasetError):
        open_corpora(["text:"])
    with pytest.raises(CollectError, match="named twice"):
        open_corpora(["plays", "plays"])


def test_a_folder_without_any_corpus_is_refused(tmp_path):
    # The standard library's code needs no package: alone it would pass for all six domains.
    with pytest.raises(CorpusError, match="holds none of the offline corpora"):
        open_corpora(["offline"], offline_root=tmp_path)
    assert open_corpora(["code"], offline_root=tmp_path)[0].source == "offline:code"


def test_offline_without_any_corpora_is_the_sample(tmp_path, monkeypatch):
    monkeypatch.delenv("OUTRIDER_CORPORA", raising=False)
    monkeypatch.setattr("outrider.collect.corpora.registry._installed_root", lambda: None)
    corpora = open_corpora(["offline"])
    assert [corpus.name for corpus in corpora] == ["code", "dialogue", "plays", "speeches"]
    for corpus in corpora:
        texts = list(corpus.documents())
        assert sum(map(len, texts)) > 500_000 and len(set(texts)) == len(texts)
    (plays,) = open_corpora(["plays"])
    assert plays.source == "sample:plays"
    with pytest.raises(CorpusError, match="'news' is not installed"):
        open_corpora(["news"])


def test_a_stated_folder_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("OUTRIDER_CORPORA", "/no/such/folder")
    with pytest.raises(CorpusError, match="OUTRIDER_CORPORA names '/no/such/folder'"):
        open_corpora(["offline"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_hub_data_sets_load_from_a_folder_in_their_layout(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("OUTRIDER_HUB_FOLDER", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, dataset in HUB_DATASETS.items():
        folder = tmp_path / dataset.repository / "data"
        folder.mkdir(parents=True)
        columns = {
            field: [f"{name} {field} {n}<br />end" for n in range(3)] for field in dataset.fields
        }
        pq.write_table(
            pa.table({"label": [0, 1, 0]} | columns), folder / "train-00000-of-00001.parquet"
        )
    for corpus in open_corpora(list(HUB_DATASETS)):
        fields = HUB_DATASETS[corpus.name].fields
        expected = [
            "\n".join(f"{corpus.name} {field} {n}\nend" for field in fields) for n in range(3)
        ]
        assert list(corpus.documents()) == expected


def test_a_hub_out_of_reach_names_the_offline_way(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("OUTRIDER_HUB_FOLDER", str(tmp_path))
    (corpus,) = open_corpora(["yelp"])
    with pytest.raises(HubError, match="--datasets offline") as caught:
        next(corpus.documents())
    assert caught.value.exit_code == 3 and "HF_HUB_OFFLINE" in str(caught.value)
