// Elements from data. Strings become text nodes and nothing else: no text of a model, a data set or a judge is ever
// parsed as markup.
"use strict";

window.Report = {};

/** An element with attributes (null and false are left out, true is empty) and children: elements, strings, null. */
Report.element = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(name, value === true ? "" : String(value));
    }
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
};

Report.UNDEFINED = "–";

/** A number with its sign where wanted; an en dash for what is undefined. */
Report.number = (value, digits = 2, signed = false) => {
  if (value === null || value === undefined) return Report.UNDEFINED;
  const text = Number.isInteger(value) && digits === 0 ? value.toLocaleString("en") : value.toFixed(digits);
  return (signed && value > 0 ? "+" : "") + text.replace("-", "−");
};

/** How a verdict is shown: never by colour alone. */
Report.MARKS = {
  true: { symbol: "✓", name: "valid", kind: "good" },
  false: { symbol: "✗", name: "invalid", kind: "bad" },
  null: { symbol: "?", name: "unjudged", kind: "unknown" },
};
