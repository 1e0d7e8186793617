// The page: everything on it is text from /web/..., put in by `append` and `textContent` alone, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const total = ({ turns }) => Object.values(turns).reduce((a, b) => a + b, 0);
const signed = (n) => (n > 0 ? "+" : "") + n;
let now; // what /web/events said last

/** An element with these properties and children; strings become text. */
function el(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

// ---- talking to the server ----

/** Ask for a key, once at a time. */
let asking = null;
function askForKey(refused) {
  if (refused) say("That key was refused.");
  asking ??= new Promise((done) => {
    $("ask").showModal();
    $("ask").onclose = () => {
      sessionStorage.setItem("key", $("key").value.replace(/[^!-~]/g, "")); // a header can have no other characters
      asking = null;
      done();
    };
  });
  return asking;
}

/** fetch, with the key in its header; throws an Error with the server's message. */
async function call(path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
    const reply = await fetch(path, { headers, signal, ...options });
    if (reply.status === 401) await askForKey(key);
    else if (reply.ok) return reply;
    else throw new Error((await reply.json().catch(() => null))?.error?.message ?? `${path}: ${reply.status}`);
  }
}
const read = async (path) => (await call(path)).json();

let saidAt = 0;
function say(text) {
  $("said").textContent = text;
  $("said").hidden = false;
  const mine = (saidAt = Date.now());
  setTimeout(() => saidAt === mine && ($("said").hidden = true), 6000);
}

/** Do what a button says, and tell how it ended. Returns whether it worked. */
async function act(path, body) {
  try {
    say((await (await call(path, body)).json()).done ?? "Noted.");
    return true;
  } catch (error) {
    say(error.message);
  }
}

/** Server-sent events by fetch: an EventSource could not send the key. */
async function* events(path, signal) {
  const reader = (await call(path, undefined, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ; ) {
    const { value, done } = await Promise.race([reader.read(), sleep(40_000).then(() => ({}))]);
    if (done) return;
    if (value === undefined) throw new Error("it is silent"); // it sends something every 15 s
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
  }
}

// ---- at a glance ----

function showGlance() {
  const [queued, size] = [now.turns.queued ?? 0, now.batch_size];
  document.title = `step ${now.step} · ${now.model}`;
  $("model").textContent = `${now.model} (${now.folder})`;
  $("step").textContent = `step ${now.step}${now.owner && ` of ${now.owner}`}`;
  $("training").textContent = now.stepping ? "a step is running" : `training ${now.training.split(":")[0]}`;
  $("training").className = "badge " + (now.training === "on" ? "good" : "bad");
  $("swap").textContent = now.pause_s ? `the last swap paused streams for ${now.pause_s.toFixed(2)} s` : "";
  $("batch").max = size;
  $("batch").value = Math.min(now.together, size);
  $("until").textContent = now.user === null || now.owner ? `${$("batch").value} of ${size} turns until the next step`
    : `${queued} turns of ${now.user} wait, and a step takes ${size}`;
  $("why").textContent = now.why;
  $("orders").hidden = !now.admin;
  for (const part of document.querySelectorAll("[data-shared]")) part.hidden = Boolean(now.steps); // a step has an owner
  const steps = [...new Set([...now.checkpoints, 0])].sort((a, b) => b - a);
  if ($("checkpoint").dataset.steps !== steps.join()) {
    const chosen = $("checkpoint").selectedIndex > 0 && $("checkpoint").value; // else the newest, the first in the list
    $("checkpoint").replaceChildren(...steps.map((s) => el("option", { value: s }, s ? `step ${s}` : "the starting weights")));
    $("checkpoint").dataset.steps = steps.join();
    if (chosen && steps.includes(Number(chosen))) $("checkpoint").value = chosen;
  }
  $("total").textContent = `${total(now).toLocaleString()} turns`;
  const row = (name, n) => el("tr", {}, el("td", {}, n.toLocaleString()), el("td", {}, name));
  const byCount = (counts) => Object.entries(counts).sort((a, b) => b[1] - a[1]);
  $("counts").lastElementChild.replaceChildren(
    ...byCount(now.turns).map(([state, n]) => row(state, n)),
    ...byCount(now.dropped).map(([reason, n]) => row(`dropped: ${reason}`, n)),
  );
}

for (const button of document.querySelectorAll("[data-order]")) {
  button.onclick = () => {
    const order = button.dataset.order;
    const body = { user: now.owner, step: Number($("checkpoint").value) };
    const sure = `Roll back ${now.owner || "the model"} to step ${body.step}? Later steps are undone, their turns dropped.`;
    if (order !== "rollback" || confirm(sure)) act(`/admin/${order}`, body);
  };
}

// ---- curves ----

const color = (name) => () => getComputedStyle(document.documentElement).getPropertyValue(name);
const plots = {};

/** A curve in the element with this id; for `time` x is in seconds, and `marks` are vertical lines. */
function plot(id, x, y, { time = false, marks = [], range } = {}) {
  const box = $(id);
  if ((box.closest("figure").hidden = !y.some((value) => value != null))) return;
  const height = id === "pleased" ? 200 : 150;
  if (!plots[id]) {
    const axis = { stroke: color("--quiet"), grid: { stroke: color("--line"), width: 1 }, font: "11px system-ui" };
    const drawMarks = (u) => {
      u.ctx.strokeStyle = color("--accent")();
      u.ctx.globalAlpha = 0.35;
      for (const mark of u.marks ?? []) {
        const at = Math.round(u.valToPos(mark, "x", true));
        if (at >= u.bbox.left && at <= u.bbox.left + u.bbox.width) u.ctx.strokeRect(at, u.bbox.top, 0, u.bbox.height);
      }
      u.ctx.globalAlpha = 1;
    };
    const around = (u, first, last) => [first, Math.max(last, first + 1, ...(u.marks ?? []))];
    const line = { stroke: color("--accent"), width: 2, points: { size: 5 }, label: "" };
    plots[id] = new uPlot(
      { width: box.clientWidth, height, legend: { show: false }, hooks: { drawAxes: [drawMarks] },
        scales: { x: time ? { time, range: around } : { time }, y: range ? { range } : {} },
        series: [{}, line], axes: [{ ...axis, size: time ? 46 : 26 }, { ...axis, size: 46 }] },
      [[], []], box,
    );
    const fit = () => plots[id].width === box.clientWidth || plots[id].setSize({ width: box.clientWidth, height });
    new ResizeObserver(fit).observe(box);
  }
  plots[id].marks = marks;
  plots[id].setData([x, y]);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const plotted of Object.values(plots)) plotted.redraw(false, true);
});

function showCurves({ pleased, steps }) {
  const of = (name) => steps.map((s) => s[name] ?? null);
  $("of_pleased").textContent = `Pleased among the last ${pleased.window} replies, %; each line a step`;
  const [times, percent] = [pleased.shares.map(([at]) => at), pleased.shares.map(([, share]) => 100 * share)];
  plot("pleased", times, percent, { time: true, marks: of("time"), range: [0, 100] });
  plot("probe_kl", of("step"), of("probe_kl"));
  const length = now.admin ? "length" : "probe_length";
  $("of_length").textContent = now.admin ? "Length of answers, tokens" : "Length of answers to fixed prompts, tokens";
  plot("length", of("step"), of(length));
  plot("dlogp", of("step"), of("dlogp"));
}

// ---- turns ----

const AT_ONCE = 30; // turns in an answer of the server
const MOST = 300; // cards, of turns that come in live
const cards = new Map(); // number of a turn -> its card, with what it shows in `data`

const said = (role, text) => el("div", { className: `said ${role}` }, text);

function card(turn) {
  const verdictOf = ({ score, votes, source, confidence }) =>
    `${signed(score)} by ${source === "judge" ? "the judge" : "a person"} (votes ${votes.map(signed).join(" ")}, ` +
    `${Math.round(100 * confidence)} % sure)`;
  const versions = turn.versions.map(([version]) => version);
  const weights = `weights ${[...new Set(versions)].join(", ")}`;
  const outcome = turn.state === "trained" ? `trained on in step ${turn.step}` : turn.state;
  const style = { trained: "good", dropped: "bad" }[turn.state] ?? "";
  const late = turn.late_feedback.map((l) => el("div", { className: "verdict quiet" }, `too late: ${signed(l.score)} ${l.text}`));
  const words = el("input", { placeholder: "what should it have said or done?", required: true, maxLength: 300 });
  const correct = el("form", { hidden: true }, words, el("button", {}, "Send"));
  const rate = (score, text = "") =>
    act("/v1/feedback", { completion_id: turn.id, score, text }).then((worked) => (correct.hidden ||= worked && text !== ""));
  correct.onsubmit = (event) => (event.preventDefault(), words.blur(), rate(-1, words.value));
  const opened = el("div", { className: "tokens", hidden: true });
  const button = (name, onclick, title = "") => el("button", { onclick, title }, name);
  const made = el("article", { className: "turn" },
    el("div", { className: "bar quiet" },
      el("span", {}, new Date(1000 * turn.created).toLocaleString()),
      el("button", { className: "link", onclick: () => filter("user", turn.user) }, turn.user),
      el("button", { className: "link", onclick: () => filter("session", turn.session) }, turn.session),
      el("span", {}, `${turn.prompt_tokens} + ${turn.tokens} tokens, ${weights}`),
      el("span", { className: `badge outcome ${style}` }, outcome),
      turn.reason ? el("span", { className: "reason" }, turn.reason) : null),
    ...turn.request.map((m) => said(m.role, m.text)),
    said("assistant", turn.pruned ? "(removed, by --keep_days)" : turn.answer || "(empty)"),
    ...turn.next.map((m) => said(m.role, m.text)),
    turn.score === null ? null : el("div", { className: `verdict ${{ 1: "good", "-1": "bad" }[turn.score] ?? ""}` },
      `verdict ${verdictOf(turn)}`),
    turn.no_rl ? el("div", { className: "verdict quiet" }, `its score can't be trained on: ${turn.no_rl}`) : null,
    ...turn.hints.slice(0, 1).map((hint) => el("div", { className: "verdict" }, `hint: ${hint} (${turn.hinted_by})`)),
    ...late,
    el("div", { className: "bar" },
      button("Good", () => rate(1)),
      button("Bad", () => rate(-1)),
      button("Correct…", () => ((correct.hidden = !correct.hidden), words.focus())),
      button("Leave out", () => act("/web/leave_out", { session: turn.session }),
        "This conversation's answers so far that are not trained on yet will not be trained on."),
      button("Tokens", () => showTokens(opened, turn)),
      correct),
    opened);
  return Object.assign(made, { created: turn.created, number: turn.number, data: JSON.stringify(turn) });
}

/** Control characters as their escapes. */
const visible = (text) => text.replace(/\p{Cc}/gu, (c) => JSON.stringify(c).slice(1, -1));

/** Each token with its log-prob; a mark where the weights changed. */
async function showTokens(box, turn) {
  box.hidden = !box.hidden;
  if (box.hidden || box.childElementCount) return;
  try {
    const { tokens, logprobs, versions } = await read(`/web/turns/${turn.number}`);
    const begins = new Map(versions.map(([version, start]) => [start, version]));
    tokens.forEach((text, at) => {
      if (begins.has(at)) box.append(el("span", { className: "version" }, `weights ${begins.get(at)}`));
      const token = el("span", { className: "token" }, visible(text), el("small", {}, logprobs[at].toFixed(2)));
      token.style.background = `color-mix(in srgb, var(--bad) ${Math.min(60, -8 * logprobs[at])}%, transparent)`;
      box.append(token);
    });
    if (turn.tokens > tokens.length) box.append(`… and ${turn.tokens - tokens.length} more`);
  } catch (error) {
    say(error.message);
  }
}

let paged = false; // has "Older" been pressed?

const asked = () => new URLSearchParams(new FormData($("filters")));

const isBusy = (old) => [...old.querySelectorAll("form, .tokens")].some((part) => !part.hidden);

/** Put turns into the list: a card that shows the same stays, and so does one that somebody writes in or has opened. */
function put(turns, append) {
  for (const turn of turns) {
    const old = cards.get(turn.number);
    if (old && (isBusy(old) || old.data === JSON.stringify(turn))) continue;
    const made = card(turn);
    cards.set(turn.number, made);
    if (old) old.replaceWith(made);
    else if (append) $("turns").append(made);
    else {
      const after = [...$("turns").children].find((other) => other.created < turn.created);
      $("turns").insertBefore(made, after ?? null);
      const last = cards.size > MOST && [...$("turns").children].findLast((other) => !isBusy(other));
      if (last && cards.delete(last.number)) last.remove();
    }
  }
}

/** Put the newest turns into the list; those that are no longer among them, forgotten or in another state, leave it. */
function showTurns(turns) {
  if (!turns.some((turn) => cards.has(turn.number))) paged = false; // there is a gap before the older ones
  put(turns);
  const oldest = turns.length < AT_ONCE ? 0 : turns.at(-1).created;
  const found = new Set(turns.map((turn) => turn.number));
  for (const [number, old] of cards) {
    if (found.has(number) || isBusy(old) || (paged && old.created < oldest)) continue;
    old.remove();
    cards.delete(number);
  }
}

function refilter() {
  paged = false;
  cards.clear();
  $("turns").replaceChildren();
  $("orders").hidden = true; // until it is known whose weights they would concern
  stream.abort(); // and `live` begins another one
  $("learned").ontoggle();
}
function filter(name, value) {
  $("filters").elements[name].value = value;
  refilter();
}
$("filters").onchange = refilter;
$("filters").onsubmit = (event) => event.preventDefault();
$("filters").onreset = () => setTimeout(refilter);
$("older").onclick = async () => {
  const last = $("turns").lastElementChild;
  const query = asked();
  if (last) query.set("before", last.created);
  paged = true;
  put(await read(`/web/turns?${query}`), true);
};

// ---- what was learned ----

async function showRules() {
  const rules = await read(`/web/learned?user=${encodeURIComponent($("filters").elements.user.value)}`);
  const each = rules.map((rule) => {
    const answers = el("div");
    const again = el("button", { onclick: () => askAgain(rule, answers, again) }, "Ask again");
    if (!rule.numbers.length) Object.assign(again, { disabled: true, title: "these prompts are too long" });
    return el("div", { className: "rule" },
      el("div", { className: "bar" }, el("b", {}, `${rule.times} ×`), el("span", {}, rule.hint),
        el("span", { className: "quiet" }, rule.user), again),
      answers);
  });
  $("rules").replaceChildren(...(each.length ? each : ["Nothing yet: nobody has said what is wrong with an answer."]));
}
$("learned").ontoggle = () => $("learned").open && showRules().catch((error) => say(error.message));

async function askAgain(rule, box, button) {
  button.disabled = true;
  box.replaceChildren();
  try {
    for (const number of rule.numbers) {
      const { request, complaint, first, current, nats } = await read(`/web/learned/${number}`);
      const times = Math.exp(Math.abs(nats));
      const many = times > 1000 ? "more than 1,000" : times.toFixed(1);
      const words = (text) => `${text.split(/\s+/).filter(Boolean).length} words`;
      const found = `“${complaint}” is ${many} times ${nats < 0 ? "less" : "more"} likely after the current answer`;
      box.append(
        said("user", request),
        el("div", { className: "quiet" }, `starting weights, ${words(first)}`), said("assistant", first || "(empty)"),
        el("div", { className: "quiet" }, `step ${now.step}, ${words(current)}`),
        said("assistant", current || "(empty)"),
        el("div", { className: "verdict quiet" }, found),
      );
    }
  } catch (error) {
    say(error.message);
  }
  button.disabled = false;
}

// ---- live ----

let stream; // aborted where other turns are to be shown
async function live() {
  for (;;) {
    stream = new AbortController();
    const { signal } = stream;
    let ended = "The program has stopped: trying again.";
    try {
      for await (const event of events(`/web/events?${asked()}`, signal)) {
        if (signal.aborted) break;
        const undone = now && event.owner === now.owner && event.user === now.user
          && (event.step < now.step || total(event) < total(now));
        now = event;
        if (undone) paged = false; // a rollback or `forget`: the older cards are not true any more
        showGlance();
        showTurns(now.listed);
        if (now.curves) showCurves(now.curves);
      }
    } catch (error) {
      ended = `No connection to the program, trying again: ${error.message}`;
    }
    if (signal.aborted) continue;
    stream.abort(), ($("orders").hidden = true); // the connection may be silent, but open
    $("why").textContent = ended;
    await sleep(2000);
  }
}
live();
