(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const root = document.getElementById("explorer-app");
  const count = data.rows.length;
  const [side, height] = data.side;
  const [x0, x1, y0, y1] = data.extent;
  const START = { data: side * height, means: side * height + count, dims: side * height + 2 * count };
  const LIGHT = ["#332288", "#c7a500", "#3fa7d6", "#cc6677", "#117733", "#aa4499", "#44aa99", "#882255", "#8a8a2b", "#777777"];
  const DARK = ["#8ea2ff", "#ffdd55", "#88ccee", "#ff8fa0", "#4fc47a", "#e58bd6", "#5fd3c0", "#d77fa8", "#c9c96a", "#b9bec5"];
  const RAMP = ["#440154", "#472f7d", "#39568c", "#28788e", "#1f998a", "#42bb72", "#95d640", "#fde725"];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const state = { x: (x0 + x1) / 2, y: (y0 + y1) / 2, chosen: 0, moved: new Map(), last: -1, color: "" };

  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const number = (value, digits) =>
    value === null || value === undefined ? "not known" : value.toFixed(digits).replace("-", "\u2212");
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  /* A canvas with as many device pixels as it covers; its context draws in CSS pixels. */
  const fit = (canvas) => {
    const box = canvas.getBoundingClientRect(), scale = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.round(box.width * scale)), tall = Math.max(1, Math.round(box.height * scale));
    if (canvas.width !== width || canvas.height !== tall) { canvas.width = width; canvas.height = tall; }
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, box.width, box.height);
    return [pen, box.width, box.height];
  };

  /* The decoder, where it is a multilayer perceptron: the mean of p(x | z) at any z. */
  const FUNCTIONS = {
    identity: (v) => v, tanh: Math.tanh, relu: (v) => Math.max(0, v), sigmoid: (v) => 1 / (1 + Math.exp(-v)),
    silu: (v) => v / (1 + Math.exp(-v)), softplus: (v) => (v > 20 ? v : Math.log1p(Math.exp(v))),
    elu: (v) => (v > 0 ? v : Math.expm1(v)), exp: Math.exp,
  };
  const layers = (data.decoder ? data.decoder.layers : []).map((layer) => {
    if (typeof layer === "string") return layer;
    const bytes = Uint8Array.from(atob(layer.values), (c) => c.charCodeAt(0));
    return { rows: layer.shape[0], columns: layer.shape[1], units: layer.units, codes: new Int16Array(bytes.buffer) };
  });
  const decode = (z) => {
    let out = Float64Array.from(z);
    for (const layer of layers) {
      if (typeof layer === "string") { out = out.map(FUNCTIONS[layer]); continue; }
      const { rows: tall, columns, units, codes } = layer, made = new Float64Array(tall);
      for (let i = 0; i < tall; i++) {
        let sum = 0;
        for (let j = 0; j < columns; j++) sum += codes[i * columns + j] * out[j];
        made[i] = sum * units[0] + codes[tall * columns + i] * units[1];
      }
      out = made;
    }
    return out.subarray(0, data.decoder.outputs).map(FUNCTIONS[data.decoder.link]);
  };

  /* Images: tiles of one sprite; a blend is the sum of tiles by weight. */
  const images = () => {
    const [tall, wide] = data.shape, sprite = new Image();
    return {
      ready: new Promise((done) => {
        sprite.onload = done;
        sprite.src = "data:image/webp;" + "base64" + "," + data.sprite;
      }),
      canvas: () => make("canvas", { class: "picture", width: wide, height: tall, style: `aspect-ratio: ${wide} / ${tall}` }),
      draw(canvas, blend) {
        const pen = canvas.getContext("2d");
        if (blend instanceof Float64Array) {
          const picture = pen.createImageData(wide, tall), size = wide * tall, channels = blend.length / size;
          const [low, high] = data.decoder.limits;
          for (let i = 0; i < size; i++) {
            for (let c = 0; c < 3; c++) {
              picture.data[4 * i + c] = (255 * (blend[(channels === 1 ? 0 : c) * size + i] - low)) / (high - low);
            }
            picture.data[4 * i + 3] = 255;
          }
          pen.putImageData(picture, 0, 0);
          return;
        }
        pen.globalCompositeOperation = "source-over";
        pen.globalAlpha = 1;
        pen.fillStyle = "#000";
        pen.fillRect(0, 0, wide, tall);
        pen.globalCompositeOperation = "lighter";
        for (const [tile, weight] of blend) {
          pen.globalAlpha = weight;
          const x = (tile % data.columns) * wide, y = Math.floor(tile / data.columns) * tall;
          pen.drawImage(sprite, x, y, wide, tall, 0, 0, wide, tall);
        }
      },
    };
  };

  /* Vectors and sequences: 16-bit numbers, drawn as lines over the index, or as a point for each named column. */
  const curves = () => {
    const bytes = Uint8Array.from(atob(data.values), (c) => c.charCodeAt(0)), codes = new Uint16Array(bytes.buffer);
    const size = data.low.length, named = data.names.length > 0;
    const lines = data.shape.length > 1 ? data.shape[data.shape.length - 1] : 1, length = size / lines;
    const blended = (blend) => {
      if (blend instanceof Float64Array) return blend.map((v, i) => (v - data.low[i]) / (data.high[i] - data.low[i] || 1));
      const out = new Float64Array(size);
      for (const [tile, weight] of blend) {
        for (let i = 0; i < size; i++) {
          const code = codes[tile * size + i];
          out[i] += code === 65535 ? NaN : (weight * code) / 65534;
        }
      }
      return out;
    };
    const path = (pen, values, place, line) => {
      pen.beginPath();
      let open = false;
      for (let t = 0; t < length; t++) {
        const v = values[t * lines + line];
        if (Number.isNaN(v)) { open = false; continue; }
        const [px, py] = place(t, v);
        if (open) pen.lineTo(px, py); else pen.moveTo(px, py);
        open = true;
      }
      pen.stroke();
    };
    return {
      ready: Promise.resolve(),
      canvas: () => make("canvas", { class: "picture curve", style: `aspect-ratio: ${named && length > 6 ? 1.7 : 2}` }),
      draw(canvas, blend, behind, small) {
        const [pen, width, tall] = fit(canvas);
        const left = small ? 2 : 44, right = small ? 2 : 12, top = small ? 2 : 10;
        const bottom = small ? 2 : named && length > 4 ? 62 : 24;
        const place = (t, v) => [
          left + ((width - left - right) * (length === 1 ? 0.5 : t / (length - 1))),
          top + (tall - top - bottom) * (1 - v),
        ];
        pen.lineJoin = "round";
        if (!small) {
          pen.strokeStyle = css("--edge");
          pen.fillStyle = css("--soft");
          pen.font = "11px system-ui, sans-serif";
          pen.lineWidth = 1;
          for (const v of [0, 0.5, 1]) {
            const [, py] = place(0, v);
            pen.beginPath(); pen.moveTo(left, py); pen.lineTo(width - right, py); pen.stroke();
            const value = data.low[0] + v * (data.high[0] - data.low[0]);
            const words = named ? ["low", "", "high"][2 * v] : String(Number(value.toPrecision(3))).replace("-", "\u2212");
            pen.textAlign = "right"; pen.fillText(words, left - 5, py + 4);
          }
          if (named) {
            data.names.forEach((name, t) => {
              const [px] = place(t, 0);
              pen.beginPath(); pen.moveTo(px, top); pen.lineTo(px, tall - bottom); pen.stroke();
              const words = name.length > 12 ? name.slice(0, 11) + "\u2026" : name;
              if (length > 4) {
                pen.save(); pen.translate(px + 3, tall - bottom + 10); pen.rotate(-0.7);
                pen.textAlign = "right"; pen.fillText(words, 0, 4); pen.restore();
              } else {
                const half = pen.measureText(words).width / 2 + 1;
                pen.textAlign = "center";
                pen.fillText(words, Math.min(Math.max(px, half), width - half), tall - bottom + 16);
              }
            });
          } else {
            pen.textAlign = "left"; pen.fillText("0", left, tall - 8);
            pen.textAlign = "right"; pen.fillText(String(length - 1), width - right, tall - 8);
          }
        }
        const shades = dark.matches ? DARK : LIGHT;
        if (behind) {
          pen.strokeStyle = css("--soft"); pen.globalAlpha = 0.55; pen.lineWidth = 1.2; pen.setLineDash([4, 3]);
          for (let line = 0; line < lines; line++) path(pen, blended(behind), place, line);
          pen.setLineDash([]); pen.globalAlpha = 1;
        }
        const values = blended(blend);
        for (let line = 0; line < lines; line++) {
          pen.strokeStyle = lines === 1 ? css("--accent") : shades[line % shades.length];
          pen.lineWidth = small ? 1.2 : 2;
          path(pen, values, place, line);
        }
        if (!small && length <= 40 && lines === 1) {
          pen.fillStyle = css("--accent");
          for (let t = 0; t < length; t++) {
            const [px, py] = place(t, values[t]);
            pen.beginPath(); pen.arc(px, py, 3, 0, 7); pen.fill();
          }
        }
      },
    };
  };

  const renderer = data.kind === "image" ? images() : curves();
  const isCurve = data.kind !== "image";

  /* Blends: of four computed values around a point of the map, of two along a slider. */
  const atPoint = (x, y) => {
    const u = clamp(((x - x0) / (x1 - x0)) * (side - 1), 0, side - 1);
    const v = height > 1 ? clamp(((y - y0) / (y1 - y0)) * (height - 1), 0, height - 1) : 0;
    const i = Math.min(Math.floor(u), side - 2), j = Math.min(Math.floor(v), Math.max(0, height - 2));
    const a = u - i, b = v - j, out = [];
    for (const [di, dj, weight] of [[0, 0, (1 - a) * (1 - b)], [1, 0, a * (1 - b)], [0, 1, (1 - a) * b], [1, 1, a * b]]) {
      if (weight > 0.001) out.push([(j + dj) * side + i + di, weight]);
    }
    return out;
  };
  const atSlider = (point, dim, value) => {
    const { low, high } = data.dims[dim], last = data.steps - 1;
    const t = clamp(((value - low) / (high - low)) * last, 0, last), i = Math.min(Math.floor(t), last - 1);
    const first = START.dims + (point * data.dims.length + dim) * data.steps + i;
    return [[first, 1 - (t - i)], [first + 1, t - i]].filter(([, weight]) => weight > 0.001);
  };
  const nearest = (x, y) => {
    let best = 0, least = Infinity;
    for (let i = 0; i < count; i++) {
      const dx = (data.points[0][i] - x) / (x1 - x0), dy = height > 1 ? (data.points[1][i] - y) / (y1 - y0) : 0;
      if (dx * dx + dy * dy < least) { least = dx * dx + dy * dy; best = i; }
    }
    return best;
  };

  /* The page */
  const schemes = [];
  if (data.labels) schemes.push(["labels", "label"]);
  if (data.logPx) schemes.push(["logPx", "log p(x)"], ["kHat", "k\u0302"]);
  const select = make("select", { "aria-label": "colour of the data" });
  for (const [key, words] of schemes) select.append(make("option", { value: key }, words));
  state.color = schemes.length ? schemes[0][0] : "";
  const map = make("canvas", {
    tabindex: "0", role: "application", id: "explorer-map", "aria-describedby": "explorer-help",
    "aria-label": `map of ${data.site}: arrow keys move the cursor, Enter chooses the nearest datum`,
  });
  const legend = make("div", { class: "legend" });
  const help = make("p", { class: "hint", id: "explorer-help" },
    `Posterior means of ${data.site}. Move over the map to see the mean of p(x | ${data.site}) there; click a datum, or ` +
    "press Enter, to choose the nearest. Arrow keys move the cursor, N and P step through the data.");
  const bar = make("div", { class: "bar" }, make("h3", {}, `Map of ${data.site}`));
  if (schemes.length) bar.append(make("label", {}, "colour ", select));
  const now = renderer.canvas(), where = make("output", { "aria-live": "off" });
  now.id = "explorer-now";
  const own = renderer.canvas(), rebuilt = renderer.canvas(), facts = make("dl"), near = make("div", { class: "near" });
  own.id = "explorer-own"; rebuilt.id = "explorer-reconstruction";
  const title = make("h3", { "aria-live": "polite", id: "explorer-title" });
  const varied = renderer.canvas(), rows = make("div", { class: "rows" });
  varied.id = "explorer-varied";
  const reset = make("button", { class: "reset", type: "button" }, "back to the datum");
  const curve = isCurve ? " curves" : "";
  root.replaceChildren(
    make("div", { class: "panel map" }, bar, map, legend, help),
    make("div", { class: "side" },
      make("div", { class: "panel now" }, make("h3", {}, `Mean of p(x | ${data.site}) at the cursor`), now, where),
      make("div", { class: "panel" }, title,
        make("div", { class: `two${curve}` },
          make("figure", {}, own, make("span", {}, "datum")),
          make("figure", {}, rebuilt, make("span", {}, isCurve ? "reconstruction, datum dashed" : "reconstruction"))),
        facts, make("p", { class: "hint" }, `nearest in ${data.site}`), near)),
    make("div", { class: `panel dims${curve}` },
      make("div", { class: "bar" }, make("h3", { id: "explorer-dims-title" }), reset), varied, rows));

  const sliders = data.dims.map((dim, i) => {
    const input = make("input", {
      type: "range", min: dim.low, max: dim.high, step: (dim.high - dim.low) / 200, "aria-label": `${data.site}[${dim.dim}]`,
    });
    const shown = make("span");
    input.addEventListener("input", () => {
      if (!data.decoder) state.moved.clear();
      state.moved.set(i, Number(input.value));
      state.last = i;
      drawDims();
    });
    const idle = dim.spread < 0.1 * data.dims[0].spread ? " idle" : "";
    rows.append(make("label", { class: `dim${idle}` }, make("span", {}, `${data.site}[${dim.dim}]`), input, shown));
    return { input, shown };
  });
  if (data.numDims > data.dims.length) {
    rows.append(make("p", { class: "hint" }, `the ${data.dims.length} most active of ${data.numDims} dims`));
  }

  const palette = () => (dark.matches ? DARK : LIGHT);
  const colors = () => {
    if (state.color === "labels") return data.labels.map((c) => palette()[c % 10]);
    if (!state.color) return Array(count).fill(css("--accent"));
    const values = data[state.color], known = values.filter((v) => v !== null);
    const sorted = [...known].sort((a, b) => a - b), low = sorted[0], high = sorted[sorted.length - 1];
    return values.map((v) => (v === null ? "#888" : RAMP[Math.round(((v - low) / (high - low || 1)) * (RAMP.length - 1))]));
  };
  const drawLegend = () => {
    legend.replaceChildren();
    if (state.color === "labels") {
      data.classes.forEach((name, c) =>
        legend.append(make("span", {}, make("i", { style: `background: ${palette()[c % 10]}` }), name)));
    } else if (state.color) {
      const known = data[state.color].filter((v) => v !== null);
      const ramp = make("span", { class: "ramp", style: `background: linear-gradient(90deg, ${RAMP.join(", ")})` });
      legend.append(make("span", {}, number(Math.min(...known), 2), ramp, number(Math.max(...known), 2)));
    }
  };

  const drawMap = () => {
    const [pen, width, tall] = fit(map), pad = 16;
    const px = (x) => pad + ((x - x0) / (x1 - x0)) * (width - 2 * pad);
    const py = (y) => tall - pad - ((y - y0) / (y1 - y0)) * (tall - 2 * pad);
    pen.fillStyle = css("--soft");
    pen.globalAlpha = 0.16;
    for (let i = 0; i < data.others[0].length; i++) pen.fillRect(px(data.others[0][i]) - 1, py(data.others[1][i]) - 1, 2, 2);
    pen.globalAlpha = 1;
    pen.font = "11px system-ui, sans-serif";
    pen.fillStyle = css("--soft");
    pen.textAlign = "right"; pen.fillText(data.axes[0], width - 8, tall - 6);
    pen.save(); pen.translate(12, 8); pen.rotate(-Math.PI / 2); pen.textAlign = "right"; pen.fillText(data.axes[1], 0, 0);
    pen.restore();
    const shades = colors(), radius = clamp(5.5 - count / 100, 3, 5);
    for (let i = 0; i < count; i++) {
      pen.fillStyle = shades[i];
      pen.beginPath(); pen.arc(px(data.points[0][i]), py(data.points[1][i]), radius, 0, 7); pen.fill();
      pen.lineWidth = 0.8; pen.strokeStyle = css("--paper"); pen.stroke();
    }
    pen.strokeStyle = css("--cursor");
    pen.lineWidth = 1;
    for (const i of data.near[state.chosen]) {
      pen.globalAlpha = 0.6;
      pen.beginPath(); pen.arc(px(data.points[0][i]), py(data.points[1][i]), radius + 2, 0, 7); pen.stroke();
    }
    pen.globalAlpha = 1;
    pen.lineWidth = 2.4;
    pen.beginPath(); pen.arc(px(data.points[0][state.chosen]), py(data.points[1][state.chosen]), radius + 3, 0, 7); pen.stroke();
    pen.lineWidth = 1;
    pen.setLineDash([2, 4]);
    pen.beginPath(); pen.moveTo(px(state.x), 0); pen.lineTo(px(state.x), tall); pen.stroke();
    if (height > 1) { pen.beginPath(); pen.moveTo(0, py(state.y)); pen.lineTo(width, py(state.y)); pen.stroke(); }
    pen.setLineDash([]);
  };
  const drawNow = () => {
    renderer.draw(now, atPoint(state.x, state.y));
    const place = height > 1 ? `(${number(state.x, 2)}, ${number(state.y, 2)})` : number(state.x, 2);
    where.textContent = `at ${place}, nearest datum #${data.rows[nearest(state.x, state.y)]}`;
  };
  const drawDatum = () => {
    const i = state.chosen;
    title.textContent = `Datum #${data.rows[i]}`;
    renderer.draw(own, [[START.data + i, 1]]);
    renderer.draw(rebuilt, [[START.means + i, 1]], isCurve ? [[START.data + i, 1]] : null);
    facts.replaceChildren();
    const fact = (name, value, bad) => facts.append(make("dt", {}, name), make("dd", bad ? { class: "bad" } : {}, value));
    if (data.labels) fact("label", data.classes[data.labels[i]]);
    if (data.logPx) {
      fact("log p(x)", `${number(data.logPx[i], 2)} nats`);
      fact("k\u0302", number(data.kHat[i], 2));
      fact("estimate", data.reliable[i] ? "reliable" : "not reliable", !data.reliable[i]);
    }
    const buttons = data.near[i].map((j) => {
      const canvas = renderer.canvas();
      const button = make("button", { type: "button", "aria-label": `choose datum #${data.rows[j]}`, title: `#${data.rows[j]}` }, canvas);
      button.addEventListener("click", () => choose(j));
      return [button, canvas, j];
    });
    near.replaceChildren(...buttons.map(([button]) => button));
    for (const [, canvas, j] of buttons) renderer.draw(canvas, [[START.data + j, 1]], null, true);
  };
  const drawDims = () => {
    const i = state.chosen;
    data.dims.forEach((_, d) => {
      const value = state.moved.has(d) ? state.moved.get(d) : data.z[i][d];
      if (d !== state.last || !state.moved.has(d)) sliders[d].input.value = value;
      sliders[d].shown.textContent = number(value, 2);
      sliders[d].input.setAttribute("aria-valuetext", number(value, 2));
    });
    const still = state.moved.size === 0;
    let shown = [[START.means + i, 1]];
    if (!still && data.decoder) {
      const z = [...data.decoder.z[i]];
      for (const [d, value] of state.moved) z[data.dims[d].dim] = value;
      shown = decode(z);
    } else if (!still) shown = atSlider(i, state.last, state.moved.get(state.last));
    renderer.draw(varied, shown, isCurve ? [[START.means + i, 1]] : null);
    const words = [...state.moved].map(([d, value]) => `${data.site}[${data.dims[d].dim}] = ${number(value, 2)}`);
    document.getElementById("explorer-dims-title").textContent =
      `${data.decoder ? `Dims of ${data.site}` : `One dim of ${data.site} at a time`}, ` +
      `the others those of datum #${data.rows[i]}${words.length > 3 ? `: ${words.length} moved` : words.length ? `: ${words.join(", ")}` : ""}`;
    reset.disabled = still;
  };
  const choose = (i, follow = true) => {
    state.chosen = (i + count) % count;
    state.moved.clear();
    if (follow) { state.x = data.points[0][state.chosen]; state.y = data.points[1][state.chosen]; }
    drawMap(); drawNow(); drawDatum(); drawDims();
  };
  const drawAll = () => { drawLegend(); drawMap(); drawNow(); drawDatum(); drawDims(); };

  const fromEvent = (event) => {
    const box = map.getBoundingClientRect(), pad = 16;
    state.x = clamp(x0 + ((event.clientX - box.left - pad) / (box.width - 2 * pad)) * (x1 - x0), x0, x1);
    state.y = clamp(y0 + ((box.bottom - pad - event.clientY) / (box.height - 2 * pad)) * (y1 - y0), y0, y1);
  };
  let pending = false;
  const moved = () => {
    if (pending) return;
    pending = true;
    requestAnimationFrame(() => { pending = false; drawMap(); drawNow(); });
  };
  map.addEventListener("pointermove", (event) => { fromEvent(event); moved(); });
  map.addEventListener("click", (event) => { fromEvent(event); choose(nearest(state.x, state.y)); });
  map.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 0.1 : 0.025, key = event.key;
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[key] || [0, 0];
    if (dx || dy) {
      state.x = clamp(state.x + dx * step * (x1 - x0), x0, x1);
      state.y = clamp(state.y + dy * step * (y1 - y0), y0, y1);
      moved();
    } else if (key === "Enter" || key === " ") choose(nearest(state.x, state.y));
    else if (key === "n" || key === "N") choose(state.chosen + 1);
    else if (key === "p" || key === "P") choose(state.chosen - 1);
    else return;
    event.preventDefault();
  });
  select.addEventListener("change", () => { state.color = select.value; drawLegend(); drawMap(); });
  reset.addEventListener("click", () => { state.moved.clear(); drawDims(); });
  dark.addEventListener("change", drawAll);
  new ResizeObserver(() => drawAll()).observe(root);
  renderer.ready.then(() => { choose(0); drawLegend(); root.dataset.ready = "yes"; });
})();
