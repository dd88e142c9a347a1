package main

import (
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

// note writes a text below a step's title.
func (p printer) note(format string, args ...any) {
	p.paragraph("   ", fmt.Sprintf(format, args...))
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

// row writes a row of a table whose rows come one after the other, so that the widths are given
// beforehand; a negative one aligns to the right.
func (p printer) row(widths []int, cells ...any) {
	var line strings.Builder
	for i, cell := range cells {
		_, _ = fmt.Fprintf(&line, "%*v  ", -widths[i], cell) // a Builder never fails
	}
	p.say("   %s", strings.TrimRight(line.String(), " "))
}

func milliseconds(d time.Duration) string { return fmt.Sprintf("%.1f", d.Seconds()*1000) }

// check is something that has to be so.
type check struct{ name, want, seen string }

// check notes what was expected and what was seen, and says at once where the two differ.
func (d *demo) check(name string, want, seen any) {
	c := check{name, fmt.Sprint(want), fmt.Sprint(seen)}
	if c.want != c.seen {
		d.failed(c)
		return
	}
	d.checks = append(d.checks, c)
}

// done notes something that was waited for and has come.
func (d *demo) done(name string) { d.check(name, true, true) }

func (d *demo) failed(c check) {
	d.checks = append(d.checks, c)
	d.note("FAILED: %s", c.name)
	d.paragraph("      expected: ", c.want)
	d.paragraph("      seen:     ", c.seen)
}

// failures counts the checks that failed.
func (d *demo) failures() int {
	n := 0
	for _, c := range d.checks {
		if c.want != c.seen {
			n++
		}
	}
	return n
}

// summarize lists all checks and returns the exit code.
func (d *demo) summarize(took time.Duration) int {
	d.say("\nSummary")
	for _, c := range d.checks {
		verdict := "ok"
		if c.want != c.seen {
			verdict = "FAILED"
		}
		d.paragraph(fmt.Sprintf("   %-8s", verdict), c.name)
	}
	failures := d.failures()
	d.say("\n%d of %d checks ok, %.0f s in all.", len(d.checks)-failures, len(d.checks), took.Seconds())
	return min(failures, 1)
}
