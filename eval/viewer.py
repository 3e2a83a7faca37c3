"""Clouds that a browser turns: a piece of a page, which loads nothing.

The page is whole before the script runs: headings, captions and legends are there for a reader of
any kind, and the script only draws.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["STYLE", "Paint", "Scene", "View", "viewer"]

MOST_POINTS = 8_000
"""Of a cloud, so that it turns smoothly and the page stays small."""

MOST_NAMES = 16
"""In a legend; of more, about half as many are shown, spread evenly."""


class Paint(NamedTuple):
    """Colours of N points.

    Attributes:
        name: What they show.
        shade: ``(N,)`` int64 from 0, the colour of each point.
        colours: As ``#rrggbb``.
        labels: What each colour stands for; empty where that needs no word.
    """

    name: str
    shade: Tensor
    colours: Sequence[str]
    labels: Sequence[str] = ()


class View(NamedTuple):
    """One way to look at a scene; ``points`` and ``paint`` are places in its lists.

    A note that holds ✓ or ✗ is a verdict.
    """

    caption: str
    points: int
    paint: int
    note: str = ""


class Scene(NamedTuple):
    """An object of N points.

    Attributes:
        title: Above it.
        points: Clouds ``(N, 3)``, z-up.
        paints: The first with labels makes the legend; pointing at a point tells all that have.
        views: Side by side.
    """

    title: str
    points: Sequence[Tensor]
    paints: Sequence[Paint]
    views: Sequence[View]


def viewer(scenes: Sequence[Scene], note: str = "") -> str:
    """HTML for the body of a page whose head holds :data:`STYLE`; the note stands above."""
    data = json.dumps([_data(scene) for scene in scenes]).replace("<", "\\u003c")
    sections = "\n".join(_section(scene, place) for place, scene in enumerate(scenes))
    wide = any(len(scene.views) > 2 for scene in scenes)
    scenes_html = f'<div class="scenes{" wide" if wide else ""}">\n{sections}\n</div>'
    return HELP.replace("@NOTE@", html.escape(note)) + scenes_html + SCRIPT.replace("@DATA@", data)


def _section(scene: Scene, place: int) -> str:
    title = html.escape(scene.title)
    figures = "".join(
        f'<figure><canvas role="img" aria-label="{title}, {html.escape(_plain(view))}"></canvas>'
        f"<figcaption>{_caption(view)}</figcaption></figure>"
        for view in scene.views
    )
    return (
        f'<section class="scene"><h3>{title}</h3>{_legend(scene)}'
        f'<div class="views" data-scene="{place}" role="group" tabindex="0" '
        f'aria-label="{title}" aria-describedby="turning">{figures}</div></section>'
    )


def _plain(view: View) -> str:
    caption = view.caption.replace("\n", " ")
    spoken = view.note.replace("✓", "rightly").replace("✗", "wrongly")
    return f"{caption}; {spoken}" if spoken else caption


def _caption(view: View) -> str:
    kind = "right" if "✓" in view.note else "wrong" if "✗" in view.note else ""
    note = f'<br><span class="{kind}">{html.escape(view.note)}</span>' if view.note else ""
    return html.escape(view.caption) + note


def _legend(scene: Scene) -> str:
    named = next((paint for paint in scene.paints if paint.labels), None)
    if named is None:
        return ""
    present: list[int] = sorted(set(named.shade.tolist()))
    step = 1 if len(present) <= MOST_NAMES else -(-len(present) // (MOST_NAMES // 2))
    entries = "".join(
        f'<li><i style="background:{named.colours[i]}"></i>{html.escape(named.labels[i])}</li>'
        for i in present[::step]
    )
    return f'<ul class="legend">{entries}</ul>'


def _data(scene: Scene) -> dict[str, Any]:
    step = -(-len(scene.points[0]) // MOST_POINTS)
    clouds = [cloud[::step].detach().cpu().double() for cloud in scene.points]
    clouds = [cloud - (cloud.amin(dim=0) + cloud.amax(dim=0)) / 2 for cloud in clouds]
    size = max(float(cloud.norm(dim=1).max()) for cloud in clouds) or 1.0
    return {
        "points": [_packed(cloud / size * 32767) for cloud in clouds],
        "paints": [
            {
                "name": paint.name,
                "shade": _packed(paint.shade[::step]),
                "colours": list(paint.colours),
                "labels": list(paint.labels),
            }
            for paint in scene.paints
        ],
        "views": [[view.points, view.paint] for view in scene.views],
    }


def _packed(values: Tensor) -> str:
    """As base64 of little-endian int16."""
    return base64.b64encode(torch.round(values).numpy().astype("<i2").tobytes()).decode()


STYLE = """
  .scene { margin: 0 0 1.2rem; }
  .views { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .5rem;
           border-radius: 4px; }
  .scenes { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr));
            gap: 0 1.5rem; }
  .scenes.wide { grid-template-columns: 1fr; }
  canvas { width: 100%; aspect-ratio: 1; display: block; cursor: grab; touch-action: pan-y; }
  .legend { margin: 0; padding: 0; list-style: none; }
  .legend li { display: inline-block; margin-right: 1em; white-space: nowrap; }
  .legend i { display: inline-block; width: .8em; height: .8em; border-radius: 50%;
              margin-right: .35em; }
  .right, .wrong { white-space: nowrap; }
  .right { color: #0072b2; } .wrong { color: #b04a00; }
  #tip { position: fixed; pointer-events: none; display: none; padding: .2em .5em; color: #fff;
         background: #24292f; border-radius: 4px; white-space: pre; }
"""

HELP = """<p id="turning">Drag to turn all clouds together, or tab to one and use the arrow keys;
+ and − or Ctrl and the wheel zoom; double-click or Home to begin again.
@NOTE@</p>
<noscript><p>Clouds are drawn by a script, and scripts are off here.</p></noscript>
<div id="tip" role="tooltip"></div>
"""

SCRIPT = r"""
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const START = { azimuth: -55, elevation: 22, zoom: 1 };
const eye = { ...START };
const tip = document.getElementById("tip");

function unpack(text) {
  return new Int16Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

const scenes = JSON.parse(document.getElementById("data").textContent).map((scene) => ({
  ...scene,
  points: scene.points.map(unpack),
  paints: scene.paints.map((paint) => ({
    ...paint,
    shade: unpack(paint.shade),
    rgb: paint.colours.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16))),
  })),
}));

const panels = [...document.querySelectorAll(".views")].flatMap((group) => {
  const scene = scenes[group.dataset.scene];
  return [...group.querySelectorAll("canvas")].map((canvas, i) => {
    const [points, paint] = scene.views[i];
    return { canvas, scene, xyz: scene.points[points], paint: scene.paints[paint], seen: true };
  });
});

// rows: right, up, towards the eye
function view() {
  const a = eye.azimuth * Math.PI / 180, e = eye.elevation * Math.PI / 180;
  const [ca, sa, ce, se] = [Math.cos(a), Math.sin(a), Math.cos(e), Math.sin(e)];
  return [-sa, ca, 0, -se * ca, -se * sa, ce, ce * ca, ce * sa, se];
}

function draw(panel, m) {
  const { canvas, xyz, paint } = panel;
  const size = Math.max(1, Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)));
  if (canvas.width !== size) canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  const depth = new Float32Array(size * size).fill(-Infinity);
  panel.nearest = new Int32Array(size * size).fill(-1);
  const count = paint.shade.length;
  const scale = 0.48 * size * eye.zoom / 32767;
  const thin = Math.min(1, Math.sqrt(1024 / count));
  const radius = Math.max(0.8, size / 110 * Math.sqrt(eye.zoom) * thin);
  for (let i = 0; i < count; i++) {
    const [x, y, z] = [xyz[3 * i], xyz[3 * i + 1], xyz[3 * i + 2]];
    const right = size / 2 + scale * (m[0] * x + m[1] * y + m[2] * z);
    const down = size / 2 - scale * (m[3] * x + m[4] * y + m[5] * z);
    const near = (m[6] * x + m[7] * y + m[8] * z) / 32767;
    const pale = Math.min(0.55, Math.max(0, 0.28 * (1 - near)));
    const colour = paint.rgb[paint.shade[i]].map((c) => c + (255 - c) * pale);
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
    panels.filter((panel) => panel.seen).forEach((panel) => draw(panel, m));
  });
}

function turn(right, up) {
  eye.azimuth -= right;
  eye.elevation = Math.max(-90, Math.min(90, eye.elevation + up));
  redraw();
}

function zoom(factor) {
  eye.zoom = Math.max(0.5, Math.min(8, eye.zoom * factor));
  redraw();
}

function restart() {
  Object.assign(eye, START);
  redraw();
}

const KEYS = {
  ArrowLeft: () => turn(-10, 0), ArrowRight: () => turn(10, 0),
  ArrowUp: () => turn(0, -10), ArrowDown: () => turn(0, 10),
  "+": () => zoom(1.2), "=": () => zoom(1.2), "-": () => zoom(1 / 1.2), Home: restart,
};

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

function tell(panel, event) {
  const named = panel.scene.paints.filter((paint) => paint.labels.length);
  const i = named.length ? pick(panel, event.offsetX, event.offsetY) : -1;
  if (i < 0) return;
  tip.textContent = named.map((p) => `${p.name}: ${p.labels[p.shade[i]]}`).join("\n");
  tip.style.left = `${event.clientX + 12}px`;
  tip.style.top = `${event.clientY + 12}px`;
  tip.style.display = "block";
}

for (const panel of panels) {
  const { canvas } = panel;
  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    tip.style.display = "none";
    if (event.buttons) turn(event.movementX * 0.5, event.movementY * 0.5);
    else tell(panel, event);
  });
  canvas.addEventListener("pointerleave", () => { tip.style.display = "none"; });
  canvas.addEventListener("dblclick", restart);
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return; // or the page could not be scrolled
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * 0.001));
  }, { passive: false });
}
for (const group of document.querySelectorAll(".views")) {
  group.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || !KEYS[event.key]) return;
    event.preventDefault();
    KEYS[event.key]();
  });
}
// what is out of sight need not follow; paper sees all
const watch = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    panels.find((panel) => panel.canvas === target).seen = isIntersecting;
  }
  redraw();
});
panels.forEach(({ canvas }) => watch.observe(canvas));
window.addEventListener("beforeprint", () => panels.forEach((panel) => draw(panel, view())));
window.addEventListener("resize", redraw);
panels.forEach((panel) => draw(panel, view()));
</script>
"""
