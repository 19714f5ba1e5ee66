(() => {
  "use strict";
  const {charts, themes} = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const hidden = new Set();

  const scheme = () => root.dataset.theme || (prefersDark.matches ? "dark" : "light");

  const colour = (word) => {
    const [, name, opacity] = word.match(/^\$([a-z]+\d*)(?:\/([\d.]+))?$/);
    const theme = themes[scheme()];
    const found = name.startsWith("series") ? theme.series[Number(name.slice(6))] : theme[name];
    if (!opacity) return found;
    const parts = [1, 3, 5].map((at) => parseInt(found.slice(at, at + 2), 16));
    return `rgba(${parts.join(",")},${opacity})`;
  };

  // Only under these keys are strings colours: a label may well begin with a dollar.
  const painted = (value, key) => {
    if (Array.isArray(value)) return value.map((item) => painted(item, key));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, painted(item, name)]));
    return typeof value === "string" && /color$/.test(key) && value.startsWith("$") ? colour(value) : value;
  };

  const layoutOf = (layout, width) => {
    const theme = themes[scheme()];
    const axis = {gridcolor: theme.line, linecolor: theme.line, zerolinecolor: theme.line, tickcolor: theme.line,
      automargin: true, title: {standoff: 8}};
    const base = {
      paper_bgcolor: theme.surface, plot_bgcolor: theme.surface, showlegend: false, hovermode: "closest",
      margin: {l: 56, r: 12, t: 28, b: 44}, barmode: "stack", dragmode: false, autosize: true,
      font: {family: "system-ui, -apple-system, Segoe UI, Roboto, Helvetica Neue, Arial, sans-serif",
        size: width < 500 ? 11 : 13, color: theme.ink},
      hoverlabel: {bgcolor: theme.raised, bordercolor: theme.line, font: {color: theme.ink}, namelength: -1},
    };
    const own = painted(layout, "");
    const axes = new Set(["xaxis", "yaxis", ...Object.keys(own).filter((key) => /^[xy]axis\d*$/.test(key))]);
    for (const key of axes) {
      const mine = own[key] || {};
      base[key] = {...axis, ...mine, title: {...axis.title, ...mine.title}};
      delete own[key];
    }
    return {...base, ...own, margin: {...base.margin, ...own.margin}};
  };

  const draw = (id) => {
    const element = document.getElementById(id);
    if (element.closest("[hidden]")) return;
    const traces = charts[id].traces.map((trace) =>
      ({...painted(trace, ""), visible: !hidden.has(trace.legendgroup)}));
    Plotly.react(element, traces, layoutOf(charts[id].layout, element.clientWidth),
      {responsive: true, displayModeBar: false, displaylogo: false, scrollZoom: false});
  };
  const drawAll = () => Object.keys(charts).forEach(draw);

  const button = document.getElementById("theme");
  const nameButton = () => { button.textContent = scheme() === "dark" ? "Light colours" : "Dark colours"; };
  button.addEventListener("click", () => {
    root.dataset.theme = scheme() === "dark" ? "light" : "dark";
    nameButton();
    drawAll();
  });
  prefersDark.addEventListener("change", () => { nameButton(); drawAll(); });
  matchMedia("(max-width: 500px)").addEventListener("change", drawAll);

  const entries = [...document.querySelectorAll(".legend button")];
  for (const entry of entries)
    entry.addEventListener("click", () => {
      const group = entry.dataset.group;
      if (!hidden.delete(group)) hidden.add(group);
      for (const other of entries)
        if (other.dataset.group === group) other.setAttribute("aria-pressed", String(!hidden.has(group)));
      drawAll();
    });

  for (const list of document.querySelectorAll("[role=tablist]")) {
    const tabs = [...list.children];
    const select = (chosen) => {
      for (const tab of tabs) {
        const isChosen = tab === chosen;
        tab.setAttribute("aria-selected", String(isChosen));
        tab.tabIndex = isChosen ? 0 : -1;
        document.getElementById(tab.getAttribute("aria-controls")).hidden = !isChosen;
      }
      chosen.focus();
      drawAll();
    };
    tabs.forEach((tab, i) => {
      tab.addEventListener("click", () => select(tab));
      tab.addEventListener("keydown", (event) => {
        const last = tabs.length - 1;
        const next = {ArrowRight: i === last ? 0 : i + 1, ArrowLeft: i === 0 ? last : i - 1, Home: 0, End: last};
        if (!(event.key in next)) return;
        event.preventDefault();
        select(tabs[next[event.key]]);
      });
    });
  }

  nameButton();
  drawAll();
  root.dataset.drawn = "yes";
})();
