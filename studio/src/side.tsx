// The steps from a video to files: objects, follow, look, export.

import { useState } from "preact/hooks";
import type { Job } from "./api";
import { Icon } from "./icons";
import { type Store, useStore } from "./store";

function sized(bytes: number): string {
  if (bytes < 1e6) return `${Math.max(1, Math.round(bytes / 1e3))} kB`;
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
}

function Objects({ store }: { store: Store }) {
  return (
    <section aria-labelledby="objects-title">
      <h2 id="objects-title">1. Mark the objects</h2>
      <p class="hint">Choose a frame that shows them well. Draw each one in its colour; a box or a polygon is quickest.</p>
      <ul class="objects">
        {store.state.objects.map((object, i) => (
          <li key={object.id} class={object.id === store.object ? "chosen" : ""}>
            <button
              type="button"
              class="swatch"
              aria-label={`Draw ${object.name}`}
              aria-pressed={object.id === store.object}
              title={i < 9 ? `Draw ${object.name} (${i + 1})` : `Draw ${object.name}`}
              style={{ background: object.colour }}
              onClick={() => store.choose(i)}
            />
            <input
              aria-label={`Name of object ${object.id}`}
              value={object.name}
              maxLength={80}
              onFocus={() => store.choose(i)}
              onKeyDown={(event) => event.key === "Enter" && event.currentTarget.blur()}
              onChange={(event) => store.rename(object.id, event.currentTarget.value)}
            />
            {i < 9 && <kbd>{i + 1}</kbd>}
          </li>
        ))}
      </ul>
      <div class="row">
        <button type="button" onClick={() => store.addObject()}>
          <Icon name="plus" /> Add an object
        </button>
        {store.marked.includes(store.frame) && (
          <button type="button" title="Take back what was drawn on this frame" onClick={() => store.clear()}>
            <Icon name="trash" /> Clear this frame
          </button>
        )}
      </div>
    </section>
  );
}

function Progress({ job }: { job: Job }) {
  const share = job.total ? Math.min(1, job.done / job.total) : 0;
  const left = job.total && job.rate ? Math.ceil((job.total - job.done) / job.rate) : null;
  const time = left === null ? "" : left > 90 ? `, about ${Math.round(left / 60)} min left` : `, ${left} s left`;
  return (
    <>
      <progress max={1} value={share} aria-label="Progress" />
      <p class="soft" role="status">
        {job.state === "waiting" ? "waiting" : `${job.done} of ${job.total ?? "?"} frames`}
        {job.rate ? `, ${job.rate.toFixed(1)} frames a second` : ""}
        {job.state === "running" ? time : ""}
        {job.state === "paused" ? `, paused${job.message ? `: ${job.message}` : ""}` : ""}
      </p>
    </>
  );
}

function Follow({ store }: { store: Store }) {
  const [until, setUntil] = useState("");
  const job = store.following ?? store.paused;
  const running = store.following;
  const limit = until.trim() === "" ? null : Number(until);
  const ready = store.marked.length > 0;
  const here = store.marked.includes(store.frame) || store.state.frames.includes(store.frame);
  return (
    <section aria-labelledby="follow-title">
      <h2 id="follow-title">2. Follow them</h2>
      {job && <Progress job={job} />}
      {running ? (
        <>
          <div class="row">
            <button type="button" class="main" onClick={() => store.job(running, "pause")}>
              <Icon name="pause" /> Pause
            </button>
            <button type="button" onClick={() => store.job(running, "stop")}>
              <Icon name="close" /> Stop
            </button>
          </div>
          <label class="check">
            <input
              type="checkbox"
              checked={store.watch}
              onChange={(event) => {
                store.watch = event.currentTarget.checked;
                store.notify();
              }}
            />
            Watch it work
          </label>
        </>
      ) : (
        <>
          {store.paused && (
            <div class="row">
              <button type="button" class="main" onClick={() => store.job(store.paused!, "resume")}>
                <Icon name="play" /> Continue
              </button>
            </div>
          )}
          {store.paused && (
            <p class="hint">
              Correct the latest frame, or mark frames to come: both are taken along. Correct an earlier frame, and it is followed
              again from there; what is before it stays.
            </p>
          )}
          <div class="row">
            <button type="button" class={store.paused ? "" : "main"} disabled={!ready} onClick={() => store.follow("all")}>
              <Icon name="play" /> Follow through the video
            </button>
          </div>
          <p class="hint">Where it goes wrong, correct a frame, then go on from there:</p>
          <div class="row">
            <button type="button" disabled={!here} onClick={() => store.follow("backward")}>
              <Icon name="left" /> Backward from here
            </button>
            <button type="button" disabled={!here} onClick={() => store.follow("forward", limit)}>
              Forward from here <Icon name="right" />
            </button>
          </div>
          <label class="until">
            up to frame
            <input
              type="number"
              min={0}
              max={store.last}
              placeholder="the end"
              value={until}
              onInput={(event) => setUntil(event.currentTarget.value)}
            />
          </label>
          {store.state.frames.length > 0 && (
            <button type="button" class="quiet" onClick={() => store.discard()}>
              <Icon name="undo" /> Take back the latest result
            </button>
          )}
        </>
      )}
    </section>
  );
}

function Look({ store }: { store: Store }) {
  const { look, frames } = store.state;
  return (
    <section aria-labelledby="look-title">
      <h2 id="look-title">3. Look and correct</h2>
      {look.length ? (
        <ul class="look">
          {look.map((entry) => (
            <li key={entry.frame}>
              <button
                type="button"
                class="quiet"
                onClick={() => {
                  store.watch = false;
                  void store.show(entry.frame);
                }}
              >
                <b>frame {entry.frame}</b> {entry.why}
              </button>
            </li>
          ))}
        </ul>
      ) : (
        <p class="hint">
          {frames.length
            ? "No frame is doubtful. Play the video to be sure."
            : "The frames that deserve a look are listed here when objects have been followed."}
        </p>
      )}
    </section>
  );
}

function Export({ store }: { store: Store }) {
  const [kind, setKind] = useState("overlay");
  const { exports, export_kinds: kinds, frames, marks, command } = store.state;
  const job = store.state.jobs.find((other) => other.kind === "export" && ["running", "waiting"].includes(other.state));
  const none = !frames.length && !marks.length;
  return (
    <section aria-labelledby="export-title">
      <h2 id="export-title">4. Take it away</h2>
      <div class="row">
        <select aria-label="Kind of file" value={kind} onChange={(event) => setKind(event.currentTarget.value)}>
          {kinds.map((entry) => (
            <option key={entry.kind} value={entry.kind}>
              {entry.title}
            </option>
          ))}
        </select>
        <button type="button" class="main" disabled={none} onClick={() => store.export(kind)}>
          <Icon name="down" /> Export
        </button>
      </div>
      <p class="hint">{kinds.find((entry) => entry.kind === kind)?.about}</p>
      {job && <Progress job={job} />}
      <ul class="files">
        {[...exports].reverse().map((file) => (
          <li key={file.name}>
            <a href={store.api.download(file.name)} download={file.name}>
              {file.name}
            </a>{" "}
            <span class="soft">{sized(file.bytes)}</span>
          </li>
        ))}
      </ul>
      {marks.length > 0 && (
        <details>
          <summary>The same in a terminal</summary>
          <p class="hint">This command follows every mark in one run, as "Follow through the video" does:</p>
          <pre tabIndex={0}>{command}</pre>
          <button
            type="button"
            class="quiet"
            onClick={async () => {
              await navigator.clipboard.writeText(command);
              store.say("The command is on the clipboard.");
            }}
          >
            <Icon name="copy" /> Copy
          </button>
        </details>
      )}
    </section>
  );
}

function Settings({ store }: { store: Store }) {
  const { model, weights, device, size, sizes } = store.state;
  return (
    <section aria-labelledby="settings-title">
      <h2 id="settings-title">How it computes</h2>
      <p class="soft">
        {model} on {device}
        {weights && `, weights ${weights}`}
      </p>
      <label class="until">
        at
        <select aria-label="Size of the computation" value={size} onChange={(event) => store.setSize(Number(event.currentTarget.value))}>
          {sizes.map((rows) => (
            <option key={rows} value={rows}>
              {rows < 0 ? "the video's own size" : `${rows} rows`}
            </option>
          ))}
        </select>
      </label>
      <p class="hint">Fewer rows are faster, more keep thin parts.</p>
    </section>
  );
}

export function Side({ store }: { store: Store }) {
  useStore(store);
  return (
    <aside class="side" aria-label="Steps">
      <Objects store={store} />
      <Follow store={store} />
      <Look store={store} />
      <Export store={store} />
      <Settings store={store} />
    </aside>
  );
}
