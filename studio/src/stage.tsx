// The frame, its masks and what is drawn on them.

import { useEffect, useRef, useState } from "preact/hooks";
import type { LabelMap, Point, Rect } from "./labels";
import { type Store, useStore } from "./store";

const CLOSE = 10; // screen pixels within which a click on the first corner closes a polygon
const LONGEST_ZOOM = 32;
const BAND = 1 << 20; // pixels that are coloured at a time: a whole 4K frame would take 33 MB for each that is shown
const WHOLE_FROM = 1.25; // screen pixels a preview pixel, from which on the whole frame is fetched

interface View {
  scale: number;
  x: number;
  y: number;
}

function rgb(colour: string): [number, number, number] {
  const value = parseInt(colour.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

/** Colour a part of a label map into a canvas of the frame's size: see-through inside, solid along the borders. */
function paintLabels(
  context: CanvasRenderingContext2D,
  labels: LabelMap,
  changed: Rect,
  colours: Map<number, number[]>,
  opacity: number,
) {
  const rect = {  // with the pixels around, which may have become a border
    left: Math.max(0, changed.left - 1),
    top: Math.max(0, changed.top - 1),
    right: Math.min(labels.width, changed.right + 1),
    bottom: Math.min(labels.height, changed.bottom + 1),
  };
  const width = rect.right - rect.left;
  if (changed.right <= changed.left || changed.bottom <= changed.top) return;
  const inside = new Uint32Array(256);
  const border = new Uint32Array(256);
  for (const [id, [r, g, b]] of colours) {
    const colour = (b << 16) | (g << 8) | r;
    inside[id] = ((Math.round(opacity * 255) << 24) | colour) >>> 0;
    border[id] = ((255 << 24) | colour) >>> 0;
  }
  const { data } = labels;
  inBands(context, rect, (words, top, bottom) => {
    for (let y = top; y < bottom; y++) {
      const row = y * labels.width + rect.left;
      for (let x = 0; x < width; x++) {
        const place = row + x;
        const label = data[place];
        if (!label) continue;
        const edge =
          (x + rect.left > 0 && data[place - 1] !== label) ||
          (x + rect.left < labels.width - 1 && data[place + 1] !== label) ||
          (y > 0 && data[place - labels.width] !== label) ||
          (y < labels.height - 1 && data[place + labels.width] !== label);
        words[(y - top) * width + x] = (edge ? border : inside)[label];
      }
    }
  });
}

/** Draw the borders of a label map in one colour. */
function paintBorders(context: CanvasRenderingContext2D, labels: LabelMap) {
  const { width, height, data } = labels;
  const thick = Math.max(1, Math.round(Math.min(width, height) / 240));
  inBands(context, { left: 0, top: 0, right: width, bottom: height }, (words, top, bottom) => {
    for (let y = top; y < bottom; y++) {
      for (let x = 0; x < width; x++) {
        const place = y * width + x;
        const label = data[place];
        if (!label) continue;
        const edge =
          (x >= thick && data[place - thick] !== label) ||
          (x + thick < width && data[place + thick] !== label) ||
          (y >= thick && data[place - thick * width] !== label) ||
          (y + thick < height && data[place + thick * width] !== label);
        if (edge) words[(y - top) * width + x] = 0xffffffff;
      }
    }
  });
}

/** Replace a part of a canvas some rows at a time; `fill` colours the rows from `top` to `bottom` into clear words. */
function inBands(
  context: CanvasRenderingContext2D,
  rect: Rect,
  fill: (words: Uint32Array, top: number, bottom: number) => void,
) {
  const width = rect.right - rect.left;
  const rows = Math.min(rect.bottom - rect.top, Math.max(1, Math.floor(BAND / width)));
  const image = context.createImageData(width, rows);
  const words = new Uint32Array(image.data.buffer);
  for (let top = rect.top; top < rect.bottom; top += rows) {
    const bottom = Math.min(rect.bottom, top + rows);
    words.fill(0);
    fill(words, top, bottom);
    context.putImageData(image, rect.left, top, 0, 0, width, bottom - top);
  }
}

function canvasOf(width: number, height: number): CanvasRenderingContext2D {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas.getContext("2d")!;
}

export function Stage({ store }: { store: Store }) {
  useStore(store);
  const holder = useRef<HTMLDivElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const view = useRef<View | null>(null);
  const area = useRef({ width: 0, height: 0 });  // of the stage, for which the view was made
  const fitted = useRef(true);  // whether the whole frame is shown, as until one zooms or moves it
  const painted = useRef("");  // the colours and opacity that the masks were painted with
  const layers = useRef<{ masks: CanvasRenderingContext2D; borders: CanvasRenderingContext2D | null; before: LabelMap | null } | null>(null);
  const pointers = useRef(new Map<number, Point>());
  const gesture = useRef<"draw" | "pan" | "box" | null>(null);
  const corners = useRef<Point[]>([]);
  const clicks = useRef<{ frame: number; object: number; points: { x: number; y: number; on: boolean }[] } | null>(null);
  const anchor = useRef<Point | null>(null);
  const cursor = useRef<Point | null>(null);
  const [, redraw] = useState(0);
  const { width, height } = store.state;

  if (!layers.current) layers.current = { masks: canvasOf(width, height), borders: null, before: null };

  const fit = () => {
    if (!holder.current) return;
    const { clientWidth, clientHeight } = holder.current;
    const scale = Math.min(clientWidth / width, clientHeight / height) * 0.98;
    view.current = { scale, x: (clientWidth - width * scale) / 2, y: (clientHeight - height * scale) / 2 };
    area.current = { width: clientWidth, height: clientHeight };
    fitted.current = true;
  };

  /** The stage has another size: what was in its middle stays there. */
  const resize = () => {
    if (fitted.current || !view.current || !holder.current) return fit();
    const { clientWidth, clientHeight } = holder.current;
    const { scale, x, y } = view.current;
    view.current = { scale, x: x + (clientWidth - area.current.width) / 2, y: y + (clientHeight - area.current.height) / 2 };
    area.current = { width: clientWidth, height: clientHeight };
  };

  const toFrame = (event: { clientX: number; clientY: number }): Point => {
    const box = canvas.current!.getBoundingClientRect();
    const { scale, x, y } = view.current!;
    return { x: (event.clientX - box.left - x) / scale, y: (event.clientY - box.top - y) / scale };
  };

  const zoom = (factor: number, at?: { clientX: number; clientY: number }) => {
    const now = view.current!;
    const box = canvas.current!.getBoundingClientRect();
    const px = at ? at.clientX - box.left : box.width / 2;
    const py = at ? at.clientY - box.top : box.height / 2;
    const least = Math.min(box.width / width, box.height / height) * 0.5;
    const scale = Math.min(LONGEST_ZOOM, Math.max(least, now.scale * factor));
    const share = scale / now.scale;
    view.current = { scale, x: px - (px - now.x) * share, y: py - (py - now.y) * share };
    fitted.current = false;
    redraw((n) => n + 1);
  };

  const paint = () => {
    const element = canvas.current;
    const around = holder.current;
    if (!element || !around || !view.current) return;
    const ratio = window.devicePixelRatio || 1;
    const wide = Math.round(around.clientWidth * ratio);
    const high = Math.round(around.clientHeight * ratio);
    if (element.width !== wide || element.height !== high) {
      element.width = wide;
      element.height = high;
    }
    const context = element.getContext("2d")!;
    const { scale, x, y } = view.current;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, wide, high);
    context.setTransform(scale * ratio, 0, 0, scale * ratio, x * ratio, y * ratio);
    context.imageSmoothingEnabled = scale < 4;
    if (store.picture) context.drawImage(store.picture, 0, 0, width, height);
    const { masks } = layers.current!;
    const { objects } = store.state;
    const style = `${store.opacity} ${objects.map((object) => `${object.id}${object.colour}`).join()}`;
    const changed = style === painted.current ? store.changed : { left: 0, top: 0, right: width, bottom: height };
    if (changed) {
      const colours = new Map<number, number[]>(objects.map((object) => [object.id, rgb(object.colour)]));
      paintLabels(masks, store.labels, changed, colours, store.opacity);
      painted.current = style;
      store.changed = null;
    }
    if (store.masks) {
      context.imageSmoothingEnabled = scale < 1;
      context.drawImage(masks.canvas, 0, 0);
    }
    if (store.compare && store.before) {
      const borders = (layers.current!.borders ??= canvasOf(width, height));
      if (layers.current!.before !== store.before) {
        paintBorders(borders, store.before);
        layers.current!.before = store.before;
      }
      context.drawImage(borders.canvas, 0, 0);
    }
    paintTools(context, scale);
  };

  const paintTools = (context: CanvasRenderingContext2D, scale: number) => {
    const line = 1.5 / scale;
    const outline = (path: () => void) => {
      for (const [colour, wide] of [["#000", line * 2.4], ["#fff", line]] as const) {
        context.strokeStyle = colour;
        context.lineWidth = wide;
        context.beginPath();
        path();
        context.stroke();
      }
    };
    const at = cursor.current;
    const drawn = corners.current;
    if (store.tool === "polygon" && drawn.length) {
      outline(() => {
        drawn.forEach((p, i) => (i ? context.lineTo(p.x, p.y) : context.moveTo(p.x, p.y)));
        if (at) context.lineTo(at.x, at.y);
      });
      context.fillStyle = store.colour(store.object);
      for (const [i, p] of drawn.entries()) {
        context.beginPath();
        context.arc(p.x, p.y, (i ? 3 : 5) / scale, 0, 7);
        context.fill();
      }
    }
    if (store.tool === "box" && anchor.current && at) {
      const from = anchor.current;
      outline(() => context.rect(from.x, from.y, at.x - from.x, at.y - from.y));
    }
    if (store.tool === "click" && clicks.current?.frame === store.frame) {
      for (const point of clicks.current.points) {
        context.fillStyle = point.on ? "#3fbf5f" : "#e04040";
        context.beginPath();
        context.arc(point.x, point.y, 5 / scale, 0, 7);
        context.fill();
        outline(() => context.arc(point.x, point.y, 5 / scale, 0, 7));
      }
    }
    if ((store.tool === "brush" || store.tool === "eraser") && at && !gesture.current?.startsWith("pan")) {
      outline(() => context.arc(at.x, at.y, store.brush / 2, 0, 7));
    }
  };

  useEffect(() => {
    fit();
    const watcher = new ResizeObserver(() => {
      resize();
      redraw((n) => n + 1);
    });
    watcher.observe(holder.current!);
    const wheel = (event: WheelEvent) => {
      event.preventDefault();
      zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), event);
    };
    canvas.current!.addEventListener("wheel", wheel, { passive: false });
    const keys = (event: Event) => {
      const wish = (event as CustomEvent<string>).detail;
      if (wish === "fit") fit();
      if (wish === "in" || wish === "out") zoom(wish === "in" ? 1.25 : 0.8);
      if (wish === "close") closePolygon();
      if (wish === "cancel") {
        corners.current = [];
        anchor.current = null;
        clicks.current = null;
        gesture.current = null;
      }
      redraw((n) => n + 1);
    };
    addEventListener("stage", keys);
    const element = canvas.current!;
    return () => {
      watcher.disconnect();
      element.removeEventListener("wheel", wheel);
      removeEventListener("stage", keys);
    };
  }, []);

  useEffect(() => {
    paint();
    const { picture } = store;
    const magnified = picture && view.current ? (view.current.scale * width) / picture.width : 0;
    if (picture && picture.width < width && magnified > WHOLE_FROM) void store.sharpen();
  });

  const closePolygon = () => {
    store.polygon(corners.current);
    corners.current = [];
  };

  const down = (event: PointerEvent) => {
    canvas.current!.setPointerCapture(event.pointerId);
    pointers.current.set(event.pointerId, { x: event.clientX, y: event.clientY });
    const point = toFrame(event);
    cursor.current = point;
    store.watch = false;
    if (pointers.current.size === 2 || event.button === 1 || store.tool === "hand") {
      if (gesture.current === "draw") store.finishStroke();
      gesture.current = "pan";
      return;
    }
    if (event.button > 2 || store.playing || !store.ready) return;
    switch (store.tool) {
      case "brush":
      case "eraser":
        if (event.button) return;
        gesture.current = "draw";
        store.beginStroke();
        store.drawStroke(point, point);
        break;
      case "polygon": {
        const first = corners.current[0];
        const { scale } = view.current!;
        const closes = first && corners.current.length > 2 && Math.hypot(first.x - point.x, first.y - point.y) * scale < CLOSE;
        if (closes || event.button === 2) closePolygon();
        else corners.current.push(point);
        break;
      }
      case "fill":
        store.fill(point);
        break;
      case "box":
        gesture.current = "box";
        anchor.current = point;
        break;
      case "click": {
        const known = clicks.current;
        const same = known && known.frame === store.frame && known.object === store.object;
        const points = [...(same ? known.points : []), { ...point, on: !(event.button === 2 || event.altKey) }];
        clicks.current = { frame: store.frame, object: store.object, points };
        if (points.some((p) => p.on)) void store.click(points);
      }
    }
    redraw((n) => n + 1);
  };

  const move = (event: PointerEvent) => {
    const before = pointers.current.get(event.pointerId);
    const point = toFrame(event);
    if (gesture.current === "pan" && before) {
      const others = [...pointers.current.entries()].filter(([id]) => id !== event.pointerId);
      const now = view.current!;
      if (others.length) {
        const [, other] = others[0];
        const share =
          Math.hypot(event.clientX - other.x, event.clientY - other.y) /
          Math.max(1, Math.hypot(before.x - other.x, before.y - other.y));
        zoom(share, { clientX: (event.clientX + other.x) / 2, clientY: (event.clientY + other.y) / 2 });
      } else {
        view.current = { ...now, x: now.x + event.clientX - before.x, y: now.y + event.clientY - before.y };
        fitted.current = false;
      }
    } else if (gesture.current === "draw" && cursor.current) {
      store.drawStroke(cursor.current, point);
    }
    if (before) pointers.current.set(event.pointerId, { x: event.clientX, y: event.clientY });
    cursor.current = point;
    redraw((n) => n + 1);
  };

  const up = (event: PointerEvent) => {
    pointers.current.delete(event.pointerId);
    if (gesture.current === "draw") store.finishStroke();
    if (gesture.current === "box" && anchor.current) {
      const from = anchor.current;
      anchor.current = null;
      void store.box(from, toFrame(event));
    }
    if (!pointers.current.size) gesture.current = null;
    redraw((n) => n + 1);
  };

  const failed = store.failed === store.frame;
  const loading = !store.ready && !failed;
  const busy = loading || store.busy !== "" || store.pending > 0;
  return (
    <div class="stage" ref={holder} data-tool={store.tool} data-busy={busy ? 1 : 0}>
      <canvas
        ref={canvas}
        role="img"
        aria-label={`Frame ${store.frame} of ${store.state.title} with the masks of its objects`}
        onPointerDown={down}
        onPointerMove={move}
        onPointerUp={up}
        onPointerCancel={up}
        onPointerLeave={() => {
          cursor.current = null;
          redraw((n) => n + 1);
        }}
        onDblClick={() => store.tool === "polygon" && closePolygon()}
        onContextMenu={(event) => event.preventDefault()}
      />
      {(loading || store.busy) && <div class="chip busy">{store.busy || `frame ${store.frame} ...`}</div>}
      {failed && <div class="chip busy">frame {store.frame} cannot be shown</div>}
      {store.compare && (
        <div class="chip note">{store.before ? "white: the result before" : "no earlier result on this frame"}</div>
      )}
    </div>
  );
}

/** Tell the stage what a key asks for. */
export function tellStage(wish: "fit" | "in" | "out" | "close" | "cancel"): void {
  dispatchEvent(new CustomEvent("stage", { detail: wish }));
}
