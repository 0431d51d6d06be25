"""How the HTML report looks, in light and dark."""

from __future__ import annotations

STYLE = """\
:root {
  color-scheme: light dark;
  --ink: #1c1f26; --soft: #667085; --page: #f6f7f9; --card: #ffffff; --line: #e4e7ec;
  --accent: #2563eb; --warn: #b42318;
  --p0: #0891b2; --p1: #c026d3; --p2: #d97706; --p3: #16a34a; --p4: #4f46e5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e9ef; --soft: #94a0b3; --page: #0f1218; --card: #181c24; --line: #2a303c;
    --accent: #7aa7ff; --warn: #ff8a7a;
    --p0: #22d3ee; --p1: #e879f9; --p2: #fbbf24; --p3: #4ade80; --p4: #a5b4fc;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 32px 20px 64px; }
header p { margin: 0; color: var(--soft); font-size: 13px; letter-spacing: .04em; }
h1 { margin: 0 0 16px; font-size: 28px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 36px 0 12px; font-size: 17px; }
h3 { margin: 14px 0 4px; font-size: 12px; font-weight: 600; color: var(--soft); }
.note { margin: -8px 0 10px; color: var(--soft); font-size: 13px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; }
.tile, figure, details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 10px 16px; min-width: 110px; }
.tile b { display: block; font-size: 22px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 12px; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 12px; }
figcaption, .chips { overflow-wrap: anywhere; }
figure { margin: 0; padding: 12px 12px 6px; min-width: 0; }
figcaption { display: flex; justify-content: space-between; gap: 12px; padding: 0 6px 4px; font-size: 13px; }
figcaption b { font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .tick { fill: var(--soft); font-size: 10px; font-variant-numeric: tabular-nums; }
svg polyline { fill: none; stroke: var(--accent); stroke-linejoin: round; stroke-linecap: round; }
svg .raw { stroke-width: 1; opacity: .35; }
svg .mean { stroke-width: 2; }
svg .dot { fill: var(--accent); }
svg .hover { fill: transparent; }
svg .hover:hover { fill: var(--accent); opacity: .5; }
.split { display: flex; gap: 2px; height: 22px; border-radius: 8px; overflow: hidden; }
.split i { min-width: 3px; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin-top: 8px; font-size: 13px; }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 6px; border-radius: 3px; }
.phase0 { background: var(--p0); } .phase1 { background: var(--p1); } .phase2 { background: var(--p2); }
.phase3 { background: var(--p3); } .phase4 { background: var(--p4); }
details { margin-bottom: 8px; padding: 0 14px; }
details[open] { padding-bottom: 12px; }
summary { display: flex; gap: 14px; padding: 9px 0; cursor: pointer; font-size: 13px; }
summary::marker, summary::-webkit-details-marker { display: none; }
summary .step { color: var(--soft); min-width: 76px; font-variant-numeric: tabular-nums; }
summary .reward { font-weight: 600; min-width: 92px; font-variant-numeric: tabular-nums; }
summary .beginning { color: var(--soft); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; }
.chips span { padding: 1px 9px; border: 1px solid var(--line); border-radius: 99px; font-size: 12px; }
pre {
  margin: 0; padding: 10px 12px; border-radius: 8px; background: var(--page); unicode-bidi: isolate;
  font: 12.5px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
}
.errors summary .reward { color: var(--warn); }
"""
