// One trace as elements: a row of the list, and the whole of it beside the list.
"use strict";

Report.trace = (() => {
  const { element, number, MARKS, UNDEFINED } = Report;

  const ANSWERS = { true: "right answer", false: "wrong answer", null: "no verdict on the answer" };
  const YES_NO = { true: "yes", false: "no" };
  const SQUARES = 14; // of a row's steps; longer chains end in a dot

  const mark = (verdict, names) => {
    const { symbol, kind } = MARKS[verdict];
    return element("span", { class: `mark ${kind}`, role: "img", "aria-label": names[verdict] }, symbol);
  };

  function squares(trace) {
    const shown = trace.steps.slice(0, SQUARES).map((step) => element("i", { class: MARKS[step.valid].kind }));
    const text = trace.steps.map((step) => MARKS[step.valid].name).join(", ");
    const label = trace.steps.length ? `steps: ${text}` : "no steps";
    const more = trace.steps.length > SQUARES ? "…" : null;
    return element("span", { class: "squares", role: "img", "aria-label": label }, shown, more);
  }

  /** Where a trace comes from, without what all have in common. */
  function place(trace) {
    const { varies } = Report.store;
    const parts = [varies("dataset") && trace.dataset, varies("model") && trace.model];
    if (trace.step !== null) parts.push(`step ${trace.step}`);
    return parts.filter(Boolean).join(" · ");
  }

  /** The content of a row: verdict on the answer, question, answer, steps, where it comes from. */
  const row = (trace) => [
    mark(trace.correct, ANSWERS),
    element("span", { class: "row-question" }, trace.question || trace.id),
    element("span", { class: "row-place" }, place(trace)),
    element("span", { class: "row-answer" }, trace.answer ?? "no answer"),
    squares(trace),
  ];

  const fact = (name, value) => [element("dt", {}, name), element("dd", {}, value)];

  const chip = (kind, ...content) => element("span", { class: `chip ${kind}` }, ...content);

  function chips(trace) {
    const stage = trace.stage && `${trace.stage} failure`;
    return element(
      "p",
      { class: "chips" },
      chip(MARKS[trace.correct].kind, `${MARKS[trace.correct].symbol} ${ANSWERS[trace.correct]}`),
      stage && chip("bad", stage),
      trace.unjudged === null ? null : chip("unknown", "? unjudged"),
      chip("", trace.model),
      trace.dataset ? chip("", trace.dataset) : null,
      trace.step === null ? null : chip("", `step ${trace.step}`),
      trace.finish ? chip(trace.finish === "length" ? "unknown" : "", `finish: ${trace.finish}`) : null,
      trace.tokens === null ? null : chip("", `${trace.tokens} tokens`),
    );
  }

  function picture(image, index) {
    if (image.src === undefined) {
      return element("div", { class: "no-image" }, "image missing", element("small", {}, image.missing));
    }
    const { src, width, height } = image;
    const small = Math.max(width, height) <= 128;
    const alt = `image ${index + 1} of the question`;
    const shown = element("img", { src, width, height, alt, class: small && "pixels" });
    const attributes = { type: "button", class: "picture", "aria-pressed": "false", title: "enlarge" };
    const button = element("button", attributes, shown);
    shown.addEventListener("error", () => button.replaceWith(picture({ missing: src }, index)));
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.classList.toggle("large")));
    });
    return button;
  }

  function pictures(trace) {
    if (trace.images.length === 0) return element("div", { class: "no-image" }, "no image recorded");
    return element("div", { class: "pictures" }, trace.images.map(picture));
  }

  function facts(trace) {
    return element(
      "dl",
      { class: "facts" },
      fact("Answer", trace.answer === null ? element("em", {}, "none") : trace.answer),
      fact("Gold answer", trace.gold || UNDEFINED),
      fact("Gold rationale", trace.rationale || element("em", {}, "none")),
      trace.unjudged === null ? [] : fact("Unjudged", trace.unjudged || "the judge gave no verdict"),
    );
  }

  function rewards(trace) {
    const values = Object.entries(trace.reward).map(([name, value]) => [`${name} reward`, number(value)]);
    if (trace.lexical !== null) values.push(["lexical match", number(trace.lexical)]);
    if (trace.exact !== null) values.push(["exact match", YES_NO[trace.exact]]);
    if (trace.advantage !== null) values.push(["advantage outside steps", number(trace.advantage, 2, true)]);
    if (values.length === 0) return null;
    const cell = ([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value));
    return element("dl", { class: "rewards" }, values.map(cell));
  }

  /** Shade an element by its advantage, relative to the largest of the trace. */
  function shade(node, advantage, largest) {
    if (advantage === null || largest === 0) return node;
    node.classList.add("shaded", advantage < 0 ? "negative" : "positive");
    node.style.setProperty("--weight", (Math.abs(advantage) / largest).toFixed(3));
    node.title = `advantage ${number(advantage, 3, true)}`;
    return node;
  }

  function largestAdvantage(trace) {
    return Math.max(0, ...[trace.advantage, ...trace.steps.map((step) => step.advantage)].map((a) => Math.abs(a ?? 0)));
  }

  /** One of the judge's two bits. */
  const bit = (name, value) => (value === null ? null : element("span", { class: "bit" }, `${name}: ${YES_NO[value]}`));

  function stepRow(step, index, largest) {
    const { kind } = MARKS[step.valid];
    const bits = [bit("gold alignment", step.gold), bit("answer contribution", step.answer)];
    return element(
      "li",
      { class: `step ${kind}`, "data-step": index },
      mark(step.valid, { true: "valid", false: "invalid", null: "unjudged" }),
      element("span", { class: "step-number" }, `${index + 1}`),
      element(
        "div",
        { class: "step-body" },
        element("p", { class: "step-text" }, step.text),
        element("p", { class: "reason" }, step.reason || null, bits),
      ),
      step.advantage === null
        ? null
        : shade(element("span", { class: "advantage" }, number(step.advantage, 2, true)), step.advantage, largest),
    );
  }

  function completion(trace, largest) {
    const body = element("p", { class: "completion" });
    for (const part of trace.parts) {
      if (typeof part === "number") {
        const step = trace.steps[part];
        const span = element("span", { class: `part ${MARKS[step.valid].kind}` });
        span.append(element("sup", {}, `${MARKS[step.valid].symbol}${part + 1}`), step.text);
        body.append(shade(span, step.advantage, largest));
      } else {
        body.append(shade(element("span", { class: "outside" }, part), trace.advantage, largest));
      }
    }
    return body;
  }

  function legend(largest) {
    const sample = (kind, text) => element("span", { class: `part ${kind}` }, text);
    const marks = [sample("good", "✓ valid"), sample("bad", "✗ invalid"), sample("unknown", "? unjudged")];
    const shades = [
      element("span", { class: "shaded positive full" }, `advantage +${largest.toFixed(2)}`),
      element("span", { class: "shaded negative full" }, `−${largest.toFixed(2)}`),
    ];
    return element("p", { class: "legend" }, marks, largest > 0 ? shades : null);
  }

  function siblings(trace, group, open) {
    if (group.length < 2) return null;
    const button = (other, index) => {
      const current = other === trace;
      const label = `completion ${index + 1} of ${group.length}, ${ANSWERS[other.correct]}`;
      const { kind, symbol } = MARKS[other.correct];
      const attributes = { type: "button", class: kind, "aria-current": current && "true", "aria-label": label };
      const node = element("button", attributes, `${index + 1} ${symbol}`);
      node.addEventListener("click", () => open(other));
      return node;
    };
    const attributes = { class: "siblings", "aria-label": "completions of this question" };
    return element("nav", attributes, "Completions ", group.map(button));
  }

  /** Everything about a trace. `group` are the completions of its question, `open` shows another of them. */
  function detail(trace, group, open) {
    const largest = largestAdvantage(trace);
    const steps = trace.steps.map((step, index) => stepRow(step, index, largest));
    return [
      element("h3", { class: "question" }, trace.question || trace.id),
      chips(trace),
      siblings(trace, group, open),
      element("div", { class: "evidence" }, pictures(trace), facts(trace)),
      rewards(trace),
      element("h4", {}, "Steps"),
      steps.length ? element("ol", { class: "steps" }, steps) : element("p", { class: "note" }, "No step was found."),
      element("h4", {}, "Completion as written"),
      legend(largest),
      completion(trace, largest),
      element("p", { class: "trace-id" }, trace.id),
    ];
  }

  return { row, detail };
})();
