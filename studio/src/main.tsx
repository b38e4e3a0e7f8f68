// The page: choose a video, or work on one.

import { render } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { listen, ProjectApi, projects, upload } from "./api";
import { Icon } from "./icons";
import { Side } from "./side";
import { Stage, tellStage } from "./stage";
import { Store, useStore } from "./store";
import "./style.css";
import { applyTheme, ThemeButton } from "./theme";
import { Timeline } from "./timeline";
import { pressKey, Toolbar, ToolOptions } from "./toolbar";

const MASK_NAME = /\.(png|tiff?|bmp|webp)$/i;

function Start({ open, trouble }: { open: (id: string) => void; trouble: string }) {
  const [known, setKnown] = useState<{ id: string; title: string; path: string }[]>([]);
  const [share, setShare] = useState<number | null>(null);
  const [error, setError] = useState(trouble);
  const [over, setOver] = useState(false);
  const input = useRef<HTMLInputElement>(null);

  useEffect(() => {
    projects().then(setKnown, (reason: Error) => setError(reason.message));
  }, []);

  const send = async (files: FileList | null | undefined) => {
    const file = files?.[0];
    if (!file) return;
    setError("");
    setShare(0);
    try {
      open((await upload(file, setShare)).id);
    } catch (reason) {
      setError(reason instanceof Error ? reason.message : String(reason));
    } finally {
      setShare(null);
    }
  };

  return (
    <main
      class={`start ${over ? "over" : ""}`}
      onDragOver={(event) => {
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave={() => setOver(false)}
      onDrop={(event) => {
        event.preventDefault();
        setOver(false);
        void send(event.dataTransfer?.files);
      }}
    >
      <h1>Follow objects through a video</h1>
      <p>Mark an object on one frame. It is found on all the others, and you take away masks, an overlay or cut-outs.</p>
      <button type="button" class="main large" disabled={share !== null} onClick={() => input.current!.click()}>
        {share === null ? "Choose a video" : `Sending ... ${Math.round(share * 100)} %`}
      </button>
      <input
        ref={input}
        type="file"
        accept="video/*,.mkv,.gif,.webp,.tif,.tiff"
        hidden
        aria-label="Video"
        onChange={(event) => send(event.currentTarget.files)}
      />
      <p class="soft">or drop one here. It stays on this machine.</p>
      {share !== null && <progress max={1} value={share} aria-label="Sending" />}
      {error && (
        <p class="error" role="alert">
          {error}
        </p>
      )}
      {known.length > 0 && (
        <section aria-labelledby="known-title">
          <h2 id="known-title">Go on with</h2>
          <ul class="known">
            {known.map((project) => (
              <li key={project.id}>
                <button type="button" onClick={() => open(project.id)}>
                  <b>{project.title}</b> <span class="soft">{project.path}</span>
                </button>
              </li>
            ))}
          </ul>
        </section>
      )}
    </main>
  );
}

function handleKey(store: Store, event: KeyboardEvent): void {
  const target = event.target as HTMLElement;
  const types = target instanceof HTMLInputElement && !["range", "checkbox"].includes(target.type);
  if (types || target instanceof HTMLSelectElement || target instanceof HTMLTextAreaElement) return;
  const { key } = event;
  const command = event.ctrlKey || event.metaKey;
  const acts: Record<string, () => void> = {
    ArrowLeft: () => store.step(event.shiftKey ? -10 : -1),
    ArrowRight: () => store.step(event.shiftKey ? 10 : 1),
    Home: () => void store.show(0),
    End: () => void store.show(store.last),
    "[": () => (store.brush = Math.max(1, Math.floor(store.brush / 1.2))),
    "]": () => (store.brush = Math.min(Math.min(store.state.width, store.state.height), Math.ceil(store.brush * 1.2))),
    "+": () => tellStage("in"),
    "=": () => tellStage("in"),
    "-": () => tellStage("out"),
    "0": () => tellStage("fit"),
    Enter: () => tellStage("close"),
    Escape: () => tellStage("cancel"),
    m: () => (store.masks = !store.masks),
    x: () => store.setCompare(!store.compare),
    n: () => {
      if (store.nextLook) void store.show(store.nextLook.frame);
    },
  };
  if (command) {
    if (key.toLowerCase() === "z") event.shiftKey ? store.redo() : store.undo();
    else if (key.toLowerCase() === "y") store.redo();
    else return;
  } else if (key === " ") {
    if (target instanceof HTMLButtonElement || target.tagName === "SUMMARY" || target.tagName === "A") return;
    void store.play();
  } else if (key === "Enter" && (target instanceof HTMLButtonElement || target.tagName === "SUMMARY" || target.tagName === "A")) {
    return;
  } else if (target instanceof HTMLInputElement && target.type === "range" && key.startsWith("Arrow")) {
    return;
  } else if (/^[1-9]$/.test(key)) {
    store.choose(Number(key) - 1);
  } else if (acts[key]) {
    if (key.startsWith("Arrow") || key === "Home" || key === "End" || key === "n") store.watch = false;
    acts[key]();
  } else if (event.altKey || !pressKey(store, key.toLowerCase())) {
    return;
  }
  event.preventDefault();
  store.notify();
}

function Message({ store }: { store: Store }) {
  useStore(store);
  const { message, online } = store;
  return (
    <div class="messages" aria-live="polite">
      {!online && <p class="message bad">The server does not answer. What was drawn is kept there; this page goes on when it is back.</p>}
      {message && (
        <p class={`message ${message.bad ? "bad" : ""}`}>
          <span>{message.text}</span>
          <button type="button" class="quiet" aria-label="Close the message" onClick={() => store.dismiss()}>
            <Icon name="close" />
          </button>
        </p>
      )}
    </div>
  );
}

function Work({ store, close }: { store: Store; close: () => void }) {
  useEffect(() => {
    const pressed = (event: KeyboardEvent) => handleKey(store, event);
    const over = (event: DragEvent) => event.preventDefault();
    const dropped = (event: DragEvent) => {
      event.preventDefault();
      const file = event.dataTransfer?.files[0];
      if (!file) return;
      if (MASK_NAME.test(file.name)) void store.drop(file);
      else store.say(`${file.name} is not a mask: drop a PNG whose values are object ids.`, true);
    };
    addEventListener("keydown", pressed);
    addEventListener("dragover", over);
    addEventListener("drop", dropped);
    void store.show(store.frame, true);
    return () => {
      removeEventListener("keydown", pressed);
      removeEventListener("dragover", over);
      removeEventListener("drop", dropped);
      store.close();
    };
  }, [store]);
  const shape = { "--shape": store.state.height / store.state.width };
  return (
    <div class="work" style={shape}>
      <header>
        <button type="button" class="quiet" aria-label="All videos" title="All videos" onClick={close}>
          <Icon name="left" />
        </button>
        <h1 title={store.state.path}>{store.state.title}</h1>
        <span class="soft">
          {store.state.width} x {store.state.height}
        </span>
        <ToolOptions store={store} />
        <ThemeButton />
      </header>
      <section class="tools" aria-label="Tools">
        <Toolbar store={store} />
      </section>
      <main>
        <Stage store={store} />
      </main>
      <Side store={store} />
      <Timeline store={store} />
      <Message store={store} />
    </div>
  );
}

function App() {
  const [store, setStore] = useState<Store | null>(null);
  const [trouble, setTrouble] = useState("");
  const current = useRef<Store | null>(null);
  current.current = store;

  const open = async (id: string) => {
    if (current.current?.state.id === id) return;
    try {
      const next = new Store(await new ProjectApi(id).state());
      location.hash = id;
      document.title = `${next.state.title} - vosops studio`;
      setTrouble("");
      setStore(next);
    } catch (error) {
      setTrouble(error instanceof Error ? error.message : String(error));
      setStore(null);
    }
  };

  useEffect(() => {
    const chosen = () => {
      const id = decodeURIComponent(location.hash.slice(1));
      if (id) void open(id);
      else setStore(null);
    };
    addEventListener("hashchange", chosen);
    chosen();
    listen(
      (event) => current.current?.hear(event),
      (now) => current.current?.connected(now),
    );
    return () => removeEventListener("hashchange", chosen);
  }, []);

  if (store) return <Work key={store.state.id} store={store} close={() => (location.hash = "")} />;
  return (
    <>
      <div class="corner">
        <ThemeButton />
      </div>
      <Start key={trouble} open={open} trouble={trouble} />
    </>
  );
}

const chosenTheme = () => applyTheme(localStorage.getItem("theme"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", chosenTheme);
chosenTheme();
render(<App />, document.getElementById("app")!);
