"use strict";
// Everything foreign reaches the page as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const whole = new Intl.NumberFormat("en");
  const figure = (value) =>
    typeof value !== "number" ? String(value) : Number.isInteger(value) ? whole.format(value)
      : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(4));

  // -- theme: the system's unless one is chosen ------------------------------------------------
  const themes = ["system", "light", "dark"];
  const button = byId("theme");
  const setTheme = (name) => {
    document.documentElement.dataset.theme = name;
    button.textContent = `Theme: ${name}`;
    try { localStorage.setItem("frostline-theme", name); } catch { /* a page without storage */ }
  };
  let remembered = "system";
  try { remembered = localStorage.getItem("frostline-theme") ?? "system"; } catch { /* the same */ }
  setTheme(themes.includes(remembered) ? remembered : "system");
  button.addEventListener("click", () =>
    setTheme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length]));
  for (const element of document.querySelectorAll("#theme, #chips, .controls, .scrub, #decisions, .copy, #groups-behind"))
    element.hidden = false;

  // -- what the pointer is on ------------------------------------------------------------------
  const tip = byId("tip");
  const showTip = (event, title, pairs) => {
    const list = make("dl");
    for (const [name, value] of pairs) list.append(make("dt", name), make("dd", value));
    tip.replaceChildren(...(title ? [make("b", title)] : []), list);
    tip.hidden = false;
    const x = event.clientX ?? 0, y = event.clientY ?? 0, box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 12) : y + 18}px`;
  };
  const plainTip = (_, event, item, value) => {
    if (!value || typeof value !== "object") { tip.hidden = true; return; }
    showTip(event, "", Object.entries(value));
  };
  const overviewTip = (_, event, item) => {
    const d = item?.datum;
    if (!d || d.arm === undefined) { tip.hidden = true; return; }
    showTip(event, d.arm, [["layer group", d.group], ["state", d.kind], ["updates", `${d.from} to ${d.to}`], ["why", d.reason || "no reason given"]]);
  };
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

  // -- charts ----------------------------------------------------------------------------------
  const views = {};
  const draw = async (element, name, spec, tooltip) => {
    try {
      const options = { mode: "vega", ast: true, renderer: "svg", actions: false,
        defaultStyle: false, tooltip, hover: true };
      views[name] = (await vegaEmbed(element, spec, options)).view;
    } catch (error) {
      element.textContent = `This chart could not be drawn: ${error.message}`;
      element.classList.add("failed");
    }
  };
  const chips = [...document.querySelectorAll(".chip")];
  const hidden = () => chips.filter((c) => c.getAttribute("aria-pressed") === "false").map((c) => c.dataset.arm);
  const obey = (view) => { try { view.signal("hidden", hidden()).run(); } catch { /* has no strategies */ } };
  for (const chip of chips)
    chip.addEventListener("click", () => {
      const last = chip.getAttribute("aria-pressed") === "true" && hidden().length === chips.length - 1;
      if (last) return; // charts of nothing say nothing
      chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") === "false"));
      Object.values(views).forEach(obey);
    });

  // -- the timeline ----------------------------------------------------------------------------
  const select = byId("run"), slider = byId("at"), says = byId("at-says");
  const run = () => data.runs[Number(select.value)];
  const text = (index) => data.strings[index];
  // Spans of a group: start, phase, change, start, phase, change, ...; each ends where the next begins.
  const spansOf = (r, g) => {
    const flat = r.spans[g], found = [];
    for (let i = 0; i < flat.length; i += 3)
      found.push({ from: flat[i], to: i + 3 < flat.length ? flat[i + 3] : r.end, phase: r.phases[flat[i + 1]],
        change: flat[i + 2], place: i / 3 });
    return found;
  };
  const state = ([kind, rate, live]) =>
    (kind === "frozen" ? "frozen" : kind === "partly" ? "frozen but for some parameters" : "training") +
    (kind === "frozen" || rate === 1 ? "" : ` at ${figure(rate)} × its learning rate`) +
    (live ? ", norm statistics live" : "");
  const seen = (r, g, place) =>
    r.signals.map((name, s) => [text(name), r.seen[g]?.[s]?.[place]]).filter(([, v]) => v !== undefined && v !== null);
  const reason = (r, change) => (r.changes[change] ? text(r.changes[change][3]) || "no reason given" : "no decision recorded");
  const timelineTip = (_, event, item) => {
    const d = item?.datum;
    if (!d || d.g === undefined) { tip.hidden = true; return; }
    const r = run(), change = r.changes[d.change];
    showTip(event, text(r.groups[d.g]), [
      ["state", state(d.phase)], ["updates", `${d.from} to ${d.to}`],
      ["decided", change ? `at update ${change[0]}` : "–"], ["why", reason(r, d.change)],
      ...seen(r, d.g, d.place).map(([name, value]) => [name, figure(value)]),
    ]);
  };
  const rowHeight = (count) => (count <= 16 ? 24 : count <= 40 ? 16 : count <= 80 ? 9 : 6);
  const names = (r, list) => list.slice(0, 6).map((g) => text(r.groups[g])).join(", ") + (list.length > 6 ? ` and ${list.length - 6} more` : "");
  const changed = (r, change, froze, thawed) => {
    const cell = make("td");
    if (froze.length) cell.append(make("span", `froze ${names(r, froze)}`, "froze"));
    if (froze.length && thawed.length) cell.append("; ");
    if (thawed.length) cell.append(make("span", `unfroze ${names(r, thawed)}`, "thawed"));
    if (!froze.length && !thawed.length) cell.append(change[0] === 0 ? "start: nothing frozen" : "rates or switches only");
    return cell;
  };
  // A change: update, epoch, seconds, reason, bits of what is frozen, count, share that trains, signals, metrics.
  const frozenIn = (bits, g) => {
    const digit = bits.length - 1 - (g >> 2);
    return digit >= 0 && (parseInt(bits[digit], 16) >> (g & 3)) & 1;
  };
  const moved = (r, index) => {
    const now = r.changes[index][4], before = index ? r.changes[index - 1][4] : "0", froze = [], thawed = [];
    r.groups.forEach((_, g) => {
      const is = frozenIn(now, g), was = frozenIn(before, g);
      if (is && !was) froze.push(g);
      if (was && !is) thawed.push(g);
    });
    return [froze, thawed];
  };
  const MOST_LISTED = 200; // rows of a table that appear at once; more make a page slow to open
  let rows = [], every = false, current = -1;
  const makeRow = (r, one) => {
    const change = r.changes[one.index];
    const row = make("tr"), step = make("td", undefined, "num"), go = make("button", figure(change[0]));
    go.type = "button";
    go.setAttribute("aria-label", `Show update ${change[0]} in the timeline`);
    step.append(go);
    const saw = Object.entries(change[7]).map(([s, [low, middle, high]]) => `${text(s)} ${figure(low)} · ${figure(middle)} · ${figure(high)}`);
    for (const [m, value] of Object.entries(change[8])) saw.push(`${text(m)} ${figure(value)}`);
    row.append(step, make("td", change[1] === null ? "–" : change[1].toFixed(2), "num"), changed(r, change, one.froze, one.thawed),
      make("td", reason(r, one.index)), make("td", saw.join("; ") || "–"));
    row.addEventListener("click", () => look(change[0]));
    row.classList.toggle("now", one.index === current);
    return row;
  };
  const listDecisions = (r) => {
    every = false;
    rows = r.changes.map((change, index) => {
      const [froze, thawed] = moved(r, index);
      const groups = [...froze, ...thawed].map((g) => text(r.groups[g])).join(" ");
      return { index, froze, thawed, row: null, words: `${groups} ${text(change[3])}`.toLowerCase() };
    });
    filter();
  };
  const filter = () => {
    const r = run(), wanted = byId("find").value.trim().toLowerCase();
    const kept = rows.filter((one) => one.words.includes(wanted)), listed = every ? kept : kept.slice(0, MOST_LISTED);
    byId("decision-rows").replaceChildren(...listed.map((one) => (one.row ??= makeRow(r, one))));
    const count = rows.length === 1 ? "1 decision" : `${figure(rows.length)} decisions`;
    byId("found").textContent = kept.length === rows.length ? count : `${figure(kept.length)} of ${count}`;
    byId("more").hidden = listed.length === kept.length;
    byId("more").textContent = `List all ${figure(kept.length)}, not the first ${MOST_LISTED} only`;
  };
  const look = (step) => {
    const r = run();
    slider.value = String(step);
    let place = -1;
    r.changes.forEach((change, index) => { if (change[0] <= step) place = index; });
    const change = r.changes[place];
    const said = change
      ? `Update ${figure(step)}: ${change[5]} of ${r.groups.length} groups frozen, ${(100 * change[6]).toFixed(1)} % of parameters train. Since update ${figure(change[0])}: ${reason(r, place)}`
      : `Update ${figure(step)}: no decision yet.`;
    says.textContent = said;
    slider.setAttribute("aria-valuetext", said);
    current = place;
    for (const one of rows) one.row?.classList.toggle("now", one.index === place);
    if (views.timeline) views.timeline.signal("cursor", step).run();
    const now = r.groups.map((name, g) => {
      const span = spansOf(r, g).findLast((s) => s.from <= step), row = make("tr");
      const values = span ? Object.fromEntries(seen(r, g, span.place)) : {};
      row.append(make("td", text(name)), make("td", span ? state(span.phase) : "–"),
        ...r.signals.map((s) => make("td", values[text(s)] === undefined ? "–" : figure(values[text(s)]), "num")));
      return row;
    });
    byId("groups-now").replaceChildren(...now.reverse());
  };
  const showRun = async () => {
    const r = run(), spans = [];
    r.groups.forEach((name, g) => {
      for (const s of spansOf(r, g))
        spans.push({ ...s, g, group: text(name), depth: g, kind: s.phase[0],
          shade: s.phase[0] === "frozen" ? 1 : Math.min(1, s.phase[1]) });
    });
    const view = views.timeline;
    if (view) {
      view.signal("y_step", rowHeight(r.groups.length)).signal("cursor", -1).signal("end", r.end)
        .data("spans", spans).data("epochs", r.epochs.slice(0, -1).map((at) => ({ at })));
      await view.runAsync();
    }
    slider.max = String(r.end);
    byId("groups-head").replaceChildren(make("th", "layer group"), make("th", "state"), ...r.signals.map((s) => make("th", `${text(s)} when that began`, "num")));
    byId("timeline-says").textContent = `${r.name}: ${r.says}.` + (r.coarse > 1 ? ` Decisions within ${r.coarse} updates are drawn as one; the list below has each.` : "");
    byId("timeline-chart").setAttribute("aria-label", `Freezing timeline of ${r.name}`);
    listDecisions(r);
    look(r.changes.length ? r.changes[0][0] : 0);
    if (view) view.signal("cursor", -1).run();
  };
  select.addEventListener("change", showRun);
  slider.addEventListener("input", () => look(Number(slider.value)));
  byId("find").addEventListener("input", filter);
  byId("more").addEventListener("click", () => { every = true; filter(); });

  // -- copying ---------------------------------------------------------------------------------
  for (const copy of document.querySelectorAll(".copy"))
    copy.addEventListener("click", async () => {
      try { await navigator.clipboard.writeText(copy.previousElementSibling.textContent); copy.textContent = "Copied"; }
      catch { getSelection().selectAllChildren(copy.previousElementSibling); copy.textContent = "Selected"; }
    });
  addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("#proof details, #repeat details")) d.open = true; });

  // -- all of it, the timeline first -----------------------------------------------------------
  (async () => {
    await draw(byId("timeline-chart"), "timeline", data.timeline, timelineTip);
    await showRun();
    document.documentElement.dataset.opened = "true";
    for (const element of document.querySelectorAll("[data-chart]")) {
      await new Promise((done) => setTimeout(done)); // let the reader scroll between two charts
      await draw(element, element.dataset.chart, data.charts[element.dataset.chart],
        element.dataset.chart === "overview" ? overviewTip : plainTip);
      if (views[element.dataset.chart]) obey(views[element.dataset.chart]);
    }
    document.documentElement.dataset.ready = "true";
  })();
})();
