"""The page around the page: asks for news, shows a new version without losing the place.

The report is shown in a frame of its own. A new version is loaded behind the old one, scrolled to
the same place, with the same details open and the same things chosen, and then takes its place;
while text is selected in the old one, it waits. What the report is made of does not matter to it.
"""

from __future__ import annotations

import base64
import hashlib
import html

__all__ = ["notice", "shell", "shell_policy"]

_STYLE = """
:root { color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif; }
body { margin: 0; display: flex; flex-direction: column; height: 100vh; }
#bar { padding: .35rem 1rem; border-bottom: 1px solid #8886; display: flex; gap: 1rem; }
#bar b { font-weight: 600; }
#problem { white-space: pre-wrap; margin: 0; padding: .5rem 1rem; border-left: 4px solid #c60; }
#problem:empty { display: none; }
main { position: relative; flex: 1; }
iframe { position: absolute; inset: 0; width: 100%; height: 100%; border: 0; }
iframe.next { visibility: hidden; }
"""

_SCRIPT = """
"use strict";
const byId = (id) => document.getElementById(id);
const phases = { waiting: "waiting for the run to start", unfinished: "in progress",
                 finished: "finished" };
let shown = "", loading = "";

function ago(seconds) {
  if (seconds < 90) return Math.round(seconds) + " s ago";
  if (seconds < 5400) return Math.round(seconds / 60) + " min ago";
  return Math.round(seconds / 3600) + " h ago";
}

function say(state) {
  const phase = state.phase === "unfinished" && state.changed_s > 600
    ? "not finished" : phases[state.phase];
  byId("phase").textContent = phase;
  byId("changed").textContent = state.changed_s === null ? ""
    : "record written " + ago(state.changed_s);
  byId("problem").textContent = state.problem;
  document.title = phase + ": " + byId("name").textContent;
}

function place(frame) {
  const view = frame.contentWindow, all = (what) => frame.contentDocument.querySelectorAll(what);
  return { x: view.scrollX, y: view.scrollY, open: Array.from(all("details"), (d) => d.open),
           chosen: Array.from(all("select"), (s) => s.value) };
}

function choose(select, value) {
  if (select.value === value || !Array.from(select.options, (o) => o.value).includes(value)) return;
  select.value = value;
  for (const kind of ["input", "change"]) select.dispatchEvent(new Event(kind, { bubbles: true }));
}

function restore(frame, kept) {
  const details = frame.contentDocument.querySelectorAll("details");
  const selects = frame.contentDocument.querySelectorAll("select");
  if (selects.length === kept.chosen.length) selects.forEach((s, i) => choose(s, kept.chosen[i]));
  if (details.length === kept.open.length) details.forEach((d, i) => { d.open = kept.open[i]; });
  frame.contentWindow.scrollTo({ left: kept.x, top: kept.y, behavior: "instant" });
}

function settle(frame, kept, tries) {
  restore(frame, kept);
  const there = Math.abs(frame.contentWindow.scrollY - kept.y) < 2;
  if (there || tries === 0) return show(frame);
  setTimeout(() => settle(frame, kept, tries - 1), 100);  // charts may still be growing
}

function show(frame) {
  const old = document.querySelector("iframe.now");
  frame.className = "now";
  if (old) old.remove();
  shown = frame.dataset.version;
  loading = "";
}

function load(version) {
  const old = document.querySelector("iframe.now");
  if (old && String(old.contentWindow.getSelection())) return;
  document.querySelectorAll("iframe.next").forEach((frame) => frame.remove());
  loading = version;
  const frame = document.createElement("iframe");
  frame.className = "next";
  frame.title = "report";
  frame.dataset.version = version;
  frame.onload = () => old ? settle(frame, place(old), 20) : show(frame);
  frame.src = "page?" + version;
  document.querySelector("main").append(frame);
}

async function poll() {
  let wait = 2000;
  try {
    const answer = await fetch("state", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.status);
    const state = await answer.json();
    say(state);
    if (state.version && state.version !== shown && state.version !== loading) {
      load(state.version);
    }
    if (state.phase === "finished" && !state.problem) wait = 10000;
  } catch (error) {
    byId("phase").textContent = "no answer: frostline watch was stopped";
    byId("changed").textContent = "";
  }
  setTimeout(poll, document.hidden ? 5 * wait : wait);
}
poll();
"""


def shell(name: str) -> str:
    """The page around the page.

    Args:
        name: what is watched, any text.

    Example:
        >>> "<b id=name>&lt;run&gt;</b>" in shell("<run>")
        True
    """
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(name)}</title><style>{_STYLE}</style></head>
<body><div id="bar" role="status"><b id=name>{html.escape(name)}</b><span id=phase></span>
<span id=changed></span></div><pre id="problem" role="alert"></pre>
<main><noscript><a href="page">the page as it is now</a></noscript></main>
<script>{_SCRIPT}</script></body></html>
"""


def shell_policy() -> str:
    """Its Content-Security-Policy: its own script and style by their hashes, nothing else."""
    return (
        f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)}; "
        "connect-src 'self'; frame-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
        "form-action 'none'"
    )


def notice(text: str) -> str:
    """A page that says one thing.

    Args:
        text: any text.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Frostline</title>'
        f"</head><body><pre>{html.escape(text)}</pre></body></html>\n"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
