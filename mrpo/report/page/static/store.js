// The traces: loaded chunk by chunk with script tags, which is what a page on disk may do, and filtered in memory.
"use strict";

window.TRACES = [];

Report.store = (() => {
  const byKey = new Map();
  const groups = new Map();
  const haystacks = new WeakMap();
  const values = { model: new Set(), dataset: new Set() };
  let indexed = 0;

  /** Completions of one question at one time by one model belong together. */
  const groupKey = (trace) => JSON.stringify([trace.model, trace.step, trace.dataset, trace.id]);

  function index() {
    for (; indexed < TRACES.length; indexed++) {
      const trace = TRACES[indexed];
      byKey.set(trace.key, trace);
      for (const field of Object.keys(values)) values[field].add(trace[field]);
      const key = groupKey(trace);
      if (groups.has(key)) groups.get(key).push(trace);
      else groups.set(key, [trace]);
    }
  }

  function loadScript(source) {
    return new Promise((resolve, reject) => {
      const script = Report.element("script", { src: source });
      script.onload = resolve;
      script.onerror = () => reject(new Error(source));
      document.head.append(script);
    });
  }

  /** Load chunks one after the other; `progress(failed)` is called after each, with the names of those not loaded. */
  async function load(chunks, progress) {
    const failed = [];
    for (let chunk = 0; chunk < chunks; chunk++) {
      const source = `data/traces-${String(chunk).padStart(4, "0")}.js`;
      await loadScript(source).catch((error) => failed.push(error.message));
      index();
      progress(failed);
    }
  }

  /** All words of a trace, in small letters, for the text search. */
  function haystack(trace) {
    if (!haystacks.has(trace)) {
      const completion = trace.parts.map((part) => (typeof part === "number" ? trace.steps[part].text : part));
      const reasons = trace.steps.map((step) => step.reason);
      const texts = [trace.id, trace.question, trace.gold, trace.rationale, completion.join(""), ...reasons];
      haystacks.set(trace, texts.join("\n").toLowerCase());
    }
    return haystacks.get(trace);
  }

  /** The traces that meet every condition of `filters`; its text is of words and of "quoted phrases". */
  function select(filters) {
    const words = (filters.text.toLowerCase().match(/"[^"]+"|\S+/g) ?? []).map((word) => word.replaceAll('"', ""));
    const first = filters.from === "" ? -Infinity : Number(filters.from);
    const last = filters.to === "" ? Infinity : Number(filters.to);
    const anyStep = filters.from === "" && filters.to === "";
    return TRACES.filter(
      (trace) =>
        (!filters.wrong || trace.correct === false) &&
        (!filters.early || trace.stage === "early") &&
        (!filters.unjudged || trace.unjudged !== null) &&
        (filters.model === "" || trace.model === filters.model) &&
        (filters.dataset === "" || trace.dataset === filters.dataset) &&
        (anyStep || (trace.step !== null && first <= trace.step && trace.step <= last)) &&
        words.every((word) => haystack(trace).includes(word)),
    );
  }

  /** What the loaded traces have in a field, "model" or "dataset". */
  const distinct = (field) => [...values[field]].filter((value) => value !== "").sort();
  const varies = (field) => values[field].size > 1;

  const find = (key) => byKey.get(key);
  const group = (trace) => groups.get(groupKey(trace));

  return { load, select, distinct, varies, find, group };
})();
