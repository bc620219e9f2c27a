// Curves, by uPlot (vendor/). Their numbers stand in the page as JSON, and below each as a table. Left and right arrow
// move the cursor; its values stand in the legend.
{
  const told = document.getElementById("plots");
  const root = document.documentElement;
  const ink = (name) => () => getComputedStyle(root).getPropertyValue(name).trim();
  const dashes = [[], [7, 4], [2, 3]];
  const styles = ["solid", "dashed", "dotted"]; // the same in the legend
  const short = (value) => value == null ? "–" : String(Number(value.toPrecision(3)));
  const drawn = [];
  for (const plot of told === null ? [] : JSON.parse(told.textContent)) {
    const place = document.querySelector(`[data-plot="${plot.name}"]`);
    const share = plot.unit === "percent";
    const form = (value) => value == null ? "–" : share ? `${(100 * value).toFixed(1)}%` : `${short(value)}${plot.unit ? ` ${plot.unit}` : ""}`;
    const axis = (label, extra) => ({
      label, labelSize: 22, labelFont: "13px system-ui, sans-serif", font: "12px system-ui, sans-serif", stroke: ink("--muted"),
      grid: { stroke: ink("--line"), width: 1 }, ticks: { show: false }, ...extra,
    });
    const size = () => ({ width: Math.max(240, place.clientWidth), height: Math.max(220, Math.min(320, 0.6 * place.clientWidth)) });
    const options = {
      ...size(),
      scales: { x: { time: false }, y: share ? {} : { range: (u, low, high) => [Math.min(0, low), 1.04 * high || 1] } },
      axes: [axis(plot.xLabel, { size: 30, labelSize: 20, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500] }), axis(plot.yLabel, { size: 54, values: (u, ticks) => ticks.map((tick) => share ? `${Math.round(1000 * tick) / 10}%` : short(tick)) })],
      series: [
        { label: plot.xLabel, value: (u, value) => short(value) },
        ...plot.lines.map((line) => ({
          label: line.label, stroke: ink(`--hue-${line.hue}`), width: 1.75, dash: dashes[line.dash % dashes.length], spanGaps: true,
          points: { show: plot.x.length < 30, size: 4 }, value: (u, value) => form(value),
        })),
      ],
      legend: {
        live: true,
        markers: { width: 3, fill: () => "transparent", dash: (u, series) => styles[series > 0 ? plot.lines[series - 1].dash % styles.length : 0] },
      },
    };
    const chart = new uPlot(options, [plot.x, ...plot.lines.map((line) => line.values)], place);
    drawn.push(() => chart.redraw(false));
    let at = -1;
    const move = (index) => {
      at = Math.max(0, Math.min(plot.x.length - 1, index));
      chart.setCursor({ left: chart.valToPos(plot.x[at], "x"), top: 0 }, false);
      chart.setLegend({ idx: at });
    };
    place.tabIndex = 0;
    place.setAttribute("role", "group");
    place.setAttribute("aria-label", `${plot.yLabel} by ${plot.xLabel}, ${plot.lines.length} lines; the arrow keys move along, the numbers stand in the table below`);
    place.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      move(at + step);
    });
    addEventListener("resize", () => { if (chart.width !== size().width) chart.setSize(size()); });
  }
  const again = () => drawn.forEach((draw) => draw());
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", again);
}
