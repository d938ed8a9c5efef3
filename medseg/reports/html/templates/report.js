// Sorting and filtering of the long tables. Without it the page is whole: the worst cases come first.
// What is chosen stands in the address (#t=cases&sort=1&desc=1&q=spleen), so that it can be sent to somebody.
(() => {
  "use strict";
  const tables = new Map();

  const text = (cell) => cell.textContent.trim();
  const value = (cell) => parseFloat((cell.firstChild ? cell.firstChild.textContent : "").replace("−", "-"));

  // Every word must stand in the row; "dice<0.7" compares the first column whose heading begins so, or holds it.
  function matcher(query, titles) {
    const tests = query.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
      const found = /^([^<>]+)([<>])(-?[\d.]+)$/.exec(word);
      if (found) {
        const [, name, sign, limit] = found;
        let column = titles.findIndex((title) => title.startsWith(name));
        if (column < 0) column = titles.findIndex((title) => title.includes(name));
        if (column >= 0) {
          return (row) => {
            const number = value(row.cells[column]);
            return sign === "<" ? number < Number(limit) : number > Number(limit);
          };
        }
      }
      return (row) => row.textContent.toLowerCase().includes(word);
    });
    return (row) => tests.every((test) => test(row));
  }

  function controls(table) {
    const heads = [...table.tHead.rows[0].cells];
    const titles = heads.map((head) => text(head).toLowerCase());
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const bar = document.createElement("div");
    const input = document.createElement("input");
    const count = document.createElement("span");
    bar.className = "filter";
    input.type = "search";
    const number = titles.findIndex((title, i) => heads[i].classList.contains("n") && !title.startsWith("dice"));
    const example = titles.some((title) => title.startsWith("dice")) ? "dice" : (titles[number] || "").split(" ")[0];
    input.placeholder = example ? `filter: words, or ${example}<0.7` : "filter: words";
    input.setAttribute("aria-label", "filter the table");
    count.setAttribute("role", "status");
    bar.append(input, count);
    table.parentElement.before(bar);
    const state = { sort: -1, desc: false, q: "" };

    function sort(column, desc) {
      state.sort = column;
      state.desc = desc;
      const isNumber = heads[column].classList.contains("n");
      const keys = new Map(rows.map((row) => [row, isNumber ? value(row.cells[column]) : text(row.cells[column])]));
      const empty = (key) => (isNumber ? Number.isNaN(key) : key === "" || key === "–");
      const order = (a, b) => (isNumber ? a - b : a.localeCompare(b, undefined, { numeric: true }));
      const sorted = [...rows].sort((a, b) => {
        const [x, y] = [keys.get(a), keys.get(b)];
        if (empty(x) || empty(y)) return empty(x) - empty(y); // undefined comes last either way
        return desc ? order(y, x) : order(x, y);
      });
      body.append(...sorted);
      heads.forEach((head, i) => {
        if (i === column) head.setAttribute("aria-sort", desc ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      });
    }

    function filter(query) {
      state.q = query;
      if (input.value !== query) input.value = query;
      const fits = matcher(query, titles);
      let shown = 0;
      for (const row of rows) {
        row.hidden = !fits(row);
        if (!row.hidden) shown += 1;
      }
      count.textContent = query ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
    }

    function remember() {
      const chosen = new URLSearchParams({ t: table.id });
      if (state.sort >= 0) chosen.set("sort", state.sort);
      if (state.desc) chosen.set("desc", 1);
      if (state.q) chosen.set("q", state.q);
      history.replaceState(null, "", `#${chosen}`);
    }

    heads.forEach((head, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        sort(i, state.sort === i && !state.desc);
        remember();
      });
    });
    input.addEventListener("input", () => { filter(input.value); remember(); });
    filter("");
    tables.set(table.id, { table, sort, filter, rows });
  }

  function follow() {
    const chosen = new URLSearchParams(location.hash.slice(1));
    const found = tables.get(chosen.get("t"));
    if (found) {
      const column = Number(chosen.get("sort") ?? -1);
      if (column >= 0 && column < found.table.tHead.rows[0].cells.length) found.sort(column, chosen.get("desc") === "1");
      found.filter(chosen.get("q") ?? "");
      const fold = found.table.closest("details");
      if (fold) fold.open = true;
      found.table.closest("section").scrollIntoView();
      return;
    }
    const target = document.getElementById(location.hash.slice(1));
    if (target && target.hidden) { // a link to a row that is filtered out
      for (const { rows, filter } of tables.values()) if (rows.includes(target)) filter("");
      target.scrollIntoView({ block: "center" });
    }
  }

  document.querySelectorAll("table[data-long]").forEach(controls);
  document.documentElement.classList.add("js");
  window.addEventListener("hashchange", follow);
  follow();
})();
