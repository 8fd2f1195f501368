"use strict";
// Small tools. What a run has written becomes text, never markup.

/** An element with properties and children; a string among them is a text. */
function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** The data in a <template>: JSON, compressed, in base64. */
async function unpack(template) {
  const bytes = Uint8Array.from(atob(template.content.textContent.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function short(value) {
  return value === null || value === undefined ? "-" : String(Number(value.toPrecision(4)));
}

/** Offers rows of cells as a file. A text that a spreadsheet would compute gets an apostrophe. */
function saveCsv(name, rows) {
  const cell = (value) => {
    if (typeof value === "number") return String(value);
    const text = /^[=+\-@\t\r]/.test(value ?? "") ? `'${value}` : String(value ?? "");
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const text = rows.map((row) => `${row.map(cell).join(",")}\r\n`).join("");
  const link = make("a", {
    href: URL.createObjectURL(new Blob([text], { type: "text/csv" })),
    download: `${name}.csv`,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
