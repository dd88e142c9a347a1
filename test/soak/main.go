// Command soak runs imps for a while under random changes and faults, and checks all along
// that it does what it promises: `make soak`.
//
// It keeps a model of the cluster that shares no code with imps. What it does comes from one
// seeded generator: the same seed makes the same sequence of steps.
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	c := config{out: os.Stdout}
	flag.DurationVar(&c.duration, "for", 30*time.Minute, "how long; it goes on until every kind of change and fault was there")
	flag.Uint64Var(&c.seed, "seed", rand.Uint64N(1_000_000), "of the generator") //nolint:gosec // a seed is no secret
	flag.StringVar(&c.logLevel, "log-level", "info", "of imps")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, c)
	stop()
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}
