// Draws one chart over time on a canvas: lines, or areas stacked upon each other.
// Knows neither where the numbers come from nor what they mean.

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// A canvas of as many device pixels as it is shown with, and its context in CSS pixels.
export function prepared(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [columns, rows] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== columns || canvas.height !== rows) {
    canvas.width = columns;
    canvas.height = rows;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

// The least of 1, 2, 5 times a power of ten that four steps of reach `highest`.
function step(highest) {
  const least = Math.max(highest, 1e-9) / 4;
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= least * 0.999);
}

function label(value) {
  if (value >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (value >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return `${+value.toPrecision(3)}`;
}

const LEFT = 44, RIGHT = 8, TOP = 6, BOTTOM = 20;

// points: [{at (seconds), [series]: number or null}], oldest first. A null is a gap.
export function drawChart(canvas, points, { series, seconds, now, isStacked = false, top = null, least = 1, unit = "", isWhole = false }) {
  const { width, height } = canvas.getBoundingClientRect();
  const context = prepared(canvas, width, height);
  const plotWidth = width - LEFT - RIGHT, plotHeight = height - TOP - BOTTOM;
  const seen = points.filter((point) => point.at >= now - seconds);
  const total = (point) => series.reduce((sum, name) => isStacked ? sum + (point[name] ?? 0) : Math.max(sum, point[name] ?? 0), 0);
  const highest = top ?? Math.max(least, ...seen.map(total));
  let size = step(highest);
  if (isWhole) size = Math.max(1, Math.round(size));
  const limit = top ?? Math.ceil(highest / size - 1e-9) * size;
  const x = (at) => LEFT + plotWidth * (1 - (now - at) / seconds);
  const y = (value) => TOP + plotHeight * (1 - value / limit);

  context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  context.lineWidth = 1;
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (let value = 0; value <= limit * 1.001; value += size) {
    const place = Math.round(y(value)) + 0.5;
    context.strokeStyle = colour("rule");
    context.beginPath();
    context.moveTo(LEFT, place);
    context.lineTo(width - RIGHT, place);
    context.stroke();
    context.fillStyle = colour("faint");
    context.fillText(label(value) + unit, LEFT - 6, place);
  }
  context.textBaseline = "alphabetic";
  for (const [share, text, align] of [[0, `${seconds} s ago`, "left"], [1, "now", "right"]]) {
    context.textAlign = align;
    context.fillText(text, LEFT + plotWidth * share, height - 5);
  }

  context.save();
  context.beginPath();
  context.rect(LEFT, TOP - 2, plotWidth, plotHeight + 3);
  context.clip();
  const runs = unbroken(seen, series);
  const below = new Map();
  for (const name of series) {
    for (const run of runs) {
      const tops = run.map((point) => (isStacked ? below.get(point) ?? 0 : 0) + point[name]);
      context.beginPath();
      run.forEach((point, i) => context.lineTo(x(point.at), y(tops[i])));
      if (isStacked) {
        for (let i = run.length - 1; i >= 0; i--) context.lineTo(x(run[i].at), y(below.get(run[i]) ?? 0));
        context.fillStyle = colour(name);
        context.fill();
        run.forEach((point, i) => below.set(point, tops[i]));
      } else {
        context.strokeStyle = colour(name);
        context.lineWidth = 2;
        context.lineJoin = "round";
        context.stroke();
      }
    }
  }
  context.restore();
}

// Stretches of points in which every series has a value.
function unbroken(points, series) {
  const runs = [];
  let run = null;
  for (const point of points) {
    if (series.some((name) => point[name] == null)) {
      run = null;
    } else {
      if (run === null) runs.push(run = []);
      run.push(point);
    }
  }
  return runs;
}
