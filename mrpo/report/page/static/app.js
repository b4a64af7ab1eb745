// The trace browser: filters, list, the open trace, keys, and the address that leads back to all of it.
"use strict";

(() => {
  const section = document.getElementById("traces");
  if (!section || !section.dataset.chunks) return;

  const { store, trace: view, element } = Report;
  const form = section.querySelector("form");
  const count = section.querySelector("output");
  const detail = section.querySelector(".detail");
  const total = Number(section.dataset.total);
  const NAMES = ["wrong", "early", "unjudged", "model", "dataset", "from", "to", "text"];
  const list = new Report.VirtualList(section.querySelector(".list"), view.row, (trace) => open(trace));

  let current = null;
  let wanted = null; // the key of a trace that the address names and that is not loaded yet
  let failures = [];

  const field = (name) => form.elements.namedItem(name);

  function filters() {
    const value = (name) => (field(name).type === "checkbox" ? field(name).checked : field(name).value);
    return Object.fromEntries(NAMES.map((name) => [name, value(name)]));
  }

  function writeAddress() {
    const address = new URLSearchParams();
    if (current) address.set("trace", current.key);
    for (const [name, value] of Object.entries(filters())) {
      if (value) address.set(name, value === true ? "1" : value);
    }
    history.replaceState(null, "", `#${address.toString() || "traces"}`);
  }

  function readAddress() {
    const address = new URLSearchParams(location.hash.slice(1));
    if (![...address.keys()].some((name) => name === "trace" || NAMES.includes(name))) return;
    for (const name of NAMES) {
      const value = address.get(name) ?? "";
      if (field(name).type === "checkbox") field(name).checked = value !== "";
      else {
        if (field(name).tagName === "SELECT") offer(field(name), [value]);
        field(name).value = value;
      }
    }
    wanted = address.get("trace");
    refresh();
    section.scrollIntoView();
  }

  /** Add options that a selection lacks; its first one stands for all. */
  function offer(select, values) {
    const known = new Set([...select.options].map((option) => option.value));
    for (const value of values) {
      if (!known.has(value)) select.append(element("option", { value }, value));
    }
  }

  function say(shown) {
    const loading = TRACES.length < total && failures.length === 0 ? `, loading ${total.toLocaleString("en")}` : "";
    const of = TRACES.length.toLocaleString("en");
    count.textContent = `${shown.toLocaleString("en")} of ${of} traces${loading}`;
    if (failures.length) count.textContent += ` (could not load ${failures.join(", ")})`;
  }

  function refresh() {
    const linked = wanted === null ? undefined : store.find(wanted);
    const items = store.select(filters());
    list.show(items, linked ?? current);
    say(items.length);
    if (linked) {
      wanted = null;
      open(linked);
    } else if (wanted !== null && (TRACES.length >= total || failures.length)) {
      detail.replaceChildren(element("p", { class: "note" }, `This report has no trace ${wanted}.`));
    }
  }

  function open(trace) {
    current = trace;
    list.chosen = list.items.indexOf(trace);
    list.reveal();
    detail.replaceChildren(...view.detail(trace, store.group(trace), open).filter(Boolean));
    detail.scrollTop = 0;
    writeAddress();
  }

  function onKey(event) {
    const typing = event.target instanceof Element && event.target.closest("input, select, textarea");
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && typing) typing.blur();
    if (typing) return;
    if (event.key === "j" || event.key === "k") {
      const { top } = section.getBoundingClientRect();
      if (top > innerHeight / 2) section.scrollIntoView();
      list.move(event.key === "j" ? 1 : -1);
    } else if (event.key === "/") {
      event.preventDefault();
      section.scrollIntoView();
      field("text").focus();
    }
  }

  function onFilter() {
    wanted = null;
    list.box.scrollTop = 0;
    refresh();
    list.reveal();
    writeAddress();
  }

  let pending = 0;
  form.addEventListener("input", (event) => {
    if (event.target.tagName === "SELECT") return;
    clearTimeout(pending);
    // While words are typed, the last letter decides.
    if (event.target.type === "search") pending = setTimeout(onFilter, 120);
    else onFilter();
  });
  // Not every way of choosing an option makes an input event, all make this one.
  form.addEventListener("change", (event) => {
    if (event.target.tagName === "SELECT") onFilter();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(onFilter));
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", readAddress);

  readAddress();
  store
    .load(Number(section.dataset.chunks), (failed) => {
      failures = failed;
      offer(field("model"), store.distinct("model"));
      offer(field("dataset"), store.distinct("dataset"));
      refresh();
    })
    .then(() => section.setAttribute("data-loaded", ""));
})();
