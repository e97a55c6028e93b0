"""The live page in a real, headless browser: it renders, it follows, nothing is complained of."""

import base64

import browser
import pytest
from scripted_client import NUM_EXPERTS, NUM_LAYERS, ScriptedClient, make_stats
from served_gateway import run_gateway

from outrider.runtime.serving.conversation import ConnectionLost
from outrider.runtime.serving.gateway.keys import ApiKeys

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium is installed")

CELLS = NUM_LAYERS * NUM_EXPERTS
# Two answers have come, so that there are rates.
SHOWN = "document.getElementById('hit-rate').textContent.endsWith('%')"


def growing(count):
    """Ten tokens, eight look-ups and another expert fetched at each answer."""
    residency = bytearray([2] * (CELLS // 2) + [0] * (CELLS - CELLS // 2))
    residency[-1] = 3
    residency[-2] = 1
    return make_stats(
        requests_running=3,
        requests_waiting=count,
        generation_tokens_total=10 * count,
        expert_lookups_total={"hit": 6 * count, "late": count, "miss": count},
        expert_transfer_bytes_total={"on_demand": 2048 * count, "prefetch": 2048 * count},
        residency=bytes(residency),
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture
def opened(page):
    with run_gateway(ScriptedClient(stats_answers=growing)) as gateway:
        page.problems.clear()
        page.resize(1280, 900)
        page.open(gateway.url + "/")
        yield gateway
        page.open("about:blank#left")


def text(page, id):
    return page.evaluate(f"document.getElementById('{id}').textContent")


def test_it_shows_what_the_server_says_and_follows_it(page, opened):
    page.until(SHOWN)
    assert text(page, "model") == "nano" and text(page, "state") == "ready"
    assert text(page, "running") == "3"
    assert float(text(page, "tokens-per-second")) > 0
    # 6 of 8, and (2048 + 2048) / 10 bytes a token, whatever the time between two answers.
    assert text(page, "hit-rate") == "75 %" and text(page, "bytes-per-token") == "410 B"
    waiting = int(text(page, "waiting"))
    page.until(f"Number(document.getElementById('waiting').textContent) > {waiting}")
    assert page.problems == []


def test_the_charts_are_drawn_in_their_colours(page, opened):
    # Pixels of each series' colour; anti-aliased edges have others.
    counts = page.until("""(() => {
      const probe = document.createElement("canvas").getContext("2d");
      const colour = (name) => {
        probe.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--" + name);
        probe.fillRect(0, 0, 1, 1);
        return probe.getImageData(0, 0, 1, 1).data;
      };
      const count = (id, name) => {
        const canvas = document.getElementById(id), [r, g, b] = colour(name);
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        let found = 0;
        for (let i = 0; i < data.length; i += 4) {
          found += data[i] === r && data[i + 1] === g && data[i + 2] === b;
        }
        return found;
      };
      const counts = {
        hit: count("lookups-chart", "hit"), late: count("lookups-chart", "late"),
        miss: count("lookups-chart", "miss"), running: count("queue-chart", "running"),
        line: count("tokens-chart", "line"), resident: count("experts-map", "resident"),
        fetched: count("experts-map", "fetched"), loading: count("experts-map", "loading"),
        absent: count("experts-map", "absent"),
      };
      return Object.values(counts).every((found) => found > 0) && counts;
    })()""")
    # Areas are shares, 6 to 1 to 1, less what is blended at the edges of a narrow one. Cells:
    # 12 resident, 1 fetched, 1 loading, 10 absent.
    assert 3 < counts["hit"] / counts["late"] < 9
    assert 3 < counts["hit"] / counts["miss"] < 9
    assert counts["resident"] == 12 * counts["fetched"] == 12 * counts["loading"]
    assert counts["absent"] == 10 * counts["fetched"]


def test_an_expert_that_is_pointed_at_is_named(page, opened):
    page.until(SHOWN)
    assert "14 of 24" not in text(page, "map-note") and "13 of 24" in text(page, "map-note")
    box = page.evaluate("(() => { const b = document.getElementById('experts-map')"
                        ".getBoundingClientRect(); return [b.right, b.bottom]; })()")  # fmt: skip
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] - 8, y=box[1] - 8)
    page.until("document.getElementById('map-note').textContent.startsWith('Layer')")
    last = f"Layer {NUM_LAYERS - 1}, expert {NUM_EXPERTS - 1}: just fetched"
    assert text(page, "map-note") == last


@pytest.mark.parametrize("is_dark", [False, True])
def test_a_phone_shows_it_all_without_scrolling_sideways(page, opened, is_dark):
    page.resize(360, 700, is_dark=is_dark)
    page.until(SHOWN)
    assert page.evaluate("document.documentElement.scrollWidth <= 360")
    assert page.evaluate("document.querySelector('.charts canvas').clientWidth > 250")
    assert page.problems == []


def test_a_server_that_goes_and_comes_again_is_told(page, opened):
    page.until(SHOWN)
    opened.upstream.failure = ConnectionLost("nobody answers there")
    page.until("document.getElementById('state').textContent === 'no server'")
    assert "nobody answers there" in text(page, "notice")
    opened.upstream.failure = None
    page.until("document.getElementById('state').textContent === 'ready'")
    assert page.evaluate("document.getElementById('notice').hidden")


def test_text_of_the_server_is_shown_as_text(page, opened):
    opened.upstream.failure = ConnectionLost("<img src=x onerror=document.title='run'>")
    page.until("document.getElementById('notice').textContent.includes('<img')")
    assert page.evaluate("document.title") == "outrider"
    assert page.evaluate("document.querySelector('#notice img') === null")


def test_a_browser_that_was_given_the_key_gets_everything(page):
    key = "correct-horse-battery"
    with run_gateway(ScriptedClient(stats_answers=growing), keys=ApiKeys([key])) as gateway:
        page.problems.clear()
        # What a browser sends once somebody has typed the key into its dialogue.
        sent = "Basic " + base64.b64encode(f":{key}".encode()).decode()
        page.call("Network.setExtraHTTPHeaders", headers={"Authorization": sent})
        page.open(gateway.url + "/")
        page.until(SHOWN)
        assert text(page, "state") == "ready" and page.problems == []
        page.call("Network.setExtraHTTPHeaders", headers={})
        page.open("about:blank#left")
