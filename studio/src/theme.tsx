// Dark or light: as the system is, or as one chose.

import { useEffect, useState } from "preact/hooks";
import { Icon } from "./icons";

const CHANGED = "theme";

export function applyTheme(theme: string | null): void {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = theme ?? (dark ? "dark" : "light");
  dispatchEvent(new Event(CHANGED));
}

/** The theme, for what draws with its colours. */
export function useTheme(): string | undefined {
  const [theme, set] = useState(document.documentElement.dataset.theme);
  useEffect(() => {
    const changed = () => set(document.documentElement.dataset.theme);
    addEventListener(CHANGED, changed);
    return () => removeEventListener(CHANGED, changed);
  }, []);
  return theme;
}

export function ThemeButton() {
  const toggle = () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", theme);
    applyTheme(theme);
  };
  return (
    <button type="button" class="quiet" aria-label="Dark or light" title="Dark or light" onClick={toggle}>
      <Icon name="theme" />
    </button>
  );
}
