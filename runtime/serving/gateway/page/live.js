// Asks the gateway for its figures once a second and shows them. All rates are differences of
// counters between two answers, so a page that was asleep shows a mean, never a jump.

import { drawChart } from "./chart.js";
import { ExpertMap } from "./map.js";

const SECONDS = 120;
const PERIOD_MS = 1000;
const TIMEOUT_MS = 5000;
// Tiles are means over this long, so that they can be read.
const TILE_SECONDS = 5;
// Nothing is known of what happened between answers further apart than this.
const GAP_SECONDS = 6;

const by = (id) => document.getElementById(id);
const map = new ExpertMap(by("experts-map"), by("map-note"));
const answers = [];
let points = [];
let latest = null;

function rates(from, to) {
  const seconds = to.at - from.at;
  if (seconds <= 0 || to.boot !== from.boot) return null;
  const risen = (pick) => Math.max(0, pick(to) - pick(from));
  const tokens = risen((one) => one.generation_tokens);
  const lookups = {};
  for (const result of ["hit", "late", "miss"]) lookups[result] = risen((one) => one.lookups[result]);
  const all = lookups.hit + lookups.late + lookups.miss;
  return {
    tokensPerSecond: tokens / seconds,
    bytesPerToken: tokens ? risen((one) => one.transfer_bytes) / tokens : null,
    stallShare: risen((one) => one.stall_s) / seconds,
    hitRate: all ? lookups.hit / all : null,
    lookups, all,
  };
}

function bytes(count) {
  for (const [size, unit] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (count >= size) return `${(count / size).toPrecision(3)} ${unit}`;
  }
  return `${Math.round(count)} B`;
}

const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;

function duration(seconds) {
  const days = Math.floor(seconds / 86400), hours = Math.floor(seconds / 3600) % 24, minutes = Math.floor(seconds / 60) % 60;
  return days ? `${days} d ${hours} h` : hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

function show(id, text) {
  const place = by(id);
  if (place.textContent !== text) place.textContent = text;
}

function setState(state, notice) {
  by("state").dataset.state = state;
  show("state", state);
  by("notice").hidden = !notice;
  show("notice", notice ?? "");
}

function take(answer) {
  answer.at = performance.now() / 1000;
  if (answers.length && answers.at(-1).boot !== answer.boot) {
    answers.length = 0;
    points.push({ at: answer.at });
  }
  answers.push(answer);
  while (answers.length > 2 && answers[1].at < answer.at - TILE_SECONDS) answers.shift();
  if (answers.length > 1) {
    if (answer.at - answers.at(-2).at > GAP_SECONDS) points.push({ at: answer.at });
    const now = rates(answers.at(-2), answer);
    const share = (count) => (now.all ? 100 * count / now.all : null);
    points.push({
      at: answer.at, line: now.tokensPerSecond, running: answer.running, waiting: answer.waiting,
      hit: share(now.lookups.hit), late: share(now.lookups.late), miss: share(now.lookups.miss),
    });
    points = points.filter((point) => point.at >= answer.at - SECONDS - 10);
    const mean = rates(answers[0], answer);
    show("tokens-per-second", mean.tokensPerSecond.toFixed(mean.tokensPerSecond < 10 ? 1 : 0));
    show("hit-rate", mean.hitRate === null ? "–" : percent(mean.hitRate));
    show("bytes-per-token", mean.bytesPerToken === null ? "–" : bytes(mean.bytesPerToken));
    show("stall", percent(Math.min(1, mean.stallShare)));
  }
  show("running", String(answer.running));
  show("waiting", String(answer.waiting));
  show("model", answer.model);
  show("uptime", answer.uptime_s === null ? "" : `Server up for ${duration(answer.uptime_s)}.`);
  const state = !answer.is_ready ? "not ready" : answer.is_degraded ? "degraded" : "ready";
  setState(state, answer.notice);
  latest = answer;
}

function draw() {
  const now = performance.now() / 1000;
  const common = { seconds: SECONDS, now };
  drawChart(by("tokens-chart"), points, { ...common, series: ["line"] });
  drawChart(by("queue-chart"), points, { ...common, series: ["running", "waiting"], isWhole: true, least: 4 });
  drawChart(by("lookups-chart"), points, { ...common, series: ["hit", "late", "miss"], isStacked: true, top: 100, unit: "%" });
  if (latest !== null) {
    by("tokens-chart").setAttribute("aria-label", `tokens per second, now ${by("tokens-per-second").textContent}`);
    by("queue-chart").setAttribute("aria-label", `${latest.running} requests running, ${latest.waiting} waiting`);
    by("lookups-chart").setAttribute("aria-label", `hit rate of expert look-ups, now ${by("hit-rate").textContent}`);
    if (latest.residency !== null) map.draw(latest.residency);
  }
}

async function ask() {
  const response = await fetch("stats", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error?.message ?? `the gateway answered ${response.status}`);
  return answer;
}

async function tick() {
  if (!document.hidden) {
    try {
      take(await ask());
    } catch (error) {
      points.push({ at: performance.now() / 1000 });
      setState("no server", error.name === "TimeoutError" ? "the gateway does not answer" : error.message);
    }
    draw();
    document.body.dataset.updates = Number(document.body.dataset.updates ?? 0) + 1;
  }
  setTimeout(tick, PERIOD_MS);
}

new ResizeObserver(draw).observe(document.querySelector("main"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
document.addEventListener("visibilitychange", () => { if (!document.hidden) draw(); });
tick();
