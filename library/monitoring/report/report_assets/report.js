"use strict";
// The nearest values under the pointer.
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const data = JSON.parse(svg.dataset.chart);
  const told = svg.parentElement.querySelector("output");
  const [left, right, top, bottom] = data.box;
  const [low, high] = data.domain;
  const cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cross.setAttribute("class", "cross");
  cross.setAttribute("y1", top);
  cross.setAttribute("y2", bottom);
  cross.setAttribute("visibility", "hidden");
  svg.append(cross);
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const place = ((event.clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width;
    const wanted = low + ((place - left) / (right - left)) * (high - low);
    const found = data.lines.map((line) => {
      let best = 0;
      line.x.forEach((x, i) => { if (Math.abs(x - wanted) < Math.abs(line.x[best] - wanted)) best = i; });
      return { name: line.name, x: line.x[best], y: line.y[best] };
    });
    const x = found[0].x;
    const at = left + ((x - low) / (high - low)) * (right - left);
    cross.setAttribute("x1", at);
    cross.setAttribute("x2", at);
    cross.setAttribute("visibility", "visible");
    const values = found.map((point) => (found.length > 1 ? point.name + " " : "") + point.y);
    told.textContent = data.unit + " " + x + ": " + values.join(", ");
  });
  svg.addEventListener("pointerleave", () => {
    cross.setAttribute("visibility", "hidden");
    told.textContent = "";
  });
}
// A picture in large.
const dialog = document.querySelector("dialog");
for (const image of document.querySelectorAll(".sheet img")) {
  image.addEventListener("click", () => {
    dialog.querySelector("img").src = image.src;
    dialog.querySelector("p").textContent = image.alt;
    dialog.showModal();
  });
}
dialog.addEventListener("click", () => dialog.close());
// Copy the command.
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", () => {
    const range = document.createRange();
    range.selectNodeContents(document.getElementById(button.dataset.copy));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    document.execCommand("copy");
    button.textContent = "Copied";
  });
}
// While the run goes on, the page is read again each minute, unless someone is looking closely.
if (document.body.dataset.running) {
  setInterval(() => {
    if (!dialog.open && !document.querySelector("details[open], svg:hover")) location.reload();
  }, 60000);
}
