"use strict";
// Tips that also open by touch and keyboard, and a method's marks brought forward in all charts.
const tip = document.getElementById("tip");

for (const point of document.querySelectorAll(".point")) {
  const title = point.querySelector("title");
  const text = title.textContent;
  title.remove(); // else the browser shows it a second time
  point.setAttribute("aria-label", text);
  const show = () => {
    const [name, ...facts] = text.split("\n");
    const bold = document.createElement("b");
    bold.textContent = name;
    tip.replaceChildren(bold, "\n" + facts.join("\n"));
    tip.hidden = false;
    const at = point.getBoundingClientRect(), room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const above = at.top - tip.offsetHeight - 8;
    tip.style.left = Math.max(8, Math.min(at.left + at.width / 2 - tip.offsetWidth / 2, room)) + scrollX + "px";
    tip.style.top = (above > 0 ? above : at.bottom + 8) + scrollY + "px";
    highlight(point.dataset.m);
  };
  const hide = () => { tip.hidden = true; highlight(null); };
  point.addEventListener("pointerenter", show);
  point.addEventListener("focus", show);
  point.addEventListener("pointerleave", hide);
  point.addEventListener("blur", hide);
}

for (const name of document.querySelectorAll(".legend li")) {
  name.addEventListener("pointerenter", () => highlight(name.dataset.m));
  name.addEventListener("pointerleave", () => highlight(null));
}

document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

function highlight(number) {
  for (const mark of document.querySelectorAll(".point, .bar"))
    mark.classList.toggle("dim", number !== null && mark.dataset.m !== number);
}
