// Command bench measures imps on a real API server, beside what the API server itself
// allows, and its credential provider beside that of AWS, alone and in a kubelet: `make bench`. The method, and what the figures mean,
// is in docs/benchmarks.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // a second signal kills
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// settings are the command line.
type settings struct {
	sizes      []string
	namespaces int
	repeats    int
	answers    int
	rate       float64
	idle       time.Duration
	json       string
	markdown   bool
	profile    string
}

func parse(args []string, stderr io.Writer) (settings, error) {
	var s settings
	flags := pflag.NewFlagSet("bench", pflag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.SortFlags = false
	flags.StringSliceVar(&s.sizes, "sizes", []string{"small", "large", sizeProvider, sizeKubelet}, "what to measure: "+strings.Join(sizeNames(), ", ")+"; "+sizeKubelet+" needs root on Linux, and is left out elsewhere")
	flags.IntVar(&s.namespaces, "namespaces", 0, "namespaces of each kind, in place of the size's own `number`")
	flags.IntVar(&s.repeats, "repeats", 1, "how often each size is measured; medians are shown")
	flags.IntVar(&s.answers, "answers", 300, "how often size "+sizeProvider+" asks each question")
	flags.Float64Var(&s.rate, "rate", 20, "triggers a second")
	flags.DurationVar(&s.idle, "idle", time.Minute, "how long to count the requests of processes that have nothing to do")
	flags.StringVar(&s.json, "json", "", "write every figure of every run to this `file`")
	flags.BoolVar(&s.markdown, "markdown", false, "print the tables of docs/benchmarks.md")
	flags.StringVar(&s.profile, "profile", "", "write CPU and heap profiles of each process and phase to this `folder`; it costs time")
	if err := flags.Parse(args); err != nil {
		return s, err
	}
	for _, name := range s.sizes {
		if _, err := sizeNamed(name); err != nil {
			return s, err
		}
	}
	switch {
	case flags.NArg() > 0:
		return s, fmt.Errorf("%q is not understood: there are only flags", flags.Arg(0))
	case s.namespaces < 0 || s.repeats < 1 || s.answers < 1 || s.rate <= 0 || s.idle < 0:
		return s, errors.New("--namespaces and --idle must not be below zero, --repeats, --answers and --rate must be above")
	}
	return s, nil
}

// run measures, prints, and returns the exit code. A goal that is missed is a result, not
// an error.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	s, err := parse(args, stderr)
	if errors.Is(err, pflag.ErrHelp) {
		return 0
	}
	if err == nil {
		err = runWith(ctx, s, stdout, stderr)
	}
	switch {
	case ctx.Err() != nil:
		_, _ = fmt.Fprintln(stderr, "bench: interrupted, everything is stopped and removed")
		return 1
	case err != nil:
		_, _ = fmt.Fprintln(stderr, "bench:", err)
		return 1
	}
	return 0
}

func runWith(ctx context.Context, s settings, stdout, stderr io.Writer) error {
	if s.json != "" { // a path that cannot be written to shall not be found out at the end
		if err := writeJSON(s.json, &result{}); err != nil {
			return err
		}
	}
	r, err := measure(ctx, s, stderr)
	if len(r.Runs) == 0 {
		return err
	}
	if s.json != "" {
		err = errors.Join(err, writeJSON(s.json, r))
	}
	return errors.Join(err, r.print(stdout, s.markdown))
}
