// A page without Jupyter: a stand-in for a widget's model, and a count of the open listeners.
window.lab = (() => {
  const held = new Set();
  const counted = (target) => target === window || target instanceof MediaQueryList;
  const { addEventListener, removeEventListener } = EventTarget.prototype;
  EventTarget.prototype.addEventListener = function (type, handler, options) {
    if (counted(this)) held.add(handler);
    return addEventListener.call(this, type, handler, options);
  };
  EventTarget.prototype.removeEventListener = function (type, handler, options) {
    held.delete(handler);
    return removeEventListener.call(this, type, handler, options);
  };
  const { observe, disconnect } = MutationObserver.prototype;
  MutationObserver.prototype.observe = function (...given) {
    held.add(this);
    return observe.apply(this, given);
  };
  MutationObserver.prototype.disconnect = function () {
    held.delete(this);
    return disconnect.call(this);
  };

  const model = (state, runtime, shared) => {
    const handlers = new Map();
    const sent = [];
    let saves = 0;
    const of = (event) => handlers.get(event) ?? handlers.set(event, []).get(event);
    return {
      sent,
      listeners: () => [...handlers.values()].flat().length,
      get: (key) => state[key],
      set(key, value) {
        if (state[key] === value) return;
        state[key] = value;
        for (const handler of [...of(`change:${key}`)]) handler();
      },
      save_changes: () => void saves++,
      saves: () => saves,
      on: (event, handler) => of(event).push(handler),
      off: (event, handler) => handlers.set(event, of(event).filter((other) => other !== handler)),
      send(message) {
        sent.push(message);
        for (const handler of [...of("msg:custom")]) handler({ runtime });
      },
      widget_manager: shared && { get_model: async () => ({ get: (key) => runtime[key] }) },
    };
  };

  // calls that make the page compute its layout
  let measures = 0;
  const counting = (owner, name) => {
    const { get, value, ...rest } = Object.getOwnPropertyDescriptor(owner, name);
    const counted = (whole) => whole && function (...given) {
      measures++;
      return whole.apply(this, given);
    };
    Object.defineProperty(owner, name, get ? { ...rest, get: counted(get) } : { ...rest, value: counted(value) });
  };

  const charts = {};
  return {
    measures: () => measures,
    countMeasures() {
      for (const name of ["offsetParent", "offsetWidth", "offsetHeight"]) counting(HTMLElement.prototype, name);
      for (const name of ["clientWidth", "clientHeight", "getBoundingClientRect"]) counting(Element.prototype, name);
    },
    charts,
    pageListeners: () => held.size,
    async open(name, code, state, runtime, shared = true) {
      const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
      const widget = (await import(url)).default;
      const el = document.body.appendChild(document.createElement("div"));
      el.id = name;
      const chart = { model: model(state, runtime, shared), el };
      charts[name] = chart;
      chart.draw = async () => {
        chart.cleanup = await widget.render({ model: chart.model, el });
      };
      await chart.draw();
    },
    // as ipywidgets' jslink does, in both directions
    link(one, other) {
      for (const [from, to] of [[one, other], [other, one]])
        charts[from].model.on("change:picked", () => charts[to].model.set("picked", charts[from].model.get("picked")));
    },
  };
})();
