// Tables: sort by a click on a head, filter by words and by the values of columns that have few of them.
// Pictures: a click makes one as wide as the page.
"use strict";
(() => {
  const FEW = 20, LONG = 10;
  const FLAGS = new Set(["collapsed", "invented", "too large", "too small", "prediction", "truth"]);

  const isNumber = (cell) => cell.dataset.value !== undefined;
  const textOf = (row, column) => row.cells[column].textContent.trim();

  function sort(table, column) {
    const head = table.tHead.rows[0].cells[column];
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const sign = descending ? -1 : 1;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const [x, y] = [a.cells[column], b.cells[column]];
      if (isNumber(x) && isNumber(y)) return sign * (Number(x.dataset.value) - Number(y.dataset.value));
      if (isNumber(x) !== isNumber(y)) return isNumber(x) ? -1 : 1; // what is missing stands last, either way
      return sign * x.textContent.localeCompare(y.textContent, undefined, { numeric: true });
    });
    table.tBodies[0].append(...rows);
  }

  function addFilters(table) {
    const rows = [...table.tBodies[0].rows];
    const heads = [...table.tHead.rows[0].cells];
    const bar = document.createElement("div");
    bar.className = "filters";
    const search = Object.assign(document.createElement("input"), { type: "search", placeholder: "filter by words" });
    search.setAttribute("aria-label", "filter rows by words");
    const count = document.createElement("output");
    const choices = heads.map((head, column) => {
      const values = [...new Set(rows.map((row) => textOf(row, column)))];
      const numeric = rows.some((row) => /\d\.\d/.test(textOf(row, column)));
      if (numeric || values.length < 2 || values.length > FEW) return null;
      values.sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
      const select = document.createElement("select");
      select.setAttribute("aria-label", `only this ${head.textContent}`);
      select.append(new Option(`${head.textContent}: all`, ""));
      for (const value of values) select.append(new Option(value || "(empty)", ` ${value}`));
      return select;
    });
    const apply = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        const fits = words.every((word) => text.includes(word))
          && choices.every((select, column) => !select?.value || ` ${textOf(row, column)}` === select.value);
        row.hidden = !fits;
        shown += fits;
      }
      count.textContent = `${shown} of ${rows.length} rows`;
    };
    bar.append(search, ...choices.filter(Boolean), count);
    bar.addEventListener("input", apply);
    table.closest("figure").querySelector(".scroller").before(bar);
    apply();
  }

  for (const table of document.querySelectorAll(".cfrbench-table table")) {
    const scroller = Object.assign(document.createElement("div"), { className: "scroller" });
    table.replaceWith(scroller);
    scroller.append(table);
    const rows = [...table.tBodies[0].rows];
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.tabIndex = 0;
      head.title = "sort";
      if (!rows.some((row) => isNumber(row.cells[column]))) {
        head.classList.add("words");
        for (const row of rows) row.cells[column].classList.add("words");
      }
      head.addEventListener("click", () => sort(table, column));
      head.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        sort(table, column);
      });
    });
    for (const row of rows) for (const cell of row.cells) if (FLAGS.has(cell.textContent)) cell.classList.add("flag");
    if (rows.length > LONG) addFilters(table);
  }

  for (const image of document.querySelectorAll(".picture img")) {
    image.addEventListener("click", () => image.closest("figure").classList.toggle("wide"));
  }
})();
