// Draws one Vega-Lite chart and keeps it: new numbers patch the running Vega view, only a new spec or ground embeds anew.

const PAGE = Symbol.for("veloxlab.vega"); // one import of the bundle per page, whatever the number of charts

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

// JupyterLab lets a view reach the shared runtime model. Other hosts may not: there the kernel is asked for a copy.
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

// ---- the ground that the chart stands on

function luminance([r, g, b]) {
  return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
}

function isDark(el) {
  const { dataset, classList } = document.body;
  if (dataset.jpThemeLight) return dataset.jpThemeLight === "false";
  if (classList.contains("vscode-light") || classList.contains("vscode-high-contrast-light")) return false;
  if (classList.contains("vscode-dark") || classList.contains("vscode-high-contrast")) return true;
  for (let node = el; node instanceof Element; node = node.parentElement ?? node.getRootNode().host) {
    const parts = getComputedStyle(node).backgroundColor.match(/[\d.]+/g)?.map(Number) ?? [];
    if (parts.length >= 3 && (parts[3] ?? 1) > 0.5) return luminance(parts) < 0.5;
  }
  // a page that does not opt in to dark stays white, whatever the system prefers
  const scheme = getComputedStyle(document.documentElement).colorScheme;
  return scheme.includes("dark") && (!scheme.includes("light") || matchMedia("(prefers-color-scheme: dark)").matches);
}

function onGround(changed) {
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

function rowsOf(payload) {
  return JSON.parse(typeof payload === "string" ? payload : text.decode(payload));
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

// Vega numbers gradients from 0, and so does JupyterLab's own Vega on the same page: without names of our own the legend
// of one chart would show the colours of another. A redraw brings Vega's names back.
let gradients = 0;

function ownGradients(plot) {
  for (const gradient of plot.querySelectorAll("linearGradient[id^='gradient_']")) {
    const [name, own] = [gradient.id, `veloxlab-${gradients++}`];
    gradient.id = own;
    for (const filled of plot.querySelectorAll(`[fill$='#${name})'], [data-gradient='${name}']`)) {
      filled.dataset.gradient = name;
      filled.setAttribute("fill", `url(#${own})`);
    }
  }
}

const PICKED = "picked_layer";

function layersIn(datasets) {
  const layers = Object.values(datasets).flatMap((rows) => rows.map((row) => row.layer));
  return [...new Set(layers.filter(Number.isInteger))].sort((a, b) => a - b);
}

// ---- one chart in one element

class Chart {
  constructor(model, el, vega, themes) {
    Object.assign(this, { model, el, vega, themes, result: null, shown: {}, closed: false });
    this.plot = el.appendChild(document.createElement("div"));
    this.plot.className = "veloxlab-chart";
    this.sentence = el.appendChild(document.createElement("p"));
    this.sentence.className = "veloxlab-sentence";
    this.sentence.setAttribute("role", "alert");
    this.sentence.hidden = true;
    this.turn = Promise.resolve();
  }

  // One step at a time; a step always draws the newest state, so steps that find nothing new end at once.
  update() {
    this.turn = this.turn.then(() => (this.closed ? undefined : this.step())).then(
      (drew) => drew && this.say(""),
      (error) => this.say(`This chart could not be drawn: ${error.message ?? error}`),
    );
    return this.turn;
  }

  // On a page of tabs that is not open: what nobody sees is drawn once it is seen.
  get isHidden() {
    return this.result !== null && this.el.isConnected && this.plot.offsetParent === null;
  }

  say(sentence) {
    this.sentence.textContent = sentence;
    this.sentence.hidden = !sentence;
  }

  async step() {
    const { model, shown } = this;
    const spec = model.get("spec");
    const content = model.get("content");
    if (content.spec !== spec.id) return false; // its spec is still on the way
    if (this.isHidden) return false;
    const dark = isDark(this.el);
    if (!this.result || spec.id !== shown.spec || dark !== shown.dark) await this.embed(spec, content, dark);
    else if (content.revision !== shown.revision) await this.patch(content);
    else return false;
    this.shown = { spec: spec.id, dark, revision: content.revision };
    await this.mark();
    ownGradients(this.plot);
    if (!this.closed && model.get("rendered") !== content.revision) {
      model.set("rendered", content.revision);
      model.save_changes();
    }
    return true;
  }

  async embed(spec, content, dark) {
    const datasets = this.read(content);
    const values = { ...content.params, [PICKED]: this.model.get("picked") };
    const whole = specOf(spec.json, this.themes[dark ? "dark" : "light"], datasets, values);
    const old = this.result;
    this.result = null;
    old?.finalize();
    const result = await this.vega.vegaEmbed(this.plot, whole, {
      renderer: "svg",
      actions: false,
      tooltip: { theme: dark ? "dark" : "light" },
    });
    if (this.closed) return void result.finalize();
    this.result = result;
    this.signals = new Set(Object.keys(result.view.getState({ signals: () => true, data: () => false }).signals));
    const pickable = this.signals.has(PICKED);
    this.plot.classList.toggle("veloxlab-pickable", pickable);
    if (pickable) {
      result.view.addEventListener("click", (_event, item) => this.pick(item?.datum?.layer));
      this.plot.tabIndex = 0;
      this.plot.setAttribute("role", "group");
      this.plot.setAttribute("aria-label", "Chart. Left and right arrow keys pick a layer, Escape clears it.");
    }
  }

  async patch(content) {
    const { view } = this.result;
    for (const [name, rows] of Object.entries(this.read(content))) view.data(name, rows);
    for (const [name, value] of Object.entries(content.params)) if (this.signals.has(name)) view.signal(name, value);
    await view.runAsync();
  }

  read(content) {
    const entries = Object.entries(content.datasets).map(([name, payload]) => [name, rowsOf(payload)]);
    const datasets = Object.fromEntries(entries);
    this.layers = layersIn(datasets);
    return datasets;
  }

  // ---- the picked layer: one number or null, shared by linked charts through their models

  async mark() {
    if (!this.result || this.isHidden || !this.signals.has(PICKED)) return;
    const picked = this.model.get("picked");
    if (this.result.view.signal(PICKED) === picked) return;
    await this.result.view.signal(PICKED, picked).runAsync();
    ownGradients(this.plot);
  }

  pick(layer) {
    const next = Number.isInteger(layer) && layer !== this.model.get("picked") ? layer : null;
    if (next === this.model.get("picked")) return;
    this.model.set("picked", next);
    this.model.save_changes();
  }

  key(event) {
    const { layers, model } = this;
    const at = layers.indexOf(model.get("picked"));
    const to = {
      ArrowRight: layers[Math.min(at + 1, layers.length - 1)],
      ArrowLeft: layers[at < 0 ? layers.length - 1 : Math.max(at - 1, 0)],
      Home: layers[0],
      End: layers.at(-1),
      Escape: null,
    };
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || !(event.key in to)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    if (to[event.key] !== model.get("picked")) this.pick(to[event.key]);
  }

  close() {
    this.closed = true;
    this.result?.finalize();
    this.result = null;
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
  listen(model, "change:picked", () => chart.mark());
  closers.push(onGround(update));
  const seen = new ResizeObserver(() => chart.update().then(() => chart.mark()));
  seen.observe(chart.plot);
  closers.push(() => seen.disconnect());

  // JupyterLab takes arrow keys at the document, before the chart sees them; the window comes first. Only while the
  // chart has the focus, and only the keys that it uses.
  const key = (event) => chart.key(event);
  const focus = () => window.addEventListener("keydown", key, true);
  const blur = () => window.removeEventListener("keydown", key, true);
  chart.plot.addEventListener("focusin", focus);
  chart.plot.addEventListener("focusout", blur);
  closers.push(blur, () => chart.close());

  await update();
  return () => closers.forEach((close) => close());
}

// Notebook 7 keeps arrow keys from sliders (https://github.com/jupyter/notebook/issues/7716); not from one that says so.
globalThis.veloxlabSliders ??= document.addEventListener("focusin", (event) => {
  const handle = event.target.closest?.("[class*='veloxlab-'] .noUi-handle");
  handle?.setAttribute("data-lm-suppress-shortcuts", "true");
}) ?? true;

export default { render };
