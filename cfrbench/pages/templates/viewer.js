// The volume viewer: NiiVue begins to run when the viewer comes into sight; volumes come from this page itself.
"use strict";
(() => {
  // Okabe and Ito, as in the figures: truth, then the forms of the method, the pseudo-label last.
  const COLOURS = { truth: [0, 158, 115], pseudo: [204, 121, 167], forms: [[230, 159, 0], [86, 180, 233], [240, 228, 66], [213, 94, 0]] };
  const LABEL = 1002; // NIfTI's intent code of label maps: NiiVue draws outlines of these
  const { groups, classes } = JSON.parse(document.getElementById("groups").textContent);
  const element = (name) => document.getElementById(`viewer-${name}`);
  const canvas = element("canvas");
  let viewer = null, layers = [], busy = Promise.resolve(), shownCase = null;

  function bytes(base64) {
    const text = atob(base64);
    const array = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) array[i] = text.charCodeAt(i);
    return array.buffer;
  }

  // Class 1 has the layer's colour, further classes are lighter and darker by turns; the background is clear.
  function palette([red, green, blue]) {
    const map = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
    for (let c = 1; c < Math.max(classes, 2); c++) {
      const change = c === 1 ? 0 : (c % 2 ? -1 : 1) * 0.18 * Math.ceil((c - 1) / 2);
      const tone = (v) => Math.round(Math.min(255, Math.max(0, change > 0 ? v + (255 - v) * change : v * (1 + change))));
      map.R.push(tone(red)); map.G.push(tone(green)); map.B.push(tone(blue)); map.A.push(255); map.I.push(c); map.labels.push("");
    }
    return map;
  }

  function begin() {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.type = "module";
      script.textContent = document.getElementById("niivue").textContent;
      document.body.append(script);
      const deadline = Date.now() + 60000;
      const wait = () => {
        if (window.Niivue) resolve(window.Niivue);
        else if (Date.now() > deadline) reject(new Error("NiiVue did not start"));
        else setTimeout(wait, 50);
      };
      wait();
    }).then(async (Niivue) => {
      viewer = new Niivue({ backColor: [0, 0, 0, 1], show3Dcrosshair: true, isColorbar: false, loadingText: "",
                            dragAndDropEnabled: false, multiplanarShowRender: 1, multiplanarLayout: 2, heroImageFraction: 0.4,
                            crosshairWidth: 0.5, crosshairColor: [0.8, 0.8, 0.8, 0.6],
                            isCornerOrientationText: true, logLevel: "error" });
      viewer.onLocationChange = (place) => { element("place").textContent = `${shownCase}: ${place.string}`; };
      await viewer.attachToCanvas(canvas, false);
    });
  }

  function chosenLayers(group) {
    let form = 0;
    return [{ key: "truth", name: "truth", colour: COLOURS.truth }, ...group.layers.map((layer) => ({
      ...layer, colour: layer.key.startsWith("pseudo-") ? COLOURS.pseudo : COLOURS.forms[form++ % COLOURS.forms.length],
    }))];
  }

  async function show() {
    canvas.dataset.state = "loading";
    const index = element("case").selectedIndex;
    const payload = JSON.parse(document.getElementById(`volume-${index}`).textContent);
    shownCase = payload.case;
    layers = chosenLayers(groups[Number(element("group").value)]).filter((layer) => layer.key === "truth" || payload.masks[layer.key]);
    await viewer.loadVolumes([]);
    await viewer.loadFromArrayBuffer(bytes(payload.image), `${payload.case}.nii.gz`);
    for (const layer of layers) {
      const data = layer.key === "truth" ? payload.truth : payload.masks[layer.key];
      await viewer.loadFromArrayBuffer(bytes(data), `${layer.name}.nii.gz`);
      const volume = viewer.volumes[viewer.volumes.length - 1];
      volume.hdr.intent_code = LABEL;
      volume.setColormapLabel(palette(layer.colour));
    }
    addSwitches(payload);
    paint();
    viewer.setSliceType(Number(element("slices").value));
    canvas.dataset.case = payload.case;
    canvas.dataset.state = "ready";
  }

  function addSwitches(payload) {
    const before = new Map([...document.querySelectorAll("#viewer-layers input")].map((box) => [box.name, box.checked]));
    element("layers").replaceChildren(...layers.map((layer) => {
      const box = Object.assign(document.createElement("input"), { type: "checkbox", name: layer.name, checked: before.get(layer.name) ?? true });
      const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
      swatch.style.background = `rgb(${layer.colour.join(",")})`;
      const label = document.createElement("label");
      const dice = payload.dice[layer.key];
      label.append(box, swatch, layer.name + (dice === undefined ? "" : ` (Dice ${dice.toFixed(1)})`));
      return label;
    }));
  }

  function paint() {
    const boxes = document.querySelectorAll("#viewer-layers input");
    const opacity = Number(element("opacity").value);
    boxes.forEach((box, i) => { viewer.volumes[i + 1].opacity = box.checked ? opacity : 0; });
    viewer.setAtlasOutline(element("outline").checked ? 1 : 0);
  }

  // One thing after the other: a second choice must not meet a half-loaded first one.
  function next(action) {
    busy = busy.then(action).catch((error) => {
      canvas.dataset.state = "failed";
      element("place").textContent = `The viewer cannot show this here (${error.message}). It needs WebGL 2.`;
    });
  }

  for (const name of ["case", "group"]) element(name).addEventListener("change", () => next(show));
  for (const name of ["opacity", "outline"]) element(name).addEventListener("input", () => next(paint));
  element("layers").addEventListener("input", () => next(paint));
  element("slices").addEventListener("change", () => next(() => viewer.setSliceType(Number(element("slices").value))));
  const sight = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    sight.disconnect();
    next(begin);
    next(show);
  }, { rootMargin: "300px" });
  sight.observe(canvas);
})();
