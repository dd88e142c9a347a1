package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"time"
)

// columns is how wide the output may be.
const columns = 100

// printer writes for people.
type printer struct{ out io.Writer }

func (p printer) say(format string, args ...any) {
	// Whoever reads no more must not keep the demo from cleaning up.
	_, _ = fmt.Fprintf(p.out, format+"\n", args...)
}

// paragraph writes a text in lines that fit, the first after head, the others below its end.
func (p printer) paragraph(head, text string) {
	line, indent := head, strings.Repeat(" ", len(head))
	for word := range strings.FieldsSeq(text) {
		if len(line)+len(word) > columns && line != indent {
			p.say("%s", strings.TrimRight(line, " "))
			line = indent
		}
		line += word + " "
	}
	p.say("%s", strings.TrimRight(line, " "))
}

// table writes rows below one another as they come, so that the widths are given beforehand.
type table struct {
	printer
	widths []int // of all columns but the last; negative: aligned to the right
}

func (t table) row(cells ...any) {
	var line strings.Builder
	line.WriteString("  ")
	for i, cell := range cells {
		width := 0
		if i < len(t.widths) {
			width = -t.widths[i]
		}
		fmt.Fprintf(&line, " %*v ", width, cell)
	}
	text := strings.TrimRight(line.String(), " ")
	if len(text) > columns {
		text = text[:columns-3] + "..."
	}
	t.say("%s", text)
}

// indented writes lines below a step's title.
type indented struct{ out io.Writer }

// Write implements io.Writer for whole lines.
func (w indented) Write(text []byte) (int, error) {
	for line := range bytes.Lines(text) {
		if _, err := fmt.Fprintf(w.out, "   %s", line); err != nil {
			return 0, err
		}
	}
	return len(text), nil
}

func milliseconds(d time.Duration) string {
	return fmt.Sprintf("%.1f", d.Seconds()*1000)
}

// check is something that has to be so.
type check struct{ name, want, seen string }

func (c check) ok() bool { return c.want == c.seen }

// check notes what was expected and what was seen, and says at once where the two differ.
func (d *demo) check(name string, want, seen any) {
	c := check{name, fmt.Sprint(want), fmt.Sprint(seen)}
	if !c.ok() {
		d.failed(c)
		return
	}
	d.checks = append(d.checks, c)
}

// ok notes something that was waited for and came.
func (d *demo) ok(name string) { d.check(name, true, true) }

func (d *demo) failed(c check) {
	d.checks = append(d.checks, c)
	d.say("   FAILED: %s", c.name)
	d.paragraph("      expected: ", c.want)
	d.paragraph("      seen:     ", c.seen)
}

func (d *demo) anyFailed() bool {
	for _, c := range d.checks {
		if !c.ok() {
			return true
		}
	}
	return false
}

// summarize lists all checks and returns the exit code.
func (d *demo) summarize() int {
	failed := 0
	d.say("\nSummary")
	for _, c := range d.checks {
		verdict := "ok    "
		if !c.ok() {
			failed++
			verdict = "FAILED"
		}
		d.paragraph("   "+verdict+"  ", c.name)
	}
	d.say("\n%d of %d checks ok, %.0f s in all.", len(d.checks)-failed, len(d.checks), time.Since(d.begin).Seconds())
	if failed > 0 {
		return 1
	}
	return 0
}
