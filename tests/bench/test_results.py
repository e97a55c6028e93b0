"""What is done with result documents: schemas, reading, comparing, the report; and transfer."""

import copy
import json
from pathlib import Path

import msgspec
import pytest
from bench_tables import rewritten
from publish import main as publish
from typer.testing import CliRunner

from outrider.bench import documents
from outrider.bench.compare import compare
from outrider.bench.devices import find_device
from outrider.bench.documents import KINDS, check, kind_of, read
from outrider.bench.environment import environment
from outrider.bench.fit import bench_fit
from outrider.bench.model_shapes import model_shapes
from outrider.bench.report.page import write_report
from outrider.bench.report.tables import markdown, table
from outrider.bench.transfer import TransferOptions, bench_transfer
from outrider.runtime.cli import app
from outrider.runtime.errors import InvalidDataError, OutriderError, UsageError


def silent(what: str, done: int, total: int) -> None: ...


@pytest.fixture(scope="module")
def transfers() -> dict:
    options = TransferOptions(blocks=(4096, 65536), depths=(1, 2), bytes_each=1 << 20,
                              repetitions=3)  # fmt: skip
    return bench_transfer(options, progress=silent)


@pytest.fixture(scope="module")
def fits() -> dict:
    return bench_fit(model_shapes()["deepseek-moe-16b"], [find_device("rtx3090")])


def saved(folder: Path, name: str, document: dict) -> Path:
    path = folder / name
    path.write_text(json.dumps(document))
    return path


def test_transfer_document_is_what_its_schema_says(transfers):
    assert check(json.loads(json.dumps(transfers)), source="here") == "transfer"
    assert len(transfers["rows"]) == 2 * 2 * 2
    for row in transfers["rows"]:
        assert row["spread"]["low"] <= row["gb_per_s"] <= row["spread"]["high"]
        seconds = row["microseconds_per_block"] * 1e-6
        assert row["block_bytes"] / seconds / 1e9 == pytest.approx(row["gb_per_s"])
        assert row["is_direct"] is None if row["medium"] == "memory" else True


@pytest.mark.parametrize("kind", KINDS)
def test_schema_of_each_kind_names_its_rows(kind):
    schema = documents.schema(kind)
    named = schema["$defs"][KINDS[kind].__name__]
    assert {"environment", "rows"} <= set(named["required"])
    assert json.loads(CliRunner().invoke(app, ["bench", "schema", kind]).stdout) == schema


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", '{"rows": []}', '{"bench": "transfer", "rows": [{"a": 1}]}', "{"]
)
def test_file_that_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(InvalidDataError, match=r"r\.json"):
        read(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "absent.json")


def test_wrong_type_is_refused_with_its_place(transfers):
    wrong = json.loads(json.dumps(transfers))
    wrong["rows"][1]["gb_per_s"] = "fast"
    with pytest.raises(InvalidDataError, match=r"rows\[1\]\.gb_per_s"):
        check(wrong, source="here")


def test_kinds_are_told_by_their_rows():
    assert kind_of({"rows": [{"arm": "resident"}]}) == "decode"
    assert kind_of({"rows": [{"impl": "cpu"}]}) == "kernels"
    assert kind_of({"rows": [{"colour": "red"}]}) is None


def test_comparison_tells_what_is_beyond_noise(transfers):
    slower = copy.deepcopy(transfers)
    row = slower["rows"][0]
    within = slower["rows"][1]
    row["gb_per_s"] = 0.5 * row["spread"]["low"]
    row["spread"] |= {"low": 0.4 * row["spread"]["low"], "high": 0.6 * row["spread"]["low"]}
    within["gb_per_s"] = within["spread"]["low"]
    found = compare(transfers, slower, kinds=("transfer", "transfer"))
    assert found["regressions"] == 1 and found["improvements"] == 0
    (one,) = [change for change in found["changes"] if change["verdict"] == "regression"]
    assert one["row"]["block_bytes"] == row["block_bytes"] and one["ratio"] < 1.0
    turned = compare(slower, transfers, kinds=("transfer", "transfer"))
    assert turned["regressions"] == 0 and turned["improvements"] == 1
    assert compare(transfers, transfers, kinds=("transfer",) * 2)["regressions"] == 0


def replayed(hit_rate: float, **fields) -> dict:
    row = {
        "policy": "lru", "predictor": "none", "prefetch": "off", "budget": "25%",
        "link_bytes_per_s": 1e9, "cache": "warm", "hit_rate": hit_rate, "bytes_per_token": 10.0,
        "stall_s_per_token": 0.0, "tokens_per_second": 5.0, "fingerprint": "a", "device": "cpu",
        "model_shape": "nano", "format": "bf16",
    }  # fmt: skip
    settings = {"split": "test", "prompt_tokens": 4, "prompts": "", "tokens": 9, "documents": 2,
                "seed": 0}  # fmt: skip
    surroundings = environment().ended().as_dict()
    return {"environment": surroundings, "settings": settings | fields, "rows": [row]}


def test_replayed_figures_have_no_noise():
    kinds = ("hit-rate", "hit-rate")
    found = compare(replayed(0.50), replayed(0.48), kinds=kinds)
    assert found["regressions"] == 1
    assert compare(replayed(0.50), replayed(0.499), kinds=kinds)["regressions"] == 0
    assert compare(replayed(0.50), replayed(0.499), kinds=kinds, least=0)["regressions"] == 1


def test_results_of_other_subjects_do_not_compare():
    kinds = ("hit-rate", "hit-rate")
    with pytest.raises(InvalidDataError, match="tokens was 9, is 10"):
        compare(replayed(0.5), replayed(0.5, tokens=10), kinds=kinds)
    other = replayed(0.5)
    other["rows"][0]["fingerprint"] = "b"
    with pytest.raises(InvalidDataError, match="different fingerprint"):
        compare(replayed(0.5), other, kinds=kinds)
    with pytest.raises(InvalidDataError, match="do not compare"):
        compare(replayed(0.5), replayed(0.5), kinds=("hit-rate", "decode"))


def test_compare_ends_with_one_for_a_regression(transfers, tmp_path):
    slower = copy.deepcopy(transfers)
    for row in slower["rows"]:
        row["gb_per_s"] *= 0.01
        row["spread"] |= {"low": row["gb_per_s"], "high": row["gb_per_s"]}
    a, b = saved(tmp_path, "a.json", transfers), saved(tmp_path, "b.json", slower)
    same = CliRunner().invoke(app, ["bench", "compare", str(a), str(a)])
    assert same.exit_code == 0 and "0 regressions" in same.stdout
    worse = CliRunner().invoke(app, ["bench", "compare", str(a), str(b)])
    assert worse.exit_code == 1 and "8 regressions" in worse.stdout
    absent = CliRunner().invoke(app, ["bench", "compare", str(a), str(tmp_path / "c.json")])
    assert absent.exit_code == 2 and "Traceback" not in absent.output


def test_report_holds_everything_in_one_file(transfers, fits, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    saved(results, "t.json", transfers)
    saved(results, "f.json", fits)
    page = write_report([results], tmp_path / "report.html").read_text()
    assert page.count("<section") == 2 and "data:image/png;base64," in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert "simulated" in page and "NVIDIA RTX 3090" in page
    with pytest.raises(UsageError, match=r"no \.json"):
        write_report([tmp_path / "results" / ".."], tmp_path / "x.html")
    with pytest.raises(OutriderError, match="cannot be written"):
        write_report([results], Path("/proc/nowhere/report.html"))


def test_tables_are_markdown_too(fits):
    (one,) = table("fit", fits)
    lines = markdown(one).splitlines()
    assert len(lines) == 2 + 3 and all(line.count("|") == lines[0].count("|") for line in lines)
    assert "SIMULATED" in one.caption


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"media": ("tape",)}, "tape"),
        ({"media": ("link",)}, "no CUDA device"),
        ({"blocks": (1000,)}, "multiples of 4096"),
        ({"blocks": (1 << 30,)}, "up to"),
        ({"depths": (0,)}, "depth"),
        ({"file": Path("/nowhere/file")}, "not there"),
    ],
)
def test_transfers_that_cannot_be_are_refused(fields, said):
    with pytest.raises(UsageError, match=said):
        bench_transfer(TransferOptions(**fields), progress=silent)


def test_transfer_says_how_much_room_is_missing(monkeypatch, tmp_path):
    class Full:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr("os.statvfs", lambda folder: Full)
    with pytest.raises(OutriderError, match=r"takes 256.* MiB and 4.* KiB are free"):
        bench_transfer(TransferOptions(folder=tmp_path), progress=silent)


def test_structs_and_rows_agree_on_optional_fields():
    for kind in KINDS.values():
        assert issubclass(kind, msgspec.Struct)
        assert "rows" in kind.__struct_fields__


def test_tables_of_a_page_are_renewed_between_their_marks(transfers, fits, tmp_path):
    saved(tmp_path, "fit.json", fits)
    page = (
        "before\n<!-- bench: fit -->\nold\n<!-- end of bench: fit -->\n"
        "<!-- bench: transfer -->\nkept\n<!-- end of bench: transfer -->\nafter\n"
    )
    new, done = rewritten(page, tmp_path)
    assert done == ["fit"] and "old" not in new and "kept" in new
    assert new.startswith("before\n") and new.endswith("after\n")
    assert "**Simulated**" in new and "NVIDIA RTX 3090" in new
    assert rewritten(new, tmp_path)[0] == new
    saved(tmp_path, "fit.json", transfers)
    with pytest.raises(SystemExit, match="not fit"):
        rewritten(page, tmp_path)


def decoded(*rows: dict) -> dict:
    """A `bench decode` document with these fields in its rows."""
    spread = {"low": 0.5, "high": 2.0, "confidence": 0.9, "count": 3}
    surroundings = environment().ended().as_dict()
    workload = {"kind": "text", "prompts": "/srv/somebody/texts.txt", "passages": ["a"],
                "prompt_tokens": [4], "tokens": 8}  # fmt: skip
    common = {
        "arm": "on-demand", "format": "int8", "budget": "25%", "tokens_per_second": 1.0,
        "spread": spread, "ttft_s": 0.1, "bytes_per_token": 1e6, "hit_rate": 0.5, "late_rate": 0.0,
        "stall_s_per_token": 0.0, "roofline_tokens_per_second": 4.0, "roofline_share": 0.25,
        "rss_peak_bytes": 1, "outside_products_share": None, "cache": "warm", "repetitions": 3,
        "ratio": {"to": "on-demand", "median": 1.0, **spread}, "wasted_bytes_per_token": 0.0,
        "active_bytes_per_token": 2e6, "lru_missed_bytes_per_token": 1e6, "expert_bytes": 1000,
        "read_bytes_per_s": 10e9, "link_bytes_per_s": 1e9, "token_agreement": 1.0,
        "memory_limit_bytes": None, "memory_fence": "none", "link_limit_bytes_per_s": None,
        "storage_bytes_per_token": 3e6, "model": "/srv/somebody/model", "predictor": "none",
        "device": "cpu", "threads": 2, "fingerprint": "f", "seed": 0, "workload": workload,
        **environment().stamp(),
    }  # fmt: skip
    lines = [{"arm": "prefetch:/srv/somebody/statistics, 25%", "token": 1, "tokens": 2,
              "seconds": 0.1, "simulated": False, "events": []}]  # fmt: skip
    return {
        "environment": surroundings,
        "workload": workload,
        "rows": [common | row for row in rows],
        "timelines": lines,
    }


def test_results_are_published_together_and_without_paths(tmp_path, monkeypatch, fits):
    monkeypatch.setattr("publish.DOCS", tmp_path)
    limited = decoded(
        {"memory_limit_bytes": 2_500_000_000},
        {"arm": "prefetch:/srv/somebody/statistics", "predictor": "/srv/somebody/statistics"},
        {"arm": "llama.cpp", "format": "q8_0", "token_agreement": 0.9, "hit_rate": None,
         "ratio": {"to": "on-demand", "median": 0.1, "low": 0.08, "high": 0.125}},
    )  # fmt: skip
    resident = decoded({"arm": "resident", "budget": "all", "format": "int4"})
    saved(tmp_path, "limited.json", limited)
    saved(tmp_path, "int4.json", resident)
    assert publish([str(tmp_path), "others", "limited", "int4"]) == 0
    text = (tmp_path / "others.json").read_text()
    assert "/srv" not in text and "somebody" not in text
    kind, document = read(tmp_path / "others.json")
    assert kind == "decode"
    assert [row["arm"] for row in document["rows"]] == [
        "on-demand", "prefetch:statistics", "llama.cpp", "resident",
    ]  # fmt: skip
    assert document["timelines"][0]["arm"] == "prefetch:statistics, 25%"
    assert (tmp_path / "others.png").read_bytes().startswith(b"\x89PNG")

    page = "<!-- bench: others -->\n<!-- end of bench: others -->\n"
    new, done = rewritten(page, tmp_path)
    assert done == ["others"]
    lines = new.splitlines()
    (other,) = [line for line in lines if line.startswith("| llama.cpp |")]
    # Ten times as fast where it reaches a tenth; its interval turned over with it.
    assert "| 10.00 (8.00-12.50) |" in other and "| 90 % |" in other and "| q8_0 |" in other
    assert "| 2.50 |" in next(line for line in lines if line.startswith("| on-demand |"))
    assert lines.index("within a limit:") < lines.index("all resident, no limit:")

    saved(tmp_path, "fit.json", fits)
    with pytest.raises(SystemExit, match="not decode"):
        publish([str(tmp_path), "others", "fit"])
    assert publish(["only one"]) == 2
