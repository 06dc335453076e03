"""The page's own style and script. Nothing is loaded from anywhere, and no library is used."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --soft: #5b6470; --rule: #e3e6ea; --edge: #d9dde3;
  --warn: #8a4b00; --warn-back: #fff4e0; --warn-edge: #f0c987; --link: #1f5fbf;
  --c1: #1f5fbf; --c2: #c2410c; --c3: #0f7b6c; --c4: #8b3fb0;
  --c5: #9a6b00; --c6: #b3265e; --c7: #4a5a6a; --c8: #3f7d20;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2126; --ink: #e8ebef; --soft: #a2abb6; --rule: #2d333a; --edge: #343b43;
    --warn: #ffc978; --warn-back: #33270f; --warn-edge: #6b4f1b; --link: #7db0ff;
    --c1: #6fa8ff; --c2: #ff9a62; --c3: #4fd1bd; --c4: #cf92f0;
    --c5: #e5bd4f; --c6: #ff86ae; --c7: #b4c0cc; --c8: #9bd675;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 34px 0 4px; }
h3 { font-size: .95rem; margin: 0 0 2px; }
p { margin: 0 0 10px; }
a { color: var(--link); }
.soft { color: var(--soft); }
nav { margin: 8px 0 0; display: flex; flex-wrap: wrap; gap: 4px 16px; }

.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 16px 0 0; }
.facts div, .card, .notice {
  background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 10px 12px;
}
dt { color: var(--soft); font-size: .82rem; }
dd { margin: 0; font-size: 1.08rem; font-weight: 600; overflow-wrap: anywhere; }
dd small { display: block; font-weight: 400; color: var(--soft); }
.notice { background: var(--warn-back); border-color: var(--warn-edge); margin: 16px 0 0; }
.notice h2 { margin: 0; font-size: 1rem; color: var(--warn); }
.notice ul { margin: 4px 0 0; padding-left: 20px; }
progress { width: 100%; height: 8px; accent-color: var(--c1); }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 370px), 1fr)); gap: 12px; }
.charts { margin: 12px 0; align-items: start; }
.card { min-width: 0; position: relative; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
.legend {
  display: flex; flex-wrap: wrap; gap: 0 12px; margin: 0 0 4px; padding: 0; list-style: none;
  font-size: .84rem; color: var(--soft);
}
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.key {
  display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; background: currentColor;
}
.tick { font-size: 11.5px; fill: var(--soft); }
.rule { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
.raw { fill: none; stroke: currentColor; stroke-width: 1; opacity: .28; }
.dot { fill: currentColor; }
.bar { stroke: currentColor; stroke-width: 1.2; }
.cursor { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; visibility: hidden; }
.c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); } .c4 { color: var(--c4); }
.c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); } .c8 { color: var(--c8); }
.tip {
  position: absolute; top: 8px; right: 12px; padding: 3px 8px; pointer-events: none;
  background: var(--card); border: 1px solid var(--edge); border-radius: 6px;
  font-size: .8rem; font-variant-numeric: tabular-nums;
}
.tip:empty { display: none; }
.tip span { display: block; }

.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 2px 10px 2px 0; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.text, th.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 4em; }
details { margin-top: 4px; }
summary { cursor: pointer; color: var(--soft); font-size: .84rem; }
.strips td, .strips th {
  border: 0; padding: 0 4px 4px 0; text-align: center; color: var(--soft); font-weight: 400; vertical-align: middle;
}
.strips th.name {
  position: sticky; left: 0; min-width: 110px; max-width: 180px; padding-right: 10px;
  text-align: left; white-space: normal; overflow-wrap: anywhere; color: var(--ink); background: var(--card);
}
.strips img { display: block; width: 96px; height: auto; border-radius: 4px; }
pre { overflow-x: auto; font: 13px/1.45 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; margin: 8px 0 0; }

@media (max-width: 520px) {
  main { padding: 14px 10px 40px; }
  .facts { grid-template-columns: repeat(2, 1fr); }
  .strips img { width: 76px; }
  .strips th.name { min-width: 84px; max-width: 96px; font-size: .8rem; }
}
@media print { .card { break-inside: avoid; } }
"""

JS = """
"use strict";
for (const svg of document.querySelectorAll("svg[data-x]")) {
  const [x0, x1, px0, px1] = svg.dataset.x.split(" ").map(Number);
  const [y0, y1, py0, py1, log] = svg.dataset.y.split(" ").map(Number);
  const pairs = text => text.trim().split(" ").map(pair => pair.split(",").map(Number));
  const lines = [...svg.querySelectorAll(".line")].map(
    line => ({ name: line.dataset.name, points: pairs(line.getAttribute("points")) }));
  const cursor = svg.querySelector(".cursor"), tip = svg.parentElement.querySelector(".tip");
  const value = at => {
    const share = (at - py0) / (py1 - py0);
    return log ? y0 * Math.pow(y1 / y0, share) : y0 + share * (y1 - y0);
  };
  const hide = () => { cursor.style.visibility = "hidden"; tip.replaceChildren(); };
  const row = text => {
    const span = document.createElement("span");
    span.textContent = text;
    return span;
  };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    if (at < px0 - 4 || at > px1 + 4) return hide();
    let best = null;
    for (const line of lines) for (const [x] of line.points)
      if (best === null || Math.abs(x - at) < Math.abs(best - at)) best = x;
    for (const [name, to] of [["x1", best], ["x2", best], ["y1", py1], ["y2", py0]]) cursor.setAttribute(name, to);
    cursor.style.visibility = "visible";
    const rows = [row("step " + Math.round(x0 + (best - px0) / (px1 - px0) * (x1 - x0)).toLocaleString("en"))];
    for (const line of lines) {
      const found = line.points.find(([x]) => Math.abs(x - best) < 0.06);
      if (found) rows.push(row(line.name + ": " + Number(value(found[1]).toPrecision(3))));
    }
    tip.replaceChildren(...rows);
    const right = at > (px0 + px1) / 2;  // the words stand where the pointer is not
    tip.style.left = right ? "64px" : "auto";
    tip.style.right = right ? "auto" : "12px";
  });
}
"""
