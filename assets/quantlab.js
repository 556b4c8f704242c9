// Behaviour of the page's own HTML: sorting, details, chips, tooltips, copying, theme and language.
// Loaded once in the page's head; components call `quantlab.…` when they appear.
(() => {
  "use strict";

  // Figures: Gradio publishes its Plotly as window.Plotly when the first figure appears. The mode
  // bar already saves PNG; this adds SVG beside it.
  let plotly;
  Object.defineProperty(window, "Plotly", {
    configurable: true,
    get: () => plotly,
    set: (loaded) => {
      plotly = loaded;
      if (!loaded || loaded.quantlab) return;
      const react = loaded.react.bind(loaded);
      const svg = {
        name: "svg",
        title: "SVG",
        icon: loaded.Icons.disk,
        click: (figure) => loaded.downloadImage(figure, { format: "svg", filename: "quantlab" }),
      };
      loaded.quantlab = true;
      loaded.react = (element, data, layout, config) =>
        react(element, data, fitted(element, layout), { ...config, modeBarButtonsToAdd: [svg] });
    },
  });

  // Plotly cuts a title off that is wider than its figure: on a narrow page it takes more lines, and
  // the figure as much more height.
  const ruler = document.createElement("canvas").getContext("2d");
  function wrapped(text, size, family, width) {
    ruler.font = `${size}px ${family}`;
    const parts = text.match(/[\u3000-\u9fff\uff00-\uffef]|[^\s\u3000-\u9fff\uff00-\uffef]+|\s+/g) ?? [];
    const found = [""];
    for (const part of parts) {
      if (ruler.measureText(found.at(-1) + part.trimEnd()).width <= width) found[found.length - 1] += part;
      else found.push(part.trimStart());
    }
    return found.map((line) => line.trim()).filter(Boolean);
  }
  function fitted(element, layout) {
    const width = element.clientWidth - 16;
    const title = layout?.title;
    if (width < 100 || !title?.text || !layout.height) return layout;
    let more = 0;
    const fit = (one) => {
      if (!one?.text || one.text.includes("<")) return one;
      const found = wrapped(one.text, one.font.size, layout.font.family, width);
      more += 1.3 * one.font.size * (found.length - 1);
      return { ...one, text: found.join("<br>") };
    };
    const own = fit(title);
    // Plotly sets the last line of a title that has a subtitle where its only line would be.
    const fits = { ...own, pad: { ...title.pad, t: (title.pad?.t ?? 0) + more } };
    fits.subtitle = fit(title.subtitle);
    if (!more) return layout;
    const margin = { ...layout.margin, t: layout.margin.t + more };
    return { ...layout, title: fits, margin, height: layout.height + more };
  }

  const language = () => (document.documentElement.lang || "en").slice(0, 2);
  const dark = () => document.body.classList.contains("dark");

  // What the server needs to know about this browser tab.
  const client = () => ({
    dark: dark(),
    language: language(),
    run: new URL(location.href).searchParams.get("run") || "",
    lesson: new URL(location.href).searchParams.get("lesson") || "",
    step: Number(new URL(location.href).searchParams.get("step")) || 1,
  });

  // Events of the page's own markup go to the server one after another, by component: Gradio drops
  // one that comes while another of its kind is on its way. `answered` is told after each.
  const lines = {};
  const line = (id) => (lines[id] ??= { waiting: [], patience: null, trigger: null });
  function advance(id) {
    const own = line(id);
    if (own.patience || !own.trigger || !own.waiting.length) return;
    own.patience = setTimeout(() => answered(id), 20000); // What ends in an error is not answered.
    own.trigger(...own.waiting.shift());
  }
  function answered(id) {
    const own = line(id);
    clearTimeout(own.patience);
    // Gradio still holds the event for answered until this task is over.
    own.patience = setTimeout(() => {
      own.patience = null;
      advance(id);
    }, 0);
  }
  function inLine(id, trigger) {
    line(id).trigger = trigger;
    setTimeout(() => advance(id), 0);
    return (name, data) => {
      line(id).waiting.push([name, data]);
      advance(id);
    };
  }

  // Answers that are on their way at the same time arrive in any order, and Gradio paints each piece
  // by piece. Where answers for a place have crossed, it is painted once more when all have come.
  const places = {};
  const place = (id) => (places[id] ??= { open: 0, crossed: false, patience: null, again: null });
  function ask(id) {
    const own = place(id);
    own.open += 1;
    own.crossed ||= own.open > 1;
    clearTimeout(own.patience);
    own.patience = setTimeout(() => {
      own.open = 1;
      told(id); // Of what ends in an error nobody may be told.
    }, 20000);
  }
  function told(id) {
    const own = place(id);
    own.open = Math.max(0, own.open - 1);
    if (own.open) return;
    clearTimeout(own.patience);
    if (own.crossed) setTimeout(() => own.again?.(), 0);
    own.crossed = false;
  }
  // The component whose event `again` paints these places.
  function again(ids, trigger) {
    for (const id of ids) place(id).again = () => trigger("again", {});
  }

  // Have the page painted as it is now: by the timer unless a look is on its way, and after what a
  // person did in any case. One look at a time, so that no older answer follows a newer one.
  function look() {
    const own = line("probe");
    if (!own.waiting.some(([name]) => name === "look")) own.waiting.push(["look", {}]);
    advance("probe");
  }
  const tick = () => line("probe").patience || look();

  // A tab that was opened before the server knew the language and the theme is drawn again.
  function arrived() {
    const open = document.querySelector("#tabs [role=tab][aria-selected=true]");
    if (open && open.id !== "tab-compare-button") {
      line("probe").waiting.push(["client", client()]);
    }
    look();
  }

  // A press on a button counts although the page has moved under the pointer before its release,
  // because an estimate or a message has just come above it: the browser would make no click of it.
  document.addEventListener("pointerdown", (down) => {
    const button = down.button === 0 && down.pointerType === "mouse" && down.target.closest?.("button");
    if (!button) return;
    let clicked = false;
    const see = (event) => (clicked ||= button.contains(event.target));
    document.addEventListener("click", see, true);
    document.addEventListener("pointerup", (up) => setTimeout(() => {
      document.removeEventListener("click", see, true);
      const stayed = Math.hypot(up.clientX - down.clientX, up.clientY - down.clientY) < 5;
      if (stayed && !clicked && button.isConnected && !button.disabled) button.click();
    }, 0), { capture: true, once: true });
  }, true);

  // Tell the server when the theme or the language changes while the page is open.
  // And once the page has arrived, when its address names a lesson.
  function watchClient(trigger) {
    const linked = () => {
      if (document.querySelector("#header [data-run]")) trigger("linked", client());
      else setTimeout(linked, 50);
    };
    if (client().lesson) linked();
    let last = JSON.stringify([dark(), language()]);
    const look = () => {
      const now = JSON.stringify([dark(), language()]);
      if (now !== last) {
        last = now;
        trigger("client", client());
      }
    };
    new MutationObserver(look).observe(document.body, { attributeFilter: ["class"] });
    new MutationObserver(look).observe(document.documentElement, { attributeFilter: ["lang"] });
  }

  function setLanguage(chosen) {
    document.cookie = `quantlab_language=${chosen};path=/;max-age=31536000;samesite=lax`;
    location.reload();
  }

  // The address always names the run in view, so that a reload or a link finds it again.
  function followRun(element, watch) {
    const update = () => {
      const header = element.querySelector("[data-run]");
      const run = header?.dataset.run || null;
      const url = new URL(location.href);
      if (!header || url.searchParams.get("run") === run) return;
      if (run) url.searchParams.set("run", run);
      else url.searchParams.delete("run"); // The precomputed comparison has no address of its own.
      history.replaceState(history.state, "", url);
    };
    watch("value", update);
    update();
  }

  // Results table: sort by a heading, open a row. Both survive rows that arrive later.
  function table(element, watch) {
    const sort = { key: null, down: false };
    const open = new Set();

    function value(body) {
      if (sort.key === "name") return body.dataset.name;
      const cell = body.querySelector(`td[data-key="${sort.key}"]`);
      return cell && cell.dataset.value !== undefined ? Number(cell.dataset.value) : null;
    }
    function compare(a, b) {
      if (sort.key === null) return Number(a.dataset.index) - Number(b.dataset.index);
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      const order = typeof x === "string" ? x.localeCompare(y) : x - y;
      return sort.down ? -order : order;
    }
    function apply() {
      const grid = element.querySelector("table");
      if (!grid) return;
      const bodies = [...grid.tBodies];
      const sorted = [...bodies].sort(compare);
      if (sorted.some((body, place) => body !== bodies[place])) grid.append(...sorted);
      for (const button of grid.querySelectorAll("[data-sort]")) {
        const chosen = button.dataset.sort === sort.key;
        const direction = chosen ? (sort.down ? "descending" : "ascending") : "none";
        button.closest("th").setAttribute("aria-sort", direction);
      }
      for (const body of grid.tBodies) {
        const shown = open.has(body.dataset.variant);
        const row = body.querySelector(".ql-details");
        if (row) row.hidden = !shown;
        body.querySelector("[data-details]")?.setAttribute("aria-expanded", String(shown));
      }
    }
    element.addEventListener("click", (event) => {
      const heading = event.target.closest("[data-sort]");
      const details = event.target.closest("[data-details]");
      if (heading) {
        // Once up, once down, then back to the order of the variants.
        const again = sort.key === heading.dataset.sort;
        sort.key = again && sort.down ? null : heading.dataset.sort;
        sort.down = again && !sort.down;
      } else if (details) {
        const name = details.closest("tbody").dataset.variant;
        if (!open.delete(name)) open.add(name);
      } else {
        return;
      }
      apply();
    });
    watch("value", apply);
    apply();
  }

  // Forward clicks on [data-<name>] as the component's event <name>, with the attribute's value.
  function forward(element, trigger, names) {
    element.addEventListener("click", (event) => {
      for (const name of names) {
        const target = event.target.closest(`[data-${name}]`);
        if (target) trigger(name, { value: target.dataset[name] });
      }
    });
  }

  // A chip opens its own options: the accordion around all of them, then its own.
  function chips(element, trigger) {
    forward(element, trigger, ["remove"]);
    element.addEventListener("click", (event) => {
      const chip = event.target.closest("[data-options]");
      if (!chip) return;
      const around = document.querySelector("#options button.label-wrap");
      if (around && !around.classList.contains("open")) around.click();
      let tries = 0;
      const reveal = () => {
        const own = document.getElementById(`options-${chip.dataset.options}`);
        if (!own || !own.offsetParent) return tries++ < 40 && setTimeout(reveal, 50);
        own.open = true;
        own.scrollIntoView({ block: "nearest" });
        own.querySelector("summary").focus({ preventScroll: true });
      };
      reveal();
    });
  }

  // The options of each variant. Gradio updates attributes when variants come and go; what a
  // control shows and which accordions are open is kept here.
  function options(element, trigger, watch) {
    forward(element, trigger, ["reset"]);
    const open = new Set();
    element.addEventListener("toggle", (event) => {
      const uid = event.target.dataset?.uid;
      if (uid) event.target.open ? open.add(uid) : open.delete(uid);
    }, true);
    element.addEventListener("change", (event) => {
      const control = event.target.closest("[data-option]");
      if (!control) return;
      const value = control.type === "checkbox" ? control.checked : control.value;
      if (control.type === "checkbox") control.toggleAttribute("checked", control.checked);
      else if (control.tagName === "SELECT") control.dataset.chosen = control.value;
      else control.setAttribute("value", control.value);
      const uid = control.closest("[data-uid]").dataset.uid;
      trigger("option", { uid, name: control.dataset.option, value });
    });
    const apply = () => {
      const shown = new Set(open); // Closing and opening below changes `open` itself.
      for (const one of element.querySelectorAll("[data-uid]")) one.open = shown.has(one.dataset.uid);
      for (const control of element.querySelectorAll("[data-option]")) {
        if (control.type === "checkbox") control.checked = control.hasAttribute("checked");
        else control.value = control.dataset.chosen ?? control.getAttribute("value") ?? "";
      }
    };
    watch("value", apply);
    apply();
  }

  // A message that appears is brought into view where the person is not looking at it.
  function message(element, watch) {
    watch("value", () => {
      const alert = element.querySelector("[role=alert]");
      if (alert) requestAnimationFrame(() => alert.scrollIntoView({ block: "nearest" }));
    });
  }

  // After Run: what is wrong comes into view, wherever it stands; on a narrow page, where the
  // results lie below the form, else they do.
  function reveal(id) {
    const alert = document.querySelector("#form [role=alert]");
    const target = alert ?? (innerWidth <= 980 ? document.getElementById(id) : null);
    target?.scrollIntoView({ block: alert ? "nearest" : "start" });
  }

  // One tooltip for the page, on hover and on keyboard focus, never cut off by a scrolling box.
  const tip = document.createElement("div");
  tip.id = "ql-tip";
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;
  let tipped = null;
  let described = null;
  // Labels of controls, titles of axes and entries of legends are drawn by Gradio and Plotly: what
  // explains them is looked up, by the control's id or by what is drawn. [where it stands, text]
  let drawn = null;
  function explained(event) {
    const kept = document.querySelector("#tips [data-tips]");
    const say = window.gradio_config?.i18n_translations?.[language()];
    if (!kept || !say || !event.target.closest) return [null, ""];
    drawn ??= JSON.parse(kept.dataset.tips);
    const axis = event.target.closest(".infolayer g[class$=title] text");
    const entry = event.target.closest(".legend .traces")?.querySelector(".legendtext");
    if (axis || entry) {
      const text = (axis ?? entry).dataset.unformatted ?? (axis ?? entry).textContent;
      const keys = axis ? drawn.axes : drawn.legends;
      // Two tabs may write the same word for different things.
      const tab = ["inspect", "learn"].find((one) => event.target.closest(`#${one}`)) ?? "";
      const named = Object.keys(keys).filter((one) => text === say[one] || text.endsWith(`, ${say[one]}`));
      const key = named.find((one) => one.startsWith(tab)) ?? named[0];
      return [axis ?? entry, key ? say[keys[key]] : ""];
    }
    let holder = event.target;
    while (holder && !Object.hasOwn(drawn.controls, holder.id)) holder = holder.parentElement;
    if (!holder) return [null, ""];
    const label = holder.querySelector('[data-testid="block-info"]') ?? holder.querySelector("label");
    const meant = event.type === "focusin" || label?.contains(event.target);
    return meant ? [label ?? holder, say[drawn.controls[holder.id]]] : [null, ""];
  }
  function showTip(event) {
    const marked = event.target.closest?.("[data-tip]");
    const [target, text] = marked ? [marked, marked.dataset.tip] : explained(event);
    if (target && target === tipped) return;
    hideTip();
    if (!target || !text) return;
    tipped = target;
    tip.textContent = text;
    if (!tip.isConnected) document.body.append(tip);
    tip.hidden = false;
    described = event.type === "focusin" ? event.target : target;
    described.setAttribute("aria-describedby", "ql-tip");
    placeTip();
  }
  function placeTip() {
    const box = tipped.getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 8);
    const above = box.top - own.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
  }
  function hideTip() {
    described?.removeAttribute("aria-describedby");
    tipped = described = null;
    tip.hidden = true;
  }
  document.addEventListener("mouseover", showTip);
  document.addEventListener("focusin", showTip);
  document.addEventListener("focusout", hideTip);
  // The focus scrolls what it goes to into view: its explanation goes along.
  document.addEventListener("scroll", () => {
    if (described && described === document.activeElement) placeTip();
    else hideTip();
  }, true);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());

  // Copy buttons: of a text on the page, or of the address, which names what is in view.
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy], [data-share]");
    if (!button) return;
    const source = document.getElementById(button.dataset.copy);
    const text = source ? source.textContent : location.href;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Pages served without https have no clipboard API.
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    const label = button.textContent;
    button.textContent = button.dataset.copied;
    setTimeout(() => (button.textContent = label), 1500);
  });

  // The paired token view: the token under the pointer, or chosen by click or arrow key, fills the
  // box with both top fives. Texts of the model are only ever set as text.
  function tokens(element, watch) {
    let chosen = null;
    const visible = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "∎";
    const within = (event) => event.target.closest?.(".ql-reading [data-at]");
    const fill = (root, slot, text) => {
      for (const place of root.querySelectorAll(`[data-slot="${slot}"]`)) place.textContent = text;
    };
    let read = { from: null, data: null }; // Parsed once for each painting.
    function data(root) {
      if (read.from !== root) read = { from: root, data: JSON.parse(root.dataset.reading) };
      return read.data;
    }
    function list(place, top, pieces) {
      place.replaceChildren(
        ...top.map(([id, chance]) => {
          const row = document.createElement("li");
          const word = document.createElement("code");
          const share = document.createElement("span");
          word.textContent = visible(pieces[id]);
          share.textContent = `${(100 * chance).toFixed(1)}%`;
          row.style.setProperty("--chance", `${100 * chance}%`);
          row.dataset.token = id;
          row.append(word, share);
          return row;
        }),
      );
    }
    function show(token) {
      const root = token.closest(".ql-tokens");
      const column = token.closest(".ql-column");
      const known = data(root);
      const at = Number(token.dataset.at);
      const variant = known.variants[column.dataset.reader];
      const box = root.querySelector(".ql-tops");
      const flip = box.querySelector('[data-slot="flip"]');
      fill(box, "label", column.dataset.label);
      fill(box, "token", visible(known.text[at + 1]));
      fill(box, "kl", variant.kl[at].toPrecision(3));
      flip.textContent = token.dataset.flip ? flip.dataset[token.dataset.flip] : "";
      list(box.querySelector('[data-slot="original"]'), known.original[at], known.pieces);
      list(box.querySelector('[data-slot="variant"]'), variant.top[at], known.pieces);
      box.hidden = false;
      for (const other of root.querySelectorAll(".ql-here")) other.classList.remove("ql-here");
      for (const other of root.querySelectorAll(`.ql-reading [data-at="${at}"]`)) {
        other.classList.add("ql-here");
      }
    }
    function choose(token) {
      for (const other of element.querySelectorAll(".ql-chosen")) {
        other.classList.remove("ql-chosen");
      }
      for (const other of token.parentElement.querySelectorAll('[tabindex="0"]')) {
        other.tabIndex = -1;
      }
      token.tabIndex = 0;
      token.classList.add("ql-chosen");
      chosen = token;
      show(token);
    }
    element.addEventListener("mouseover", (event) => {
      const token = within(event);
      if (token) show(token);
    });
    element.addEventListener("mouseleave", () => chosen?.isConnected && show(chosen));
    element.addEventListener("click", (event) => {
      const token = within(event);
      if (token) choose(token);
    });
    element.addEventListener("focusin", (event) => {
      const token = within(event);
      if (token) choose(token);
    });
    element.addEventListener("keydown", (event) => {
      const token = within(event);
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!token || !step) return;
      const at = Number(token.dataset.at) + step;
      const next = token.parentElement.querySelector(`[data-at="${at}"]`);
      if (!next) return;
      event.preventDefault();
      next.focus();
    });
    watch("value", () => (chosen = null));
  }

  // A file is written when its button is clicked; the hidden button then hands it over.
  function download(id, tries = 40) {
    const link = document.querySelector(`#${id} a[href], a#${id}[href]`);
    const button = document.getElementById(id);
    if (link) link.click();
    else if (button) button.click();
    else if (tries) setTimeout(() => download(id, tries - 1), 50);
  }

  // A walkthrough's own markup: clicks on [data-act] and edits of [data-cell] go to the server as
  // the event `act`. The focus stays where it was when the markup is painted anew.
  function lesson(element, trigger, watch) {
    let focused = null;
    const name = (target) => target?.dataset?.act || target?.dataset?.cell || null;
    const act = (value) => {
      focused = name(document.activeElement);
      trigger("act", { value });
    };
    element.addEventListener("click", (event) => {
      const target = event.target.closest("[data-act]");
      if (target) act(target.dataset.act);
    });
    element.addEventListener("change", (event) => {
      const cell = event.target.closest("[data-cell]");
      if (cell) act(`${cell.dataset.cell}:${cell.value}`);
    });
    watch("value", () => requestAnimationFrame(() => {
      for (const cell of element.querySelectorAll("[data-cell]")) cell.value = cell.getAttribute("value");
      if (!focused || document.activeElement !== document.body) return;
      const again = [...element.querySelectorAll("[data-act], [data-cell]")];
      again.find((one) => name(one) === focused)?.focus({ preventScroll: true });
    }));
  }

  // A heatmap of buttons: one tab stop, arrow keys go from cell to cell.
  function cells(element, trigger, watch) {
    lesson(element, trigger, watch);
    const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
    element.addEventListener("keydown", (event) => {
      const cell = event.target.closest?.("[data-at]");
      const step = steps[event.key];
      if (!cell || !step) return;
      const [row, column] = cell.dataset.at.split(":").map(Number);
      const next = element.querySelector(`[data-at="${row + step[0]}:${column + step[1]}"]`);
      if (!next) return;
      event.preventDefault();
      cell.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }

  // The address names the lesson and its step while the Learn tab is open.
  function followLesson(element, watch) {
    const tab = () => document.querySelector("#tab-learn-button")?.getAttribute("aria-selected") === "true";
    const update = () => {
      const at = element.querySelector("[data-lesson]")?.dataset;
      const url = new URL(location.href);
      if (at && tab()) {
        url.searchParams.set("lesson", at.lesson);
        url.searchParams.set("step", at.step);
      } else {
        url.searchParams.delete("lesson");
        url.searchParams.delete("step");
      }
      if (url.href !== location.href) history.replaceState(history.state, "", url);
    };
    watch("value", () => tab() && update());
    document.addEventListener("click", (event) => {
      if (event.target.closest?.("#tabs [role=tab]")) setTimeout(update, 60);
    });
  }

  window.quantlab = { inLine, answered, ask, told, again, look, tick, arrived, lesson, cells, followLesson, download, client, watchClient, setLanguage, followRun, table, forward, chips, options, message, reveal, tokens };
})();
