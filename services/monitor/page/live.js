// Exchanges the sections that have changed. What is fetched was escaped by the monitor.
"use strict";

const EVERY_MS = 2000;
const PATIENCE_MS = 8000;
const shown = {};
let answered = new Date();

function exchange(id, html) {
  if (shown[id] === html) return;
  const place = document.getElementById(id);
  if (!place) return;
  const open = [...place.querySelectorAll("details[open]")].map((each) => each.id);
  const scrolled = [...place.querySelectorAll(".wide")].map((each) => each.scrollLeft);
  const focused = place.contains(document.activeElement) ? [...place.querySelectorAll("a, summary, .wide")].indexOf(document.activeElement) : -1;
  place.innerHTML = html;
  for (const each of place.querySelectorAll("details")) each.open = open.includes(each.id);
  place.querySelectorAll(".wide").forEach((each, n) => { each.scrollLeft = scrolled[n] || 0; });
  if (focused >= 0) place.querySelectorAll("a, summary, .wide")[focused]?.focus();
  shown[id] = html;
}

async function refresh() {
  const lost = document.getElementById("lost");
  const main = document.getElementById("main");
  try {
    const answer = await fetch("live.json", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(String(answer.status));
    const live = await answer.json();
    for (const [id, html] of Object.entries(live.sections)) exchange(id, html);
    main.classList.toggle("old", !live.connected);
    lost.hidden = true;
    document.body.dataset.live = "true";
    answered = new Date();
  } catch {
    lost.textContent = "The monitor does not answer since " + answered.toISOString().slice(11, 19) + " UTC. What follows is the last that it said; requests are served without it.";
    lost.hidden = false;
    main.classList.add("old");
  }
}

async function run() {
  for (;;) {
    if (!document.hidden) await refresh();
    await new Promise((done) => setTimeout(done, EVERY_MS));
  }
}

run();
