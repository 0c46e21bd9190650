// Put together: build the map once, draw the charts for the width there is, listen.
buildMap();
if (stops.length > 1) {
  slider.max = stops.length - 1;
  document.getElementById("stops").hidden = false;
  document.querySelector(".here").style.left = `calc(10px + (100% - 20px) * ${ownStop / (stops.length - 1)})`;
  slider.addEventListener("input", () => moveTo(Number(slider.value)));
  document.getElementById("reset").addEventListener("click", () => {
    moveTo(ownStop);
    slider.focus();
  });
}
moveTo(ownStop);
for (const button of document.querySelectorAll(".toggle button")) {
  button.addEventListener("click", () => {
    state.mode = button.dataset.mode;
    for (const other of document.querySelectorAll(".toggle button")) other.setAttribute("aria-pressed", String(other === button));
    showPlan();
  });
}
function draw() {
  drawFront();
  drawScatter();
}
draw();
document.querySelector(".split").classList.toggle("alone", !frontBox.firstChild);
let drawnAt = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === drawnAt) return; // a phone's address bar changes the height only
  drawnAt = window.innerWidth;
  hideTip();
  draw();
});
window.addEventListener("scroll", hideTip, { passive: true, capture: true });
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const code = button.parentNode.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      // Without the clipboard (an old browser, a page opened from disk) the text is selected instead.
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
}
