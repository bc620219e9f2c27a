// What a mark stands for, as a text beside it: when it is pointed at, tapped, or reached by the Tab key. The same text is
// the mark's label for screen readers, so the box is hidden from these. Escape hides it.
{
  const box = document.getElementById("tip");
  const hide = () => { box.hidden = true; };
  const show = (mark) => {
    box.textContent = mark.getAttribute("aria-label").replaceAll("; ", "\n");
    box.hidden = false;
    const place = (mark.querySelector("circle") ?? mark).getBoundingClientRect();
    const wide = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(place.left + place.width / 2 - box.offsetWidth / 2, wide - box.offsetWidth - 8));
    const above = place.top - box.offsetHeight - 10;
    box.style.left = `${left + scrollX}px`;
    box.style.top = `${(above > 4 ? above : place.bottom + 10) + scrollY}px`;
  };
  for (const mark of document.querySelectorAll(".point")) {
    mark.querySelector("title")?.remove(); // the browser's own box would stand beside ours
    mark.addEventListener("pointerenter", () => show(mark));
    mark.addEventListener("pointerleave", () => { if (document.activeElement !== mark) hide(); });
    mark.addEventListener("focus", () => show(mark));
    mark.addEventListener("blur", hide);
  }
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
}
