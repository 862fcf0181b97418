// Draws one Vega-Lite chart. New numbers patch the running Vega view; a new spec, or a change between light and dark,
// embeds the chart again.

const PAGE = Symbol.for("veloxlab.vega"); // one import of the bundle for all charts of a page

function importOnce(version, code) {
  const loaded = (globalThis[PAGE] ??= new Map());
  if (!loaded.has(version)) {
    const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
    const module = import(/* @vite-ignore */ url).finally(() => URL.revokeObjectURL(url));
    module.catch(() => loaded.delete(version)); // so that the next chart tries again
    loaded.set(version, module);
  }
  return loaded.get(version);
}

// In JupyterLab a view has access to the shared runtime model. In other hosts it may not: then the kernel sends a copy.
async function runtimeOf(model) {
  if (model.widget_manager?.get_model) {
    const shared = await model.widget_manager.get_model(model.get("runtime").replace("IPY_MODEL_", ""));
    return { version: shared.get("version"), code: shared.get("code"), themes: shared.get("themes") };
  }
  return new Promise((resolve, reject) => {
    const done = (settle, value) => {
      clearTimeout(timer);
      model.off("msg:custom", listen);
      settle(value);
    };
    const listen = (message) => message?.runtime && done(resolve, message.runtime);
    const timer = setTimeout(() => done(reject, new Error("the kernel did not send the chart library")), 30_000);
    model.on("msg:custom", listen);
    model.send({ wants: "runtime" });
  });
}

// ---- the background of the chart

function luminance([r, g, b]) {
  return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
}

// Red, green and blue (0 to 255) and opacity (0 to 1) of any CSS colour: marimo has "color(srgb 1 1 1)".
function rgbaOf(colour) {
  if (colour.startsWith("rgb")) {
    const [r, g, b, opacity = 1] = colour.match(/[\d.]+/g).map(Number);
    return [r, g, b, opacity];
  }
  const pixel = new OffscreenCanvas(1, 1).getContext("2d");
  pixel.fillStyle = colour;
  pixel.fillRect(0, 0, 1, 1);
  const [r, g, b, opacity] = pixel.getImageData(0, 0, 1, 1).data;
  return [r, g, b, opacity / 255];
}

function isDark(el) {
  const { dataset, classList } = document.body;
  if (dataset.jpThemeLight) return dataset.jpThemeLight === "false";
  if (classList.contains("vscode-light") || classList.contains("vscode-high-contrast-light")) return false;
  if (classList.contains("vscode-dark") || classList.contains("vscode-high-contrast")) return true;
  for (let node = el; node instanceof Element; node = node.parentElement ?? node.getRootNode().host) {
    const parts = rgbaOf(getComputedStyle(node).backgroundColor);
    if (parts[3] > 0.5) return luminance(parts) < 0.5;
  }
  // a page that does not declare a dark scheme stays white, even if the system prefers dark
  const scheme = getComputedStyle(document.documentElement).colorScheme;
  return scheme.includes("dark") && (!scheme.includes("light") || matchMedia("(prefers-color-scheme: dark)").matches);
}

function onBackground(changed) {
  const observer = new MutationObserver(changed);
  const watched = { attributeFilter: ["data-jp-theme-light", "data-theme", "theme", "class", "style"] };
  observer.observe(document.body, watched);
  observer.observe(document.documentElement, watched);
  const system = matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", changed);
  return () => {
    observer.disconnect();
    system.removeEventListener("change", changed);
  };
}

// ---- spec and data

const text = new TextDecoder();

// A list of rows, from JSON of rows or of columns by name.
function rowsOf(payload) {
  const found = JSON.parse(typeof payload === "string" ? payload : text.decode(payload));
  if (Array.isArray(found)) return found;
  const columns = Object.entries(found);
  return (columns[0]?.[1] ?? []).map((_, i) => Object.fromEntries(columns.map(([name, values]) => [name, values[i]])));
}

function overlay(below, above) {
  const both = { ...below };
  for (const [key, value] of Object.entries(above)) {
    const nested = value && typeof value === "object" && !Array.isArray(value);
    both[key] = nested ? overlay(both[key], value) : value;
  }
  return both;
}

function specOf(json, theme, datasets, values) {
  const spec = JSON.parse(json);
  spec.config = overlay(spec.config, theme);
  spec.datasets = datasets;
  for (const param of spec.params ?? []) if (param.name in values) param.value = values[param.name] ?? null;
  return spec;
}

// ---- the width of a column: widths of plots are signals of a running view

const ERRORS = 1; // log level: Vega logs no warnings, which a scale without rows gives at each move, a millisecond each
const STRETCH = [0.35, 1.6]; // least and greatest width of a plot, times its own width
const PADDING = 6; // pixels around a chart, as in the theme
const MARGIN = 12; // pixels that words leave free, in addition to those to the left of the plots
const WORDS = { heading: "600 14px ", caption: "12px " }; // as in the theme
const ruler = document.createElement("canvas").getContext("2d");

// Words in lines of at most `room` pixels. Vega does not break lines by itself.
function wrapped(words, font, room) {
  if (!Number.isFinite(room)) return words;
  ruler.font = font;
  const lines = [""];
  for (const word of String(words ?? "").split(" ")) {
    const longer = lines.at(-1) ? `${lines.at(-1)} ${word}` : word;
    if (lines.at(-1) && ruler.measureText(longer).width > room) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  return lines;
}

// The signals of a Vega spec for sizes of plots: `[name, own size, whether it is the height of a square]`.
function sizesIn({ signals = [], width, height }) {
  const named = signals.map(({ name, value }) => [name, value]);
  const sizes = [["width", width], ["height", height], ...named].filter(([, size]) => typeof size === "number");
  const ending = (end) => sizes.filter(([name]) => end.test(name));
  const widths = new Set(ending(/width$/i).map(([, size]) => size));
  return {
    across: ending(/(width|x_step)$/i),
    down: ending(/(height|y_step)$/i).map(([name, size]) => [name, size, /height$/i.test(name) && widths.has(size)]),
  };
}

// Vega numbers gradients from 0, and JupyterLab's own Vega does so on the same page: without unique names the legend of
// one chart would show the colours of another. Each redraw may restore Vega's names or set new ones, so the present
// names are read from the filled elements first. The number is the page's: each chart runs its own copy of this file, and
// a browser draws nothing for the name of a gradient that is hidden with another chart.
const GRADIENTS = Symbol.for("veloxlab.gradients");

function ownGradients(plot) {
  for (const filled of plot.querySelectorAll("[fill*='#gradient_']")) {
    filled.dataset.gradient = filled.getAttribute("fill").match(/#(gradient_\d+)/)[1];
  }
  for (const gradient of plot.querySelectorAll("linearGradient[id^='gradient_']")) {
    gradient.dataset.name = gradient.id;
    globalThis[GRADIENTS] = (globalThis[GRADIENTS] ?? 0) + 1;
    gradient.id = `veloxlab-${globalThis[GRADIENTS]}`;
  }
  for (const gradient of plot.querySelectorAll("linearGradient[data-name]")) {
    const own = `url(#${gradient.id})`;
    for (const filled of plot.querySelectorAll(`[data-gradient='${gradient.dataset.name}'][fill^='url']`)) {
      if (filled.getAttribute("fill") !== own) filled.setAttribute("fill", own);
    }
  }
}

// What can be picked: the param that a chart must have, the model's trait, columns of a mark's row with its value, keys
// that step through the values, and its name.
const PICKS = [
  { param: "picked_layer", trait: "picked", fields: ["layer"], keys: ["ArrowLeft", "ArrowRight"], name: "layer" },
  { param: "picked_head", trait: "picked_head", fields: ["head", "group"], keys: ["ArrowUp", "ArrowDown"], name: "head" },
  {
    param: "picked_token",
    trait: "picked_token",
    fields: ["place", "position", "query"],
    keys: ["ArrowLeft", "ArrowRight"],
    name: "token",
  },
  { param: "picked_point", trait: "picked_point", fields: ["point"], keys: ["ArrowLeft", "ArrowRight"], name: "cache" },
];

function valueOf(row, fields) {
  const field = fields.find((name) => row && name in row);
  return Number.isInteger(row?.[field]) ? row[field] : null;
}

function valuesIn(datasets, fields) {
  const values = Object.values(datasets).flatMap((rows) => rows.map((row) => valueOf(row, fields)));
  return [...new Set(values.filter(Number.isInteger))].sort((a, b) => a - b);
}

// ---- one chart in one element

class Chart {
  constructor(model, el, vega, themes) {
    Object.assign(this, { model, el, vega, themes, result: null, shown: {}, closed: false });
    Object.assign(this, { picks: [], datasets: {}, isHidden: false, room: null, left: 66, across: 1, down: 1, slope: null });
    this.note = el.appendChild(document.createElement("div"));
    this.note.className = "veloxlab-note";
    this.annotate();
    this.plot = el.appendChild(document.createElement("div"));
    this.plot.className = "veloxlab-chart";
    this.names = new MutationObserver(() => ownGradients(this.plot));
    this.names.observe(this.plot, { subtree: true, childList: true, attributeFilter: ["id", "fill"] });
    this.sentence = el.appendChild(document.createElement("p"));
    this.sentence.className = "veloxlab-sentence";
    this.sentence.setAttribute("role", "alert");
    this.sentence.hidden = true;
    this.turn = Promise.resolve();
  }

  // One step at a time. A step draws the newest state, so a step without a new state ends at once.
  update() {
    this.el.ariaBusy = "true"; // until the newest step has ended
    const turn = this.turn
      .then(() => (this.closed ? undefined : this.step()))
      .then(
        (drew) => drew && this.say(""),
        (error) => this.say(`This chart could not be drawn: ${error.message ?? error}`),
      )
      .then(() => {
        if (this.turn === turn) this.el.ariaBusy = "false";
      });
    this.turn = turn;
    return turn;
  }

  // A chart in a hidden tab is drawn when the tab is shown. An observer reports the size, because reading the size after
  // a patch would lay out the page once for each chart.
  resize({ width }) {
    this.isHidden = width === 0;
    if (!this.isHidden) this.room = width;
  }

  // The line above the chart: its purpose, and whether its numbers are measured, predicted or stale.
  annotate() {
    const { why = "", badge = "", tip = "" } = this.model.get("note") ?? {};
    const parts = [["why", why], ["badge", badge]].filter(([, words]) => words);
    this.note.replaceChildren(
      ...parts.map(([kind, words]) => {
        const part = document.createElement("span");
        part.className = `veloxlab-${kind}`;
        part.textContent = words;
        if (kind === "badge") Object.assign(part, { title: tip }).dataset.kind = words;
        return part;
      }),
    );
    this.note.hidden = parts.length === 0;
  }

  say(sentence) {
    this.sentence.textContent = sentence;
    this.sentence.hidden = !sentence;
  }

  async step() {
    const { model, shown } = this;
    const spec = model.get("spec");
    const content = model.get("content");
    if (content.spec !== spec.id) return false; // its spec did not arrive yet
    if (this.result && this.isHidden) return false;
    const dark = isDark(this.el);
    const anew = !this.result || spec.id !== shown.spec || dark !== shown.dark;
    const misfit = this.stretches && shown.room !== this.room;
    if (anew) await this.embed(spec, content, dark);
    else if (content.revision !== shown.revision) await this.patch(content);
    else if (!misfit) return false;
    if (anew || misfit) await this.fit(); // not for new numbers alone: measuring takes as long as drawing
    this.tell();
    this.shown = { spec: spec.id, dark, revision: content.revision, room: this.room };
    await this.mark();
    // only in the page: a message to the kernel would come between those of the next charts
    this.plot.dataset.revision = content.revision;
    return true;
  }

  async embed(spec, content, dark) {
    const datasets = this.read(content);
    const values = { ...content.params };
    for (const { param, trait } of PICKS) values[param] = this.model.get(trait);
    const whole = specOf(spec.json, this.themes[dark ? "dark" : "light"], datasets, values);
    this.font = whole.config.font ?? "sans-serif";
    this.fixed = whole.usermeta?.veloxlab?.fixed === true; // a text, whose width is that of its letters
    this.el.classList.toggle("veloxlab-wide", this.fixed);
    this.words = { caption: content.params.caption };
    if (typeof whole.title?.text === "string") {
      this.words.heading = whole.title.text;
      whole.title.text = { expr: "heading" };
      whole.params = [...(whole.params ?? []), { name: "heading", value: "" }];
    }
    this.room ??= this.plot.clientWidth;
    // later the observer reports it: at a change of theme the page may have no layout for a moment
    if (!this.result) this.isHidden = this.plot.offsetParent === null;
    for (const param of whole.params ?? []) if (param.name in this.words) param.value = this.lines(param.name);
    const old = this.result;
    this.result = null;
    this.held = {}; // by dataset: its fields, and its rows in the view
    old?.finalize();
    const result = await this.vega.vegaEmbed(this.plot, whole, {
      renderer: "svg",
      actions: false,
      logLevel: ERRORS,
      tooltip: { theme: dark ? "dark" : "light" },
      patch: (vega) => this.sized(vega),
    });
    if (this.closed) return void result.finalize();
    this.result = result;
    this.signals = new Set(Object.keys(result.view.getState({ signals: () => true, data: () => false }).signals));
    this.picks = PICKS.filter(({ param }) => this.signals.has(param));
    this.plot.classList.toggle("veloxlab-pickable", this.picks.length > 0);
    if (this.picks.length > 0) {
      result.view.addEventListener("click", (_event, item) => this.click(item?.datum));
      this.plot.tabIndex = 0;
    }
  }

  // The label for screen readers: heading, caption and keys.
  tell() {
    const said = this.picks.map(({ keys, name }) => `${keys.join(" and ")} pick a ${name}`);
    const keys = said.length > 0 ? `${said.join(", ")}, Escape clears it.` : "";
    const told = [this.words.heading ?? "Chart", this.words.caption, keys].filter(Boolean);
    this.plot.setAttribute("role", "group");
    this.plot.setAttribute("aria-label", told.map((words) => String(words).replace(/\.?$/, ".")).join(" "));
  }

  async patch(content) {
    const { view } = this.result;
    for (const [name, rows] of Object.entries(this.read(content))) this.replace(name, rows);
    this.words.caption = content.params.caption;
    const params = Object.entries(content.params).filter(([name]) => this.signals.has(name));
    for (const [name, value] of params) view.signal(name, name === "caption" ? this.lines(name) : value);
    document.getElementById("vg-tooltip-element")?.classList.remove("visible"); // it shows the old numbers
    await view.runAsync();
  }

  // Replace rows one by one: a row that stays keeps its marks in the page, and Vega computes only what depends on
  // changed fields.
  replace(name, rows) {
    const { view } = this.result;
    const fields = Object.keys(rows[0] ?? {});
    const held = this.held[name];
    if (held?.fields !== fields.join()) {
      view.data(name, rows);
      this.held[name] = { fields: fields.join(), tuples: rows };
      return;
    }
    const { tuples } = held;
    const kept = Math.min(tuples.length, rows.length);
    const changed = new Map();
    for (let i = 0; i < kept; i++) {
      for (const field of fields) {
        if (tuples[i][field] === rows[i][field]) continue;
        tuples[i][field] = rows[i][field];
        changed.set(field, tuples[i]);
      }
    }
    if (changed.size === 0 && tuples.length === rows.length) return;
    const changes = view.changeset().reflow(); // all rows: an unchanged bar moves with the bars below it
    for (const [field, tuple] of changed) changes.modify(tuple, field, tuple[field]);
    view.change(name, changes.remove(tuples.slice(kept)).insert(rows.slice(kept)));
    held.tuples = [...tuples.slice(0, kept), ...rows.slice(kept)];
  }

  // ---- the size of the chart

  // A chart of a page is as wide as its column; any other chart has its own width, or a smaller one.
  get stretches() {
    return this.el.closest(".veloxlab-grid") !== null;
  }

  lines(name) {
    const room = this.stretches ? Math.max(this.room - this.left - MARGIN, 120) : Infinity;
    return wrapped(this.words[name], WORDS[name] + this.font, room);
  }

  // A new view starts with the sizes of the old one.
  sized(vega) {
    this.sizes = sizesIn(vega);
    if (this.fixed || !this.stretches) return vega;
    const sizes = new Map(this.scaled());
    for (const signal of vega.signals ?? []) if (sizes.has(signal.name)) signal.value = sizes.get(signal.name);
    for (const side of ["width", "height"]) if (sizes.has(side)) vega[side] = sizes.get(side);
    return vega;
  }

  // A compact page has lower plots.
  get height() {
    return Number(getComputedStyle(this.el).getPropertyValue("--veloxlab-height")) || 1;
  }

  scaled() {
    const { across, down } = this.sizes;
    this.down = this.height;
    return [
      ...across.map(([name, value]) => [name, value * this.across]),
      ...down.map(([name, value, square]) => [name, value * (square ? this.across : this.down)]),
    ];
  }

  get svg() {
    return this.plot.querySelector("svg.marks");
  }

  // The width of the chart without heading and caption, which have their own lines. The width of the svg element itself
  // is wrong for a moment: Vega updates it later than the parts.
  get width() {
    const parts = [...this.svg.querySelectorAll(".role-axis, .role-legend, .role-mark")];
    const boxes = parts.map((part) => part.getBoundingClientRect()).filter(({ width }) => width > 0);
    if (boxes.length === 0) return Number(this.svg.getAttribute("width"));
    const wide = Math.max(...boxes.map(({ right }) => right)) - Math.min(...boxes.map(({ left }) => left));
    const zoom = this.svg.getBoundingClientRect().width / Number(this.svg.getAttribute("width"));
    return wide / zoom + 2 * PADDING;
  }

  // Fit plots and words to the room. The first step shows how much a chart grows with its plots.
  async fit() {
    if (!this.result || !this.stretches || this.room < 1) return;
    const { view } = this.result;
    const left = Number(this.svg.firstElementChild.getAttribute("transform").match(/[\d.]+/)?.[0] ?? this.left);
    if (this.shown.room !== this.room || Math.abs(left - this.left) > 8) {
      this.left = left; // of the first plot; words start there
      for (const name of Object.keys(this.words)) if (this.signals.has(name)) view.signal(name, this.lines(name));
      await view.runAsync();
    }
    for (let step = 0; step < 4 && !this.fixed && this.sizes.across.length > 0; step++) {
      const had = this.width;
      const left = this.room - had;
      const most = had / this.across; // if the whole chart grew with the plots
      const slope = Math.min(Math.max(this.slope ?? most, 0.3 * most), most);
      const to = Math.min(Math.max(this.across + left / slope, STRETCH[0]), STRETCH[1]);
      const fits = (left >= 0 && left < 4) || Math.abs(to - this.across) < 0.005;
      if ((fits && this.down === this.height) || this.closed) return;
      const by = to - this.across;
      this.across = to;
      for (const [name, value] of this.scaled()) view.signal(name, value);
      await view.runAsync();
      if (Math.abs(by) > 0.02) this.slope = (this.width - had) / by;
    }
  }

  read(content) {
    const entries = Object.entries(content.datasets).map(([name, payload]) => [name, rowsOf(payload)]);
    this.datasets = Object.fromEntries(entries);
    return this.datasets;
  }

  // ---- picks: numbers or null, shared by linked charts through their models

  async mark() {
    if (!this.result || this.isHidden) return;
    const { view } = this.result;
    const news = this.picks.filter(({ param, trait }) => view.signal(param) !== this.model.get(trait));
    for (const { param, trait } of news) view.signal(param, this.model.get(trait));
    if (news.length > 0) await view.runAsync();
  }

  // A second click on a layer, or on a cell of layer and head, clears the picked layer, as does a click outside all layers
  // in a chart of layers alone. Other picks stay until the next pick.
  click(datum) {
    const found = this.picks.map((pick) => [pick, valueOf(datum, pick.fields)]);
    const hit = found.filter(([, value]) => value !== null);
    const again = hit.every(([pick, value]) => value === this.model.get(pick.trait));
    const clears = again && this.picks[0]?.name === "layer" && (hit.length > 0 || this.picks.length === 1);
    if (clears) this.pick(this.picks[0], null);
    else for (const [pick, value] of hit) this.pick(pick, value);
  }

  pick({ trait }, value) {
    if (value === this.model.get(trait)) return;
    this.model.set(trait, value);
    this.model.save_changes();
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    let used = false;
    for (const pick of this.picks) {
      const values = valuesIn(this.datasets, pick.fields);
      const now = this.model.get(pick.trait);
      const after = values.findIndex((value) => value > (now ?? -1));
      const before = values.findLast((value) => value < (now ?? Infinity));
      const [back, on] = pick.keys;
      const to = {
        [on]: after < 0 ? values.at(-1) : values[after],
        [back]: before ?? values[0],
        Home: values[0],
        End: values.at(-1),
        Escape: null,
      };
      if (!(event.key in to)) continue;
      used = true;
      this.pick(pick, to[event.key]);
    }
    if (!used) return;
    event.preventDefault();
    event.stopImmediatePropagation();
  }

  close() {
    this.closed = true;
    this.names.disconnect();
    this.result?.finalize();
    this.result = null;
    this.note.remove();
    this.plot.remove();
    this.sentence.remove();
  }
}

async function render({ model, el }) {
  const closers = [];
  const listen = (target, event, handler) => {
    target.on(event, handler);
    closers.push(() => target.off(event, handler));
  };
  let chart;
  try {
    const { version, code, themes } = await runtimeOf(model);
    chart = new Chart(model, el, await importOnce(version, code), themes);
  } catch (error) {
    const sentence = el.appendChild(document.createElement("p"));
    sentence.className = "veloxlab-sentence";
    sentence.textContent = `The chart library could not be loaded (${error.message ?? error}). Run this cell again.`;
    return () => {};
  }
  const update = () => chart.update();
  listen(model, "change:spec", update);
  listen(model, "change:content", update);
  for (const { trait } of PICKS) listen(model, `change:${trait}`, () => chart.mark());
  listen(model, "change:note", () => chart.annotate());
  closers.push(onBackground(update));
  const seen = new ResizeObserver(([{ contentRect }]) => {
    chart.resize(contentRect);
    chart.update().then(() => chart.mark());
  });
  seen.observe(chart.plot);
  closers.push(() => seen.disconnect());

  // JupyterLab takes arrow keys at the document, before the chart gets them, so listen at the window, which is earlier.
  // Only while the chart has the focus, and only for its keys.
  const key = (event) => chart.key(event);
  const focus = () => window.addEventListener("keydown", key, true);
  const blur = () => window.removeEventListener("keydown", key, true);
  chart.plot.addEventListener("focusin", focus);
  chart.plot.addEventListener("focusout", blur);
  closers.push(blur, () => chart.close());

  await update();
  return () => closers.forEach((close) => close());
}

// Notebook 7 keeps arrow keys from sliders, except with this attribute: https://github.com/jupyter/notebook/issues/7716
globalThis.veloxlabSliders ??= document.addEventListener("focusin", (event) => {
  const handle = event.target.closest?.("[class*='veloxlab-'] .noUi-handle");
  handle?.setAttribute("data-lm-suppress-shortcuts", "true");
}) ?? true;

export default { render };
