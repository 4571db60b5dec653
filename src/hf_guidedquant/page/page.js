// A click on a column's name sorts the table by it, the largest first; another turns it round. Without scripts the names are plain text.
for (const table of document.querySelectorAll("table.layers")) {
  const names = [...table.tHead.rows[0].cells];
  names.forEach((name, column) => {
    const button = document.createElement("button");
    button.append(...name.childNodes);
    name.append(button);
    button.addEventListener("click", () => {
      const sign = name.ariaSort === "descending" ? 1 : -1;
      for (const other of names) other.ariaSort = null;
      name.ariaSort = sign > 0 ? "ascending" : "descending";
      const text = (row) => row.cells[column].textContent;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [text(a), text(b)];
        const [p, q] = [parseFloat(x), parseFloat(y)];
        // What is empty stays at the end.
        if (!x || !y) return !x - !y;
        const numbers = !Number.isNaN(p) && !Number.isNaN(q);
        return sign * (numbers ? p - q : x.localeCompare(y, undefined, { numeric: true }));
      });
      table.tBodies[0].append(...rows);
    });
  });
}
