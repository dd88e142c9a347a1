package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"unicode/utf8"
)

func writeJSON(path string, r *result) error {
	r.Goals = r.goals()
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the figures: %w", err)
	}
	return os.WriteFile(path, append(raw, '\n'), 0o600) //nolint:gosec // where the command line says
}

// table is one table; its first column is text, the others are figures.
type table struct {
	title string
	rows  [][]string // the first are the heads
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// print writes everything for people, or as the tables of docs/benchmarks.md.
func (r *result) print(w io.Writer, markdown bool) error {
	var text strings.Builder
	m := r.Machine
	fmt.Fprintf(&text, "%s, %d cores, %d MiB, Linux %s; %s, imps at %s; %s.\n", m.Processor, m.Cores, m.MemoryMiB, m.Kernel, m.Go, m.Source, m.Date)
	if m.Kubernetes != "" {
		fmt.Fprintf(&text, "Kubernetes %s", m.Kubernetes)
		if slices.ContainsFunc(r.Runs, func(run sizeRun) bool { return len(run.Phases) > 0 }) {
			fmt.Fprintf(&text, ", %g triggers a second", r.Rate)
		}
		text.WriteString(".\n")
	}
	for _, size := range sizeNames() {
		runs := r.of(size)
		if len(runs) == 0 {
			continue
		}
		text.WriteString(heading(runs, markdown))
		tables := []table{goalTable(goalsOf(runs))}
		switch size {
		case sizeProvider:
			tables = append(tables, answerTable(runs), burstTable(runs))
		case sizeKubelet:
			for _, s := range runs[0].Kubelet.Series {
				tables = append(tables, pluginTable(runs, s))
			}
		default:
			tables = append(tables, timeTable(runs), requestTable(runs), idleTable(runs, r.Idle), memoryTable(runs), cpuTable(runs))
		}
		for _, t := range tables {
			t.write(&text, markdown)
		}
	}
	_, err := io.WriteString(w, text.String())
	return err
}

// of returns the runs of one size.
func (r *result) of(size string) []sizeRun {
	return slices.DeleteFunc(slices.Clone(r.Runs), func(run sizeRun) bool { return run.Size != size })
}

// goals judges all sizes.
func (r *result) goals() (goals []goal) {
	for _, size := range sizeNames() {
		if runs := r.of(size); len(runs) > 0 {
			goals = append(goals, goalsOf(runs)...)
		}
	}
	return goals
}

func heading(runs []sizeRun, markdown bool) string {
	first := runs[0]
	mark, cuts, loads := "", 0, []string{}
	if markdown {
		mark = "### "
	}
	for _, run := range runs {
		loads = append(loads, fmt.Sprintf("%.2f", run.Load))
		cuts += run.Cuts
	}
	load := fmt.Sprintf("Runs: %d. Load of the machine before each: %s.", len(runs), strings.Join(loads, ", "))
	beside := ""
	switch {
	case first.Provider != nil:
		beside = first.Provider.Beside
	case first.Kubelet != nil:
		beside = first.Kubelet.Beside
	}
	if beside != "" {
		return fmt.Sprintf("\n%s%s: beside %s\n\n%s\n", mark, first.Size, beside, load)
	}
	return fmt.Sprintf("\n%s%s: %d + %d namespaces\n\n%s The watcher was cut off %d times.\n", mark, first.Size, first.Pods, first.Labels, load, cuts)
}

func goalTable(goals []goal) table {
	t := table{title: "Goals"}
	t.add("", "IMPS v0.3.13", "goal", "seen", "")
	for _, g := range goals {
		seen, limit, verdict := figure(g.Seen), "", ""
		if g.Least != g.Most {
			seen += " (" + figure(g.Least) + "–" + figure(g.Most) + ")"
		}
		if g.Limit != nil {
			limit, verdict = "≤ "+figure(*g.Limit), "met"
		}
		if !g.Met {
			verdict = "missed by " + figure(g.Seen-*g.Limit)
		}
		name := g.Name
		if g.Unit != "" {
			name += " [" + g.Unit + "]"
		}
		t.add(name, g.Before, limit, seen, verdict)
	}
	return t
}

func timeTable(runs []sizeRun) table {
	t := table{title: "Times in ms"}
	t.add("", "samples", "p50", "p90", "p99", "max")
	row := func(name string, of func(sizeRun) latency) {
		samples := 0
		for _, r := range runs {
			samples += of(r).Samples
		}
		if samples == 0 {
			return
		}
		t.add(name, fmt.Sprint(samples),
			figure(median(runs, func(r sizeRun) float64 { return of(r).P50 })), figure(median(runs, func(r sizeRun) float64 { return of(r).P90 })),
			figure(median(runs, func(r sizeRun) float64 { return of(r).P99 })), figure(median(runs, func(r sizeRun) float64 { return of(r).Max })))
	}
	row("floor: one apply, one after the other", func(r sizeRun) latency { return r.Floor.Apply })
	row("floor: one apply, at the rate of the triggers", func(r sizeRun) latency { return r.Floor.ApplyPaced })
	row("floor: its answer → its event at the watcher", func(r sizeRun) latency { return r.Floor.Event })
	row("the same with 32 plain clients at work", func(r sizeRun) latency { return r.Floor.EventBusy })
	for _, p := range runs[0].Phases {
		row(p.Name, func(r sizeRun) latency { return r.phase(p.Name).Latency })
	}
	for _, f := range []struct {
		name string
		of   func(sizeRun) float64
	}{
		{"floor: every Secret created", func(r sizeRun) float64 { return r.Floor.Create }},
		{"floor: every Secret changed", func(r sizeRun) float64 { return r.Floor.Change }},
		{"floor: every Secret deleted", func(r sizeRun) float64 { return r.Floor.Delete }},
	} {
		t.add(f.name, fmt.Sprint(len(runs)), "", "", "", figure(median(runs, f.of)))
	}
	return t
}

func requestTable(runs []sizeRun) table {
	t := table{title: "Requests"}
	t.add("phase", "Secret writes: coordinator", "agents", "garbage collector", "409", "404", "refused", "other writes", "all requests: coordinator", "agents", "garbage collector")
	for _, p := range runs[0].Phases {
		cells := []string{p.Name}
		for _, count := range []func(account) int{
			func(a account) int { return a.SecretWrites[coordinator] },
			func(a account) int { return a.SecretWrites[agents] },
			func(a account) int { return a.SecretWrites[collector] },
			func(a account) int { return a.Conflicts },
			func(a account) int { return a.NotFound },
			func(a account) int { return a.Refused },
			func(a account) int { return sum(a.OtherWrites) },
			func(a account) int { return a.Requests[coordinator] },
			func(a account) int { return a.Requests[agents] },
			func(a account) int { return a.Requests[collector] },
		} {
			cells = append(cells, figure(median(runs, func(r sizeRun) float64 { return float64(count(r.phase(p.Name).Account)) })))
		}
		t.add(cells...)
	}
	return t
}

// idleTable lists what imps asks for when there is nothing to do, and its other writes of
// all the phases before.
func idleTable(runs []sizeRun, idle float64) table {
	t := table{title: "What imps asks for beside its Secret writes"}
	t.add("", fmt.Sprintf("in %g s idle", idle), "in all other phases")
	kinds := map[string]struct{}{}
	count := func(p phase, kind string) int { return p.Account.OtherWrites[kind] + p.Account.Reads[kind] }
	for _, r := range runs {
		for _, p := range r.Phases {
			for _, counts := range []map[string]int{p.Account.OtherWrites, p.Account.Reads} {
				for kind := range counts {
					kinds[kind] = struct{}{}
				}
			}
		}
	}
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		t.add(kind,
			figure(median(runs, func(r sizeRun) float64 { return float64(count(r.phase(phaseIdle), kind)) })),
			figure(median(runs, func(r sizeRun) (n float64) {
				for _, p := range r.Phases {
					if p.Name != phaseIdle {
						n += float64(count(p, kind))
					}
				}
				return n
			})))
	}
	return t
}

func memoryTable(runs []sizeRun) table {
	t := table{title: "Memory in MiB"}
	t.add("", "idle", "at the end", "peak")
	for _, process := range slices.Sorted(maps.Keys(runs[0].Memory)) {
		t.add(process,
			figure(median(runs, func(r sizeRun) float64 { return r.Memory[process].Idle })),
			figure(median(runs, func(r sizeRun) float64 { return r.Memory[process].End })),
			figure(median(runs, func(r sizeRun) float64 { return r.Memory[process].Peak })))
	}
	return t
}

func cpuTable(runs []sizeRun) table {
	t := table{title: "CPU time in s"}
	heads := []string{"", "floor: create", "change", "delete"}
	for _, p := range runs[0].Phases {
		heads = append(heads, p.Name)
	}
	t.add(heads...)
	for _, process := range slices.Sorted(maps.Keys(runs[0].phase(phaseDeletion).CPU)) {
		cells := []string{process}
		for _, change := range []string{"create", "change", "delete"} {
			cells = append(cells, figure(median(runs, func(r sizeRun) float64 { return r.Floor.CPU[change][process] })))
		}
		for _, p := range runs[0].Phases {
			cells = append(cells, figure(median(runs, func(r sizeRun) float64 { return r.phase(p.Name).CPU[process] })))
		}
		t.add(cells...)
	}
	return t
}

// answerTable lists what became of each question to a provider.
func answerTable(runs []sizeRun) table {
	t := table{title: "Answers: times and CPU time in ms, memory in MiB"}
	t.add("", "samples", "p50", "p90", "p99", "max", "CPU, p50", "peak memory")
	for _, a := range runs[0].Provider.Answers {
		of := func(f func(answers) float64) string {
			return figure(median(runs, func(r sizeRun) float64 { return f(r.Provider.answer(a.Name)) }))
		}
		t.add(a.Name, fmt.Sprint(a.Times.Samples*len(runs)),
			of(func(a answers) float64 { return a.Times.P50 }), of(func(a answers) float64 { return a.Times.P90 }),
			of(func(a answers) float64 { return a.Times.P99 }), of(func(a answers) float64 { return a.Times.Max }),
			of(func(a answers) float64 { return a.CPU.P50 }), of(func(a answers) float64 { return a.PeakMiB }))
	}
	return t
}

func burstTable(runs []sizeRun) table {
	t := table{title: fmt.Sprintf("%d repositories of one registry at once", pulls)}
	t.add("", "samples", "calls to AWS", "ms until all are answered, p50", "max")
	for i, b := range runs[0].Provider.Bursts {
		of := func(f func(burst) float64) string {
			return figure(median(runs, func(r sizeRun) float64 { return f(r.Provider.Bursts[i]) }))
		}
		t.add(b.Name, fmt.Sprint(b.Times.Samples*len(runs)), of(func(b burst) float64 { return float64(b.Calls) }),
			of(func(b burst) float64 { return b.Times.P50 }), of(func(b burst) float64 { return b.Times.Max }))
	}
	return t
}

// figure writes a number with as many digits as tell anything.
func figure(value float64) string {
	digits := 2
	switch size := max(value, -value); {
	case value == float64(int64(value)) || size >= 100:
		digits = 0
	case size >= 10:
		digits = 1
	}
	text := fmt.Sprintf("%.*f", digits, value)
	if n := len(text); digits == 0 && n > 4 { // 12,345
		return text[:n-3] + "," + text[n-3:]
	}
	return text
}

// write appends the table to a text.
func (t *table) write(text *strings.Builder, markdown bool) {
	widths := make([]int, len(t.rows[0]))
	for _, row := range t.rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	title := t.title
	if markdown {
		title = "**" + title + "**"
	}
	fmt.Fprintf(text, "\n%s\n\n", title)
	for i, row := range t.rows {
		var cells []string
		for column, cell := range row {
			space := strings.Repeat(" ", widths[column]-utf8.RuneCountInString(cell))
			if column == 0 {
				cells = append(cells, cell+space)
			} else {
				cells = append(cells, space+cell)
			}
		}
		if !markdown {
			text.WriteString("  " + strings.TrimRight(strings.Join(cells, "  "), " ") + "\n")
			continue
		}
		text.WriteString("| " + strings.Join(cells, " | ") + " |\n")
		if i == 0 {
			text.WriteString("|---" + strings.Repeat("|---:", len(row)-1) + "|\n")
		}
	}
}
