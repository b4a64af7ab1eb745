// A list of any length of which only the rows in view are elements.
"use strict";

/**
 * `render(item)` gives the content of a row, `choose(item)` is called when one is chosen. Rows are as high as the
 * custom property --row-height of `box` says.
 */
Report.VirtualList = class {
  static MARGIN = 6; // rows kept beyond either edge

  constructor(box, render, choose) {
    this.box = box;
    this.render = render;
    this.choose = choose;
    this.items = [];
    this.chosen = -1;
    this.rows = new Map();
    this.canvas = Report.element("div", { class: "list-canvas", role: "presentation" });
    box.append(this.canvas);
    box.addEventListener("scroll", () => this.draw(), { passive: true });
    box.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("click", (event) => {
      const row = event.target.closest("[data-place]");
      if (row) this.pick(Number(row.dataset.place));
    });
    new ResizeObserver(() => this.draw()).observe(box);
  }

  get rowHeight() {
    return parseFloat(getComputedStyle(this.box).getPropertyValue("--row-height"));
  }

  /** Show `items`; `chosen` is the one marked as chosen, or null. */
  show(items, chosen) {
    this.items = items;
    this.chosen = chosen === null ? -1 : items.indexOf(chosen);
    this.canvas.style.height = `${items.length * this.rowHeight}px`;
    this.canvas.replaceChildren();
    this.rows.clear();
    this.draw();
  }

  draw() {
    const height = this.rowHeight;
    const { MARGIN } = Report.VirtualList;
    const first = Math.max(0, Math.floor(this.box.scrollTop / height) - MARGIN);
    const end = Math.ceil((this.box.scrollTop + this.box.clientHeight) / height) + MARGIN;
    const last = Math.min(this.items.length, end);
    for (const [place, row] of this.rows) {
      if (place < first || place >= last) {
        row.remove();
        this.rows.delete(place);
      }
    }
    for (let place = first; place < last; place++) {
      if (!this.rows.has(place)) this.rows.set(place, this.canvas.appendChild(this.row(place, height)));
    }
    this.mark();
  }

  row(place, height) {
    const attributes = {
      class: "row",
      role: "option",
      id: `row-${place}`,
      "data-place": place,
      "aria-setsize": this.items.length,
      "aria-posinset": place + 1,
    };
    const row = Report.element("div", attributes, this.render(this.items[place]));
    row.style.top = `${place * height}px`;
    return row;
  }

  mark() {
    for (const [place, row] of this.rows) row.setAttribute("aria-selected", String(place === this.chosen));
    const inView = this.rows.has(this.chosen);
    if (inView) this.box.setAttribute("aria-activedescendant", `row-${this.chosen}`);
    else this.box.removeAttribute("aria-activedescendant");
  }

  /** Choose the row at `place`, as near as there is one, and scroll it into view. */
  pick(place) {
    if (this.items.length === 0) return;
    this.chosen = Math.min(Math.max(place, 0), this.items.length - 1);
    this.reveal();
    this.choose(this.items[this.chosen]);
  }

  /** Choose the row `by` places on; with none chosen, one on is the first. */
  move(by) {
    this.pick(this.chosen + by);
  }

  reveal() {
    const height = this.rowHeight;
    const top = this.chosen * height;
    const bottom = top + height - this.box.clientHeight;
    if (this.chosen >= 0 && top < this.box.scrollTop) this.box.scrollTop = top;
    else if (this.chosen >= 0 && bottom > this.box.scrollTop) this.box.scrollTop = bottom;
    this.draw();
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.box.clientHeight / this.rowHeight) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key in steps && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      this.move(steps[event.key]);
    }
  }
};
