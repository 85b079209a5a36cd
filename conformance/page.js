"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [IMPL, ID, VERDICT, DURATION, MEASURED, REASON, ISSUE, MESSAGE, WHERE, REPEAT] = [...Array(10).keys()];
  const text = (index) => data.strings[index];
  const make = (tag, css, content) => {
    const node = document.createElement(tag);
    if (css) node.className = css;
    if (content !== undefined) node.textContent = content;
    return node;
  };
  const chip = (verdict) => make("span", "chip " + data.verdicts[verdict], data.glyphs[verdict]);
  for (const part of document.querySelectorAll("[data-grow]")) part.style.flexGrow = part.dataset.grow;

  // Which cases stand in a column: the same rule as grid.py.
  const columns = (id) => {
    const [, , setting, strategy] = id.split("/");
    if (strategy !== "single" && strategy !== "-") return [strategy];
    return setting === "-" ? ["default"] : setting.split("+");
  };
  const modelOf = (id) => { const model = id.split("/")[1]; return model === "-" ? "(suite)" : model; };

  const dialog = document.getElementById("detail");
  const body = document.getElementById("detail-body");
  const filter = document.getElementById("detail-filter");
  const LIMIT = 400;
  let opener = null;

  const caseNode = (row) => {
    const node = make("div", "case");
    node.append(chip(row[VERDICT]));
    const head = make("div");
    head.append(make("code", "", row[ID]));
    const facts = [data.verdicts[row[VERDICT]], row[DURATION].toFixed(2) + " s"];
    if (data.names.length > 1) facts.unshift(data.names[row[IMPL]]);
    head.append(" ", make("small", "", facts.join(" · ")));
    node.append(head);
    const why = [text(row[MESSAGE]), text(row[REASON])].filter(Boolean).join(" — ");
    if (why) node.append(make("div", "what", why));
    const issue = text(row[ISSUE]);
    if (issue) {
      const line = make("div");
      if (/^https?:\/\/[^\s"'<>]+$/.test(issue)) {
        const link = make("a", "", issue);
        link.href = issue; link.rel = "noreferrer noopener";
        line.append(link);
      } else line.append(make("small", "", issue));
      node.append(line);
    }
    if (row[MEASURED].length) {
      const line = make("div", "measured");
      for (const [name, value] of row[MEASURED]) {
        const pair = make("span", "", text(name) + " ");
        pair.append(make("b", "", typeof value === "number" ? String(+value.toPrecision(4)) : value));
        line.append(pair);
      }
      node.append(line);
    }
    if (text(row[WHERE])) node.append(make("div", "", "at " + text(row[WHERE])));
    if (text(row[REPEAT])) {
      const line = make("div");
      line.append(make("code", "", text(row[REPEAT])));
      node.append(line);
    }
    return node;
  };

  const draw = (rows, hidden) => {
    body.replaceChildren();
    const shown = rows.filter((row) => !hidden.has(row[VERDICT]));
    const groups = new Map();
    for (const row of shown.slice(0, LIMIT)) {
      const check = row[ID].split("/")[0];
      if (!groups.has(check)) groups.set(check, []);
      groups.get(check).push(row);
    }
    const bad = (cases) => cases.some((row) => row[VERDICT] >= 1 && row[VERDICT] <= 5);
    for (const [check, cases] of [...groups].sort((a, b) => bad(b[1]) - bad(a[1]))) {
      const node = make("details", "check");
      const summary = make("summary");
      summary.append(make("b", "", check), " " + (data.claims[check] || "") + " ");
      for (const verdict of [...new Set(cases.map((row) => row[VERDICT]))]) {
        const count = cases.filter((row) => row[VERDICT] === verdict).length;
        const pair = make("span", "pair");
        pair.append(chip(verdict), String(count));
        summary.append(pair);
      }
      node.append(summary);
      const fill = () => { if (node.open && node.childElementCount === 1) node.append(...cases.map(caseNode)); };
      node.addEventListener("toggle", fill);
      node.open = groups.size < 4 || bad(cases);
      fill();
      body.append(node);
    }
    if (shown.length > LIMIT) body.append(make("p", "hint", "The first " + LIMIT + " of " + shown.length + " cases; narrow the search for the rest."));
    if (!shown.length) body.append(make("p", "hint", "No case."));
  };

  const show = (title, rows) => {
    document.getElementById("detail-title").textContent = title;
    document.getElementById("detail-sum").textContent = rows.length + (rows.length === 1 ? " case" : " cases");
    const hidden = new Set();
    filter.replaceChildren();
    for (const verdict of [...new Set(rows.map((row) => row[VERDICT]))].sort((a, b) => a - b)) {
      const button = make("button");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      button.append(chip(verdict), rows.filter((row) => row[VERDICT] === verdict).length + " " + data.verdicts[verdict]);
      button.addEventListener("click", () => {
        hidden.has(verdict) ? hidden.delete(verdict) : hidden.add(verdict);
        button.setAttribute("aria-pressed", String(!hidden.has(verdict)));
        draw(rows, hidden);
      });
      filter.append(button);
    }
    draw(rows, hidden);
    if (!dialog.open) { opener = document.activeElement; dialog.showModal(); }
    dialog.scrollTop = 0;
  };
  const openCell = (model, column) => show(model + " · " + column,
    data.rows.filter((row) => modelOf(row[ID]) === model && columns(row[ID]).includes(column)));
  const search = (words) => show("Cases with " + words.join(" "), data.rows.filter((row) => {
    const hay = [row[ID], data.names[row[IMPL]], data.verdicts[row[VERDICT]], text(row[REASON])].join(" ").toLowerCase();
    return words.every((word) => hay.includes(word));
  }));
  document.getElementById("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => { if (opener) opener.focus(); });
  document.getElementById("find").addEventListener("keydown", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (event.key === "Enter" && words.length) search(words);
  });
  for (const button of document.querySelectorAll(".open"))
    button.addEventListener("click", () => show(button.dataset.check, data.rows.filter((row) => row[ID].split("/")[0] === button.dataset.check)));

  // The matrix is one tab stop; arrow keys move inside it.
  const table = document.querySelector(".matrix");
  const places = [...table.tBodies[0].rows].map((row) => [...row.cells].slice(1).map((cell) => cell.querySelector(".cell")));
  const first = places.flat().find(Boolean);
  if (first) first.tabIndex = 0;
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  table.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    const here = event.target.closest(".cell");
    if (!move || !here) return;
    event.preventDefault();
    let y = places.findIndex((row) => row.includes(here));
    let x = places[y].indexOf(here);
    do { y += move[0]; x += move[1]; } while (places[y] && x >= 0 && x < places[y].length && !places[y][x]);
    const next = places[y] && places[y][x];
    if (!next) return;
    here.tabIndex = -1; next.tabIndex = 0; next.focus();
    next.scrollIntoView({ block: "nearest", inline: "center" });
  });
  table.addEventListener("click", (event) => {
    const cell = event.target.closest(".cell");
    if (cell) { hide(); openCell(cell.dataset.m, cell.dataset.c); }
  });

  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const reveal = (event) => {
    const cell = event.target.closest && event.target.closest(".cell");
    if (!cell) return hide();
    tip.textContent = cell.dataset.m + " · " + cell.dataset.c + "\n" + cell.dataset.tip;
    tip.hidden = false;
    const box = cell.getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const left = Math.max(6, Math.min(box.left, innerWidth - size.width - 6));
    const below = box.bottom + 8 + size.height < innerHeight;
    tip.style.left = left + "px";
    tip.style.top = (below ? box.bottom + 8 : Math.max(6, box.top - size.height - 8)) + "px";
  };
  table.addEventListener("mouseover", reveal);
  table.addEventListener("focusin", (event) => { if (event.target.matches(":focus-visible")) reveal(event); });
  table.addEventListener("mouseleave", hide);
  table.addEventListener("focusout", hide);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  addEventListener("scroll", hide, { passive: true });

  const [kind, ...rest] = decodeURIComponent(location.hash.slice(1)).split("/");
  if (kind === "cell" && rest.length === 2) openCell(rest[0], rest[1]);
  if (kind === "find" && rest.length) search([rest.join("/").toLowerCase()]);
  document.documentElement.dataset.ready = "1";
})();
