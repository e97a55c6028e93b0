// Draws which experts are in memory: a row a layer, a column an expert, and says which one is pointed at.

import { colour, prepared } from "./chart.js";

const STATES = ["absent", "loading", "resident", "fetched"];
const WORDS = ["on disk", "loading", "resident", "just fetched"];
const LEFT = 30, TOP = 18;

export class ExpertMap {
  constructor(canvas, note) {
    this.canvas = canvas;
    this.note = note;
    this.map = null;
    this.pointed = null;
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerdown", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => { this.pointed = null; this.say(); });
  }

  // {layers, experts, states}: a string of digits, a state each, layer after layer.
  draw(map) {
    this.map = map;
    const { layers, experts, states } = map;
    const available = this.canvas.parentElement.clientWidth - LEFT - 2;
    // Large enough for a finger where there is room, never so small that a cell vanishes.
    this.cell = Math.max(4, Math.min(36, Math.floor(available / experts)));
    this.tall = Math.max(4, Math.min(22, Math.ceil(this.cell * 0.8), Math.floor(560 / layers)));
    const width = LEFT + experts * this.cell + 2, height = TOP + layers * this.tall + 2;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const context = prepared(this.canvas, width, height);
    const gap = this.cell >= 8 ? 2 : 1, rowGap = this.tall >= 8 ? 2 : 1;
    const colours = STATES.map(colour);
    for (let layer = 0; layer < layers; layer++) {
      for (let expert = 0; expert < experts; expert++) {
        context.fillStyle = colours[+states[layer * experts + expert]] ?? colours[0];
        context.fillRect(LEFT + expert * this.cell, TOP + layer * this.tall, this.cell - gap, this.tall - rowGap);
      }
    }
    context.fillStyle = colour("faint");
    context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const everyLayer = Math.ceil(14 / this.tall);
    for (let layer = 0; layer < layers; layer += everyLayer) {
      context.fillText(layer, LEFT - 6, TOP + (layer + 0.5) * this.tall);
    }
    context.textAlign = "center";
    const everyExpert = [1, 2, 4, 5, 8, 10, 16, 32, 64, 128].find((n) => n * this.cell >= 30) ?? 256;
    for (let expert = 0; expert < experts; expert += everyExpert) {
      context.fillText(expert, LEFT + (expert + 0.5) * this.cell, TOP / 2);
    }
    const counts = this.counts();
    this.canvas.setAttribute("aria-label", `${counts[2] + counts[3]} of ${layers * experts} experts in memory, ${counts[3]} just fetched, ${counts[1]} loading`);
    this.say();
  }

  counts() {
    const counts = [0, 0, 0, 0];
    for (const digit of this.map.states) counts[+digit] += 1;
    return counts;
  }

  point(event) {
    if (this.map === null) return;
    const box = this.canvas.getBoundingClientRect();
    const expert = Math.floor((event.clientX - box.left - LEFT) / this.cell);
    const layer = Math.floor((event.clientY - box.top - TOP) / this.tall);
    const isInside = layer >= 0 && layer < this.map.layers && expert >= 0 && expert < this.map.experts;
    this.pointed = isInside ? { layer, expert } : null;
    this.say();
  }

  say() {
    if (this.map === null) return;
    const { layers, experts, states } = this.map;
    if (this.pointed !== null && this.pointed.layer < layers && this.pointed.expert < experts) {
      const { layer, expert } = this.pointed;
      this.note.textContent = `Layer ${layer}, expert ${expert}: ${WORDS[+states[layer * experts + expert]]}`;
      return;
    }
    const counts = this.counts();
    this.note.textContent = `Rows are ${layers} layers, columns ${experts} experts; ${counts[2] + counts[3]} of ${layers * experts} are in memory.`;
  }
}
