// The time line: thumbnails, how certain the result is, what was marked, and where one is.

import { useEffect, useRef, useState } from "preact/hooks";
import { Icon } from "./icons";
import { lowerBound, type Store, useStore } from "./store";
import { useTheme } from "./theme";

const THUMBNAIL = 96; // pixels of the strip for each
const DOUBTFUL = 0.95; // confidence from which on a bar is calm

export function clock(seconds: number): string {
  const minutes = Math.floor(seconds / 60);
  return `${minutes}:${(seconds - minutes * 60).toFixed(2).padStart(5, "0")}`;
}

export function Timeline({ store }: { store: Store }) {
  useStore(store);
  const strip = useRef<HTMLDivElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const [wide, setWide] = useState(800);
  const dragging = useRef(false);
  const { count, marks, frames, confidence, rate, look, reading } = store.state;
  const theme = useTheme();

  useEffect(() => {
    const watcher = new ResizeObserver(([entry]) => setWide(entry.contentRect.width));
    watcher.observe(strip.current!);
    return () => watcher.disconnect();
  }, []);

  const share = (frame: number) => (count > 1 ? frame / (count - 1) : 0);

  useEffect(() => {
    const element = canvas.current!;
    const ratio = window.devicePixelRatio || 1;
    element.width = Math.max(1, Math.round(wide * ratio));
    element.height = Math.round(22 * ratio);
    const context = element.getContext("2d")!;
    const style = getComputedStyle(element);
    const [lost, doubtful, sure] = ["--lost", "--doubt", "--sure"].map((name) => style.getPropertyValue(name));
    const height = element.height;
    const slot = Math.max(1, Math.ceil(element.width / count));
    const worst = new Float32Array(element.width).fill(-1); // doubt of the frames of each column; 2: an object is lost
    for (let i = 0; i < frames.length; i++) {
      const x = Math.floor(share(frames[i]) * (element.width - slot));
      const value = confidence[i];
      const doubt = value === null ? 2 : Math.min(1, Math.max(0, (DOUBTFUL - value) / (DOUBTFUL - 0.5)));
      if (doubt > worst[x]) worst[x] = doubt;
    }
    for (let x = 0; x < worst.length; x++) {
      const doubt = worst[x];
      if (doubt < 0) continue;
      context.fillStyle = doubt > 1 ? lost : doubt > 0.25 ? doubtful : sure;
      const high = Math.min(1, Math.max(0.2, doubt)) * height;
      context.fillRect(x, height - high, slot, high);
    }
  }, [store.arrivals, wide, count, theme]);

  const seek = (event: PointerEvent) => {
    const box = strip.current!.getBoundingClientRect();
    const place = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    store.watch = false;
    void store.show(place * (count - 1));
  };

  const shown = Math.max(1, Math.min(count, Math.round(wide / THUMBNAIL)));
  const thumbnails = Array.from({ length: shown }, (_, i) => Math.round(((i + 0.5) / shown) * (count - 1)));
  const place = lowerBound(frames, store.frame);
  const certain = frames[place] === store.frame ? confidence[place] : undefined;
  const isMarked = marks.includes(store.frame);
  const next = store.nextLook;
  const here = look.find((entry) => entry.frame === store.frame);

  return (
    <section class="timeline" aria-label="Time line">
      <div class="transport">
        <button type="button" aria-label="First frame" title="First frame (Home)" onClick={() => store.show(0)}>
          <Icon name="first" />
        </button>
        <button type="button" aria-label="Previous frame" title="Previous frame (left arrow)" onClick={() => store.step(-1)}>
          <Icon name="left" />
        </button>
        <button
          type="button"
          aria-label={store.playing ? "Stop playing" : "Play"}
          title="Play (space)"
          onClick={() => store.play()}
        >
          <Icon name={store.playing ? "pause" : "play"} />
        </button>
        <button type="button" aria-label="Next frame" title="Next frame (right arrow)" onClick={() => store.step(1)}>
          <Icon name="right" />
        </button>
        <button type="button" aria-label="Last frame" title="Last frame (End)" onClick={() => store.show(store.last)}>
          <Icon name="last" />
        </button>
        <span class="where">
          <b>{store.frame}</b> / {store.last}
          {store.state.exact ? "" : "?"} <span class="soft">{clock(store.frame / rate)}</span>
        </span>
        <span class="soft fact">
          {isMarked ? "marked by you" : certain === undefined ? "no mask yet" : certain === null ? "no object here" : `confidence ${certain.toFixed(2)}`}
        </span>
        {here && here.kind !== "confidence" && <span class="warning" title={here.why}>{here.why}</span>}
        {next && (
          <button
            type="button"
            class="doubtful"
            title={`Frame ${next.frame}: ${next.why} (N)`}
            onClick={() => {
              store.watch = false;
              void store.show(next.frame);
            }}
          >
            <Icon name="look" /> Next doubtful frame
          </button>
        )}
      </div>
      <div
        ref={strip}
        class="strip"
        role="slider"
        tabIndex={0}
        aria-label="Frame"
        aria-valuemin={0}
        aria-valuemax={count - 1}
        aria-valuenow={store.frame}
        aria-valuetext={`frame ${store.frame}, ${clock(store.frame / rate)}`}
        onPointerDown={(event) => {
          dragging.current = true;
          event.currentTarget.setPointerCapture(event.pointerId);
          seek(event);
        }}
        onPointerMove={(event) => dragging.current && seek(event)}
        onPointerUp={() => (dragging.current = false)}
        onPointerCancel={() => (dragging.current = false)}
      >
        <div class="thumbnails" aria-hidden="true">
          {thumbnails.map((frame, i) => (
            <img key={i} src={reading ? undefined : store.api.thumbnail(frame)} alt="" draggable={false} loading="lazy" />
          ))}
        </div>
        <canvas ref={canvas} class="confidence" aria-hidden="true" />
        {look.map((entry) => (
          <i
            key={`look ${entry.frame}`}
            class={`look-here ${entry.kind}`}
            style={{ left: `${share(entry.frame) * 100}%` }}
            title={`look at frame ${entry.frame}: ${entry.why}`}
          />
        ))}
        {marks.map((frame) => (
          <i key={frame} class="mark" style={{ left: `${share(frame) * 100}%` }} title={`frame ${frame} is marked`} />
        ))}
        <i class="now" style={{ left: `${share(store.frame) * 100}%` }} />
      </div>
    </section>
  );
}
