"""A page that shows clouds in a browser, turned by the mouse: one file that loads nothing."""

from __future__ import annotations

import html
import json
from typing import Any

__all__ = ["page"]


def page(title: str, data: dict[str, Any]) -> str:
    """The page as HTML.

    Args:
        title: Of the page.
        data: ``parts``, the names of all; and ``clouds``, each with ``title``, ``notes`` (two),
            ``first`` and ``colours`` of the parts of its class, and, as base64 of little-endian
            int16, ``received`` and ``canonical`` (N * 3, z-up, 32767 = 1), ``truth`` and ``found``
            (N parts, -1 for none).
    """
    script = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    return PAGE.replace("@TITLE@", html.escape(title)).replace("@DATA@", script)


PAGE = r"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>@TITLE@</title>
<style>
  body { margin: 0 auto; max-width: 1180px; padding: 1rem; color: #1b1f24; background: #fff;
         font: 14px/1.45 system-ui, sans-serif; }
  h1 { font-size: 1.15rem; margin: 0 0 .3rem; }
  h2 { font-size: 1rem; margin: 0; }
  p { margin: 0 0 .6rem; color: #57606a; }
  section { border-top: 1px solid #d8dee4; padding: .7rem 0; }
  .panels { display: grid; grid-template-columns: repeat(4, 1fr); gap: .5rem; }
  figure { margin: 0; }
  figcaption { color: #57606a; text-align: center; }
  canvas { width: 100%; aspect-ratio: 1; display: block; cursor: grab; touch-action: none; }
  .legend span { margin-right: 1em; white-space: nowrap; }
  .legend i { display: inline-block; width: .8em; height: .8em; border-radius: 50%;
              margin-right: .35em; }
  #tip { position: fixed; pointer-events: none; display: none; padding: .2em .5em; color: #fff;
         background: #24292fe6; border-radius: 4px; white-space: pre; }
</style>
<h1>@TITLE@</h1>
<p>Drag to turn, wheel to zoom, double-click to begin again; point at a point to see its part.</p>
<main></main>
<div id="tip"></div>
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const OTHER = "#222222", UNKNOWN = "#d0d4d8", RIGHT = "#d3d7db", WRONG = "#d62728";
const START = { azimuth: -55, elevation: 22, zoom: 1 };
const eye = { ...START };
const panels = [];

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Int16Array(bytes.buffer);
}

function element(tag, parent, text) {
  const made = parent.appendChild(document.createElement(tag));
  if (text !== undefined) made.textContent = text;
  return made;
}

function rgb(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

function name(part) {
  return part < 0 ? "none" : data.parts[part];
}

function show(cloud) {
  const truth = unpack(cloud.truth), found = unpack(cloud.found);
  const received = unpack(cloud.received), canonical = unpack(cloud.canonical);
  const own = (p) => p < 0 ? UNKNOWN : cloud.colours[p - cloud.first] ?? OTHER;
  const paint = (colour) => Array.from(truth, (t, i) => rgb(colour(t, found[i])));
  const byTruth = paint((t) => own(t));
  const wrong = (t, f) => t >= 0 && t !== f;
  const section = element("section", document.querySelector("main"));
  element("h2", section, cloud.title);
  const legend = element("div", section);
  legend.className = "legend";
  const last = cloud.colours.length - 1;
  cloud.colours.forEach((colour, i) => {
    if (last > 15 && i % Math.ceil(last / 8) && i < last) return;
    const entry = element("span", legend);
    element("i", entry).style.background = colour;
    entry.append(name(cloud.first + i));
  });
  const row = element("div", section);
  row.className = "panels";
  const faults = truth.filter((t, i) => wrong(t, found[i])).length;
  const share = `${Math.round(100 * faults / truth.length)} % wrong`;
  for (const [caption, xyz, colours] of [
    ["as received, truth" + (cloud.notes[0] && ` (${cloud.notes[0]})`), received, byTruth],
    ["canonical, truth", canonical, byTruth],
    [`canonical, found (${cloud.notes[1]})`, canonical, paint((t, f) => own(f))],
    [`errors (${share})`, canonical, paint((t, f) => (wrong(t, f) ? WRONG : RIGHT))],
  ]) {
    const figure = element("figure", row);
    const canvas = element("canvas", figure);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${cloud.title}: ${caption}`);
    element("figcaption", figure, caption);
    panels.push({ canvas, xyz, colours, truth, found });
  }
}

// rows: right, up, towards the eye
function view() {
  const a = eye.azimuth * Math.PI / 180, e = eye.elevation * Math.PI / 180;
  const [ca, sa, ce, se] = [Math.cos(a), Math.sin(a), Math.cos(e), Math.sin(e)];
  return [-sa, ca, 0, -se * ca, -se * sa, ce, ce * ca, ce * sa, se];
}

function draw(panel, m) {
  const { canvas, xyz, colours } = panel;
  const size = Math.max(1, Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)));
  if (canvas.width !== size) canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  const depth = new Float32Array(size * size).fill(-Infinity);
  panel.nearest = new Int32Array(size * size).fill(-1);
  const scale = 0.48 * size * eye.zoom / 32767;
  const thin = Math.min(1, Math.sqrt(1024 / colours.length));
  const radius = Math.max(0.8, size / 110 * Math.sqrt(eye.zoom) * thin);
  for (let i = 0; i < colours.length; i++) {
    const [x, y, z] = [xyz[3 * i], xyz[3 * i + 1], xyz[3 * i + 2]];
    const right = size / 2 + scale * (m[0] * x + m[1] * y + m[2] * z);
    const down = size / 2 - scale * (m[3] * x + m[4] * y + m[5] * z);
    const near = (m[6] * x + m[7] * y + m[8] * z) / 32767;
    const pale = Math.min(0.55, Math.max(0, 0.28 * (1 - near)));
    const colour = colours[i].map((c) => c + (255 - c) * pale);
    const [left, top] = [Math.ceil(right - radius), Math.ceil(down - radius)];
    for (let v = Math.max(0, top); v <= Math.min(size - 1, down + radius); v++) {
      for (let u = Math.max(0, left); u <= Math.min(size - 1, right + radius); u++) {
        const at = v * size + u;
        if ((u - right) ** 2 + (v - down) ** 2 > radius * radius || near <= depth[at]) continue;
        depth[at] = near;
        panel.nearest[at] = i;
        image.data.set(colour, 4 * at);
        image.data[4 * at + 3] = 255;
      }
    }
  }
  context.putImageData(image, 0, 0);
}

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    const m = view();
    panels.forEach((panel) => draw(panel, m));
  });
}

// the point drawn nearest to a place, or -1
function pick(panel, x, y) {
  const size = panel.canvas.width, ratio = size / panel.canvas.clientWidth;
  const [u, v, reach] = [Math.floor(x * ratio), Math.floor(y * ratio), Math.round(5 * ratio)];
  let found = -1, least = reach * reach + 1;
  for (let q = Math.max(0, v - reach); q <= Math.min(size - 1, v + reach); q++) {
    for (let p = Math.max(0, u - reach); p <= Math.min(size - 1, u + reach); p++) {
      const away = (p - u) ** 2 + (q - v) ** 2;
      if (panel.nearest[q * size + p] < 0 || away >= least) continue;
      [found, least] = [panel.nearest[q * size + p], away];
    }
  }
  return found;
}

function listen(panel) {
  const tip = document.getElementById("tip");
  const canvas = panel.canvas;
  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    tip.style.display = "none";
    if (event.buttons) {
      eye.azimuth -= event.movementX * 0.5;
      eye.elevation = Math.max(-90, Math.min(90, eye.elevation + event.movementY * 0.5));
      redraw();
      return;
    }
    const i = pick(panel, event.offsetX, event.offsetY);
    if (i < 0) return;
    tip.textContent = `truth ${name(panel.truth[i])}\nfound ${name(panel.found[i])}`;
    tip.style.left = `${event.clientX + 12}px`;
    tip.style.top = `${event.clientY + 12}px`;
    tip.style.display = "block";
  });
  canvas.addEventListener("pointerleave", () => { tip.style.display = "none"; });
  canvas.addEventListener("dblclick", () => { Object.assign(eye, START); redraw(); });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    eye.zoom = Math.max(0.5, Math.min(8, eye.zoom * Math.exp(-event.deltaY * 0.001)));
    redraw();
  }, { passive: false });
}

data.clouds.forEach(show);
panels.forEach(listen);
window.addEventListener("resize", redraw);
redraw();
</script>
</html>
"""
